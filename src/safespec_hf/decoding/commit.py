"""What becomes of new tokens: kept, the end of their answer, or taken back because one of them is unsafe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..answer.recovery import is_harmless
from ..answer.rows import Row
from ..outputs import Provenance, SafeSpecEvent, SafeSpecStatistics
from .plan import Plan
from .stopping import Stopping
from .verification import NO_TOKEN


class Pending(NamedTuple):
    """A row whose new tokens are added but not yet decided upon.

    Attributes:
        reason (`str`, *optional*): Why the answer ends with them, if it does.
        unsafe_risk (`float`, *optional*): Risk of the oldest token that is not settled, if that is unsafe.
    """

    reason: str | None
    unsafe_risk: float | None


NOTHING = Pending(None, None)


class Flag(NamedTuple):
    """What was taken back for an unsafe token, or nothing for an unsafe prompt; fields as in [`SafeSpecEvent`].

    Attributes:
        token (`int`): The unsafe one.
        before (`list[tuple[int, Provenance]]`, *optional*):
            What was taken back before it, where that may be put back: all of it is harmless, and no character is cut.
    """

    position: int
    risk: float
    kept: int
    num_discarded: int
    is_prompt: bool = False
    token: int = -1
    before: list[tuple[int, Provenance]] | None = None

    @property
    def gives_nothing_up(self) -> bool:
        """Whether a false alarm costs the unsafe token at most."""
        return self.is_prompt or self.before is not None


OUT_OF_TOKENS = "no token"
"""Why an answer can't go on where none could be drawn."""


class Committer:
    """Adds tokens and their risks to rows, in General Mode and in Safety Mode alike.

    Args:
        plan ([`Plan`]): The call.
        statistics ([`SafeSpecStatistics`]): Counts what is taken back.
        rows (`Sequence[Row]`): The whole batch, in the caller's order.
    """

    def __init__(self, plan: Plan, statistics: SafeSpecStatistics, rows: Sequence[Row]):
        self.plan = plan
        self.statistics = statistics
        self.rows = rows
        self.stopping = Stopping(plan.criteria, rows, plan.pad_token_id)

    def append(self, row: Row, tokens: Sequence[tuple[int, Provenance]]) -> str | None:
        """Adds tokens until the answer has come to its end; returns why it ended."""
        if row.closing is not None:
            return row.closing
        for token, origin in tokens:
            if token == NO_TOKEN:
                return OUT_OF_TOKENS  # no fault yet: what led there may be taken back, or be the end
            row.append(token, origin)
            if token in self.plan.eos_ids:
                return "eos"
            # hidden text uses up context as well, which `max_length` does not know
            is_over = row.has_hidden and row.num_context >= self.plan.max_context
            if row.room <= 0 or is_over or row.num_context > self.plan.max_positions:
                return "length"
        return None

    def settle(self, row: Row, risks: Sequence[float], pooled_TF: Tensor | None, reason: str | None) -> Pending:
        """Records the risks of the oldest tokens that had none, up to the first unsafe one unless that may stand."""
        if pooled_TF is None:
            if self.plan.monitor is None:
                row.num_settled = len(row.tokens)
            return Pending(reason, None)
        unsafe = [] if self.plan.observes else self._unsafe(risks)
        num_safe = unsafe[0] if unsafe else len(risks)
        row.settle(risks[:num_safe], pooled_TF[:num_safe])
        return Pending(reason, risks[num_safe] if unsafe else None)

    def _unsafe(self, risks: Sequence[float]) -> list[int]:
        # not "risk >= threshold": a nan must never pass for safe
        return [index for index, risk in enumerate(risks) if not risk < self.plan.risk_threshold]

    def report(self) -> None:
        """Where risks are only observed: makes events of what is unsafe in the finished answers."""
        if not self.plan.observes or self.plan.monitor is None:
            return
        for row in self.rows:
            # nothing was inserted, so every token is visible
            for index in self._unsafe(row.risks[: row.num_settled]):
                row.events.append(SafeSpecEvent(index, row.risks[index], index + 1, 0, outcome="observed"))
            self.statistics.num_flags += len(row.events)

    def decide(self, rows: Sequence[Row], pending: Sequence[Pending]) -> list[Flag | None]:
        """Ends rows, or takes back what is unsafe.

        What comes after the end of an answer is not part of it, however risky: so first come the criteria, which can
        end an answer anywhere in its new tokens, and then the flags.

        Raises:
            RuntimeError: If an answer goes on and there is nothing to draw a token from, as plain sampling does.
        """
        stopped = self._stop(dict(zip((row.index for row in rows), pending, strict=True)))
        flags: list[Flag | None] = []
        for row, (reason, unsafe_risk) in zip(rows, pending, strict=True):
            if row.index in stopped or unsafe_risk is None:
                flags.append(None)
            else:
                flags.append(self.roll_back(row, row.num_settled, unsafe_risk))
                continue
            if reason == OUT_OF_TOKENS and row.index not in stopped:
                raise RuntimeError(
                    f"No token can be drawn after {row.num_visible} tokens of answer {row.index}: its scores are not "
                    "numbers, or a logits processor leaves no token possible."
                )
            row.finalize()
            if row.index not in stopped:
                self._finish(row, reason)
        return flags

    def _stop(self, pending: dict[int, Pending]) -> set[int]:
        """Cuts the answers that a criterion ended; returns their rows."""
        if not self.plan.criteria:
            return set()
        ready = [self._num_ready(row, pending.get(row.index)) for row in self.rows]
        ends = self.stopping.ask(ready, [row.finish_reason is None for row in self.rows])
        for index, length in ends.items():
            row = self.rows[index]
            row.truncate(row.visible()[length - 1] + 1)
            if row.finish_reason is None:
                self._finish(row, "stop")
            else:  # it had come to an end further on, before the others were as long
                row.finish_reason = "stop"
        return set(ends)

    def _num_ready(self, row: Row, pending: Pending | None) -> int:
        """Visible tokens that criteria may see: no unsafe one, and none whose risk is still to come."""
        is_unsafe = pending is not None and pending.unsafe_risk is not None
        is_guarded = self.plan.monitor is not None and not self.plan.observes
        is_awaited = is_guarded and self.plan.policy.score_last_token is not False
        num_ready, is_live = row.num_visible, row.finish_reason is None
        if is_live and (is_unsafe or is_awaited):
            num_ready -= len(row.visible(row.num_settled))
        # at an end token or the length limit an answer ends anyway
        has_end = not is_live or (pending is not None and pending.reason not in (None, OUT_OF_TOKENS))
        return min(num_ready, row.num_visible - has_end)

    def _finish(self, row: Row, reason: str | None) -> None:
        """Ends an answer for a reason, or has its last token scored first."""
        row.closing, row.finish_reason = None, reason
        can_be_scored = self.plan.monitor is not None and row.num_context <= self.plan.max_positions
        if reason is not None and row.num_unscored() and can_be_scored and self._wants_score(row, reason):
            row.closing, row.finish_reason = reason, None

    def _wants_score(self, row: Row, reason: str) -> bool:
        """Whether a last token that no forward has read is worth one."""
        wish = self.plan.policy.score_last_token
        if wish is False:
            # who asks for one token at a time would otherwise get a whole answer without any score
            return row.num_settled == 0 and reason != "eos" and not self.plan.observes
        # what is only reported is not worth a forward of its own, unless it is asked for
        return bool(wish) or (reason != "eos" and not self.plan.observes)

    def flag_prompt(self, row: Row, risk: float) -> Flag | None:
        """The flag of an unsafe prompt; where risks are only observed an event instead."""
        if risk < self.plan.prompt_threshold:  # not "risk >= threshold": a nan must never pass for safe
            return None
        if self.plan.observes:
            row.events.append(SafeSpecEvent(0, risk, 0, 0, outcome="observed", is_prompt=True))
            return None
        self.statistics.num_flags += 1
        return Flag(0, risk, 0, 0, is_prompt=True)

    def roll_back(self, row: Row, flagged: int, risk: float) -> Flag:
        """Takes back an unsafe token with its segment, and what the policy gives up before it."""
        position, token = len(row.visible(0, flagged)), row.tokens[flagged]
        tokens, risks = list(zip(row.tokens, row.origins, strict=True))[:flagged], row.risks[:flagged]
        # words of a draft, as in segment mode, can't be kept off the token
        may_mend = row.segments.is_whole(flagged) and self.plan.policy.verification == "token"
        kept, num_discarded = row.roll_back(flagged)
        row.closing = None
        self.stopping.roll_back(row)
        self.statistics.num_flags += 1
        self.statistics.num_discarded_tokens += num_discarded
        is_spike = may_mend and is_harmless(risks[kept:], self.plan.harmless)
        return Flag(position, risk, kept, num_discarded, False, token, tokens[kept:] if is_spike else None)

    def mend(self, row: Row, flag: Flag) -> Flag:
        """Puts back what was taken back before a flagged token, which is not said there again; what is left of it.

        Nor does the answer end there: the target had more to say.
        """
        if flag.before is None:
            return flag
        for token, origin in flag.before:
            row.append(token, origin)
        ends = set() if flag.token in self.plan.eos_ids else self.plan.eos_ids
        row.banned.setdefault(len(row.tokens), set()).update({flag.token}, ends)
        self.statistics.num_discarded_tokens -= len(flag.before)
        kept, num_discarded = len(row.tokens), flag.num_discarded - len(flag.before)
        return flag._replace(kept=kept, num_discarded=num_discarded, before=None)
