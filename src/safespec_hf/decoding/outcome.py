"""What a recovery does to an answer, whoever samples its candidates: where they go, what is recorded, how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..answer.characters import character_edges
from ..answer.rows import Row
from ..outputs import Provenance, SafeSpecEvent
from .commit import Flag
from .plan import Plan


class Tried(Protocol):
    """Candidates that were sampled together, and what is known of them."""

    @property
    def segments(self) -> Sequence[Sequence[int]]:
        """Their tokens."""

    @property
    def log_probs(self) -> Sequence[float]:
        """Their mean log-probability per token, in nats."""

    def worst(self) -> list[float]:
        """The highest risk along each."""

    def count(self, max_tokens: int) -> tuple[int, int]:
        """How many are safe to their end, and how many unsafe."""


def room_for_candidate(row: Row, plan: Plan) -> int:
    """Tokens that a candidate may have once the reflection is in.

    It is at most a segment long, so that one safe segment later General Mode goes on.
    """
    num_reflection = len(plan.reflection_ids)
    num_shown = num_reflection if plan.policy.keep_reflection else 0
    room = plan.max_context - row.num_context - num_reflection
    return min(plan.policy.max_segment_tokens, row.room - num_shown, room)


def insert_reflection(row: Row, plan: Plan) -> None:
    """Inserts a reflection that stays, once for all attempts: only where samples may begin changes."""
    for token in plan.reflection_ids:
        row.append(token, Provenance.REFLECTION)


def attempt_event(
    row: Row,
    flag: Flag,
    tried: Sequence[Tried],
    max_tokens: int,
    outcome: str,
    chosen: int | None = None,
) -> SafeSpecEvent:
    """The event of an attempt, or of a test of the flag; `chosen` is one of its last batch."""
    counts = [batch.count(max_tokens) for batch in tried]
    return _event(
        row,
        flag,
        outcome,
        candidate_risks=tuple(risk for batch in tried for risk in batch.worst()),
        candidate_log_probs=tuple(log_prob for batch in tried for log_prob in batch.log_probs),
        chosen=None if chosen is None else sum(len(batch.segments) for batch in tried[:-1]) + chosen,
        num_safe_candidates=sum(num_safe for num_safe, _ in counts),
        num_unsafe_candidates=sum(num_unsafe for _, num_unsafe in counts),
    )


def end_answer(row: Row, plan: Plan, flag: Flag) -> None:
    """Ends the answer after what was kept, with the refusal: all of that was found safe, and reads on its own."""
    row.truncate(flag.kept)  # the reflection goes as well: it was for candidates only
    if plan.policy.policy == "stop":
        row.finish_reason = "safety_stop"
        row.events.append(_event(row, flag, "stopped"))
        return
    tokens = [*(plan.separator_ids if row.num_visible else []), *plan.refusal_ids][: max(row.room, 0)]
    # where there is no room for all of it, it ends with a whole character like anything that we write
    edges, _ = character_edges(0, tokens, row.segments.pieces)
    while tokens and not edges[len(tokens) - 1].after:
        tokens.pop()
    for token in tokens:
        row.append(token, Provenance.REFUSAL)
    row.finish_reason = "safety_refusal"
    row.events.append(_event(row, flag, "refused"))


def _event(row: Row, flag: Flag, outcome: str, **found: Any) -> SafeSpecEvent:
    kept = len(row.visible(0, flag.kept))
    found |= {"outcome": outcome, "is_prompt": flag.is_prompt}
    return SafeSpecEvent(flag.position, flag.risk, kept, flag.num_discarded, **found)
