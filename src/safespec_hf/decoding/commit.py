"""What becomes of a row's new tokens: kept, taken back because one is unsafe, or the end of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..answer.rows import Row
from ..outputs import Provenance, SafeSpecStatistics
from .plan import Plan


class Flag(NamedTuple):
    """What was taken back for an unsafe token; the fields are those of [`SafeSpecEvent`]."""

    position: int
    risk: float
    kept: int
    num_discarded: int


class Committer:
    """Adds tokens and their risks to rows, in General Mode and in Safety Mode alike.

    Args:
        plan ([`Plan`]): The call.
        statistics ([`SafeSpecStatistics`]): Counts what is taken back.
    """

    def __init__(self, plan: Plan, statistics: SafeSpecStatistics):
        self.plan = plan
        self.statistics = statistics

    def append(self, row: Row, tokens: Sequence[tuple[int, Provenance]]) -> str | None:
        """Adds tokens until one ends the answer; returns why it ended."""
        for token, origin in tokens:
            row.append(token, origin)
            if token in self.plan.eos_ids:
                return "eos"
            # hidden text uses up context as well, which `max_length` does not know
            is_over = row.has_hidden and row.num_context > self.plan.max_context
            if row.room <= 0 or is_over or row.num_context > self.plan.max_positions:
                return "length"
            if self.plan.criteria and bool(self.plan.criteria(row.visible_ids(), None).all()):
                return "stop"
        return None

    def settle(self, row: Row, risks: Sequence[float], pooled_TF: Tensor | None, reason: str | None) -> Flag | None:
        """Records risks; on an unsafe one takes tokens back, otherwise ends the answer if there is a `reason`."""
        # not "risk >= threshold": a nan must never pass for safe
        unsafe = [index for index, risk in enumerate(risks) if not risk < self.plan.risk_threshold]
        num_safe = unsafe[0] if unsafe else len(risks)
        if pooled_TF is not None:
            row.settle(risks[:num_safe], pooled_TF[:num_safe])
        elif self.plan.monitor is None:
            row.num_settled = len(row.tokens)
        if unsafe:
            return self.take_back(row, row.num_settled, risks[num_safe])
        row.finalize()
        # an answer of one token would otherwise come back without any score
        is_wanted = self.plan.policy.score_last_token or (row.num_settled == 0 and reason != "eos")
        # what lies past the target's last position can't be read
        is_wanted = is_wanted and row.num_context <= self.plan.max_positions
        needs_score = is_wanted and pooled_TF is not None and row.num_unscored() > 0
        row.closing = reason if needs_score else None
        row.finish_reason = None if needs_score else reason
        return None

    def take_back(self, row: Row, flagged: int, risk: float) -> Flag:
        position = len(row.visible(0, flagged))
        kept, num_discarded = row.rollback(flagged)
        row.closing = None
        self.statistics.num_flags += 1
        self.statistics.num_discarded_tokens += num_discarded
        return Flag(position, risk, kept, num_discarded)
