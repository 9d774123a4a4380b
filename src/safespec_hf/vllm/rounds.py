"""What goes to the engine and what comes of it: submissions, candidates, and the finished answer. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..answer.bans import may_loop
from ..answer.rows import Row
from ..answer.transcript import INSERTED
from ..decoding.candidate_scores import worst_risk
from ..decoding.commit import Flag
from ..decoding.plan import Plan
from ..outputs import Provenance, SafeSpecEvent, SafeSpecStatistics
from .spec import CandidateOrder, GuardOrder, RiskRecord


class Submission(NamedTuple):
    """One request for the engine.

    Attributes:
        key (`str`): Its id; unique.
        prompt_ids (`list[int]`): Its prompt: the answer's own and what was kept of it.
        params (`dict`): Arguments of `vllm.SamplingParams`.
    """

    key: str
    prompt_ids: list[int]
    params: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardedResult:
    """A finished answer. Every field is about what the caller sees.

    Attributes:
        token_ids (`list[int]`): The answer.
        risks (`list[float]`): Of its tokens, in [0, 1]; `nan` for inserted text and an end token.
        provenance (`list[Provenance]`): Where they came from; drafts of the engine's count as the target's.
        events (`list[SafeSpecEvent]`): What was flagged, and what was done.
        finish_reason (`str`): `"eos"`, `"length"`, `"stop"`, `"safety_refusal"` or `"safety_stop"`.
        statistics ([`SafeSpecStatistics`]): Counts; seconds are not taken here.
        failure (`str`, *optional*): Why the engine could not guard it, so that it ended with the refusal.
    """

    token_ids: list[int]
    risks: list[float]
    provenance: list[Provenance]
    events: list[SafeSpecEvent]
    finish_reason: str
    statistics: SafeSpecStatistics
    failure: str | None = None


class Candidates:
    """Candidates of one batch.

    Attributes:
        segments (`list[list[int]]`): Their tokens.
        watched (`list[float]`): The highest risk along each, as it was sampled; `nan` where that is not known.
        risks (`list[list[float]]`): Of their tokens, in the context that the answer goes on with.
        token_log_probs (`list[list[float]]`): In that context as well, in nats.
    """

    def __init__(self, num: int, threshold: float):
        self.segments: list[list[int]] = [[] for _ in range(num)]
        self.watched: list[float] = [math.nan] * num
        self.risks: list[list[float]] = [[] for _ in range(num)]
        self.token_log_probs: list[list[float]] = [[] for _ in range(num)]
        self.threshold = threshold

    @property
    def log_probs(self) -> list[float]:
        return [sum(of_one) / len(of_one) if of_one else -math.inf for of_one in self.token_log_probs]

    def lacks_log_probs(self) -> bool:
        """Whether some token's log-probability is not known."""
        return any(math.isnan(log_prob) for of_one in self.token_log_probs for log_prob in of_one)

    def worst(self) -> list[float]:
        """The worse of what was found while they were sampled, and when they were read again."""
        pairs = zip(self.risks, self.watched, strict=True)
        return [worst_risk([worst_risk(risks), watched]) for risks, watched in pairs]

    def count(self, max_tokens: int) -> tuple[int, int]:
        num_safe = sum(risk < self.threshold for risk in self.worst())
        return num_safe, len(self.segments) - num_safe


class Recovery:
    """A recovery that is going on.

    Attributes:
        flag ([`Flag`]): Why.
        room (`int`): Tokens that a candidate may have.
        sizes (`list[int]`): Of the batches of this attempt that are still to be sampled.
        tried (`list[Candidates]`): Those that were, the last one perhaps still running.
        is_test (`bool`): It is still to be seen whether the flag was a false alarm.
        is_scoring (`bool`): The last one has been sampled after the reflection, and is read again without.
    """

    def __init__(self, flag: Flag, room: int):
        self.flag = flag
        self.room = room
        self.sizes: list[int] = []
        self.tried: list[Candidates] = []
        self.is_test = False
        self.is_scoring = False

    def feed(self, number: int, tokens: Sequence[int], log_probs: Sequence[float], reserved_id: int) -> None:
        """Takes new tokens of a candidate; or, while candidates are read again, the log-probabilities of a prompt."""
        batch = self.tried[-1]
        if self.is_scoring:  # what would follow is of no interest
            if log_probs:
                batch.token_log_probs[number] = list(log_probs)[-len(batch.segments[number]) :]
            return
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if token == reserved_id:
                break
            batch.segments[number].append(token)
            batch.token_log_probs[number].append(log_prob)


def risks_of(segment: Sequence[int], record: RiskRecord | None, first: int) -> list[float]:
    """Risks of a candidate's tokens, as a round has found them; of what the worker can't vouch for none is known.

    Args:
        segment (`Sequence[int]`): The tokens.
        record (`RiskRecord`, *optional*): What the worker knows.
        first (`int`): Where the first of them stood in that round.

    Example:

        >>> risks_of([11, 12], RiskRecord(start=7, tokens=[11, 13], risks=[0.1, 0.2]), first=7)
        [0.1, nan]
    """
    if record is None or record.failure is not None:
        return [math.nan] * len(segment)
    return [record.risk(first + offset, token) for offset, token in enumerate(segment)]


def why_untrusted(row: Row, num_before: int, was_stopped: bool) -> str | None:
    """Why a round of General Mode in which nothing was flagged can't be trusted, if it can't.

    Args:
        row ([`Row`]): The answer.
        num_before (`int`): Its tokens that were there when the round began.
        was_stopped (`bool`): Whether the worker stopped it.
    """
    if was_stopped:
        return "it was stopped, and nothing was flagged"
    if row.finish_reason is None:
        return "the engine ended it"
    settled = range(num_before, row.num_settled)
    if any(math.isnan(row.risks[index]) for index in settled if row.origins[index] not in INSERTED):
        return "the risk of a token is unknown"
    return None


def guard_order(
    key: str, group: str, secret: str, row: Row, plan: Plan, candidate: CandidateOrder | None, more: Sequence[int]
) -> GuardOrder:
    """What the worker is told about a submission.

    Args:
        key (`str`), group (`str`), secret (`str`): The submission's id, its answer's, and the engine's secret.
        row ([`Row`]), plan ([`Plan`]): The answer.
        candidate ([`CandidateOrder`], *optional*): Of a candidate.
        more (`Sequence[int]`): What is read after the answer; before a candidate that is a reflection.
    """
    policy, start = plan.policy, len(row.prompt)
    # in the first round, and when that is read again
    asks_for_prompt = candidate is None and not row.tokens and not row.events and not more
    inserted = [[start + first, start + end] for first, end in inserted_ranges(row)]
    if candidate is not None and more:
        inserted.append([row.num_context, row.num_context + len(more)])
    return GuardOrder(
        key=key,
        group=group,
        secret=secret,
        start=start,
        inserted=inserted,
        threshold=None if plan.observes else plan.risk_threshold,
        segment_limits=[policy.min_segment_tokens, policy.max_segment_tokens],
        candidate=candidate,
        prompt_threshold=plan.prompt_threshold if asks_for_prompt and plan.screens_prompts else None,
        breaks_loops=candidate is None and may_loop(row),
        banned=[[start + at, token] for at, tokens in row.banned.items() for token in sorted(tokens)],
    )


def inserted_ranges(row: Row) -> list[tuple[int, int]]:
    """Ranges of answer tokens that were inserted."""
    found: list[tuple[int, int]] = []
    for index, origin in enumerate(row.origins):
        if origin in INSERTED:
            if found and found[-1][1] == index:
                found[-1] = (found[-1][0], index + 1)
            else:
                found.append((index, index + 1))
    return found
