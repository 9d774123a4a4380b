"""What goes to the engine and what comes of it: submissions, candidates, and the finished answer. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..answer.rows import Row
from ..answer.transcript import INSERTED
from ..decoding.candidate_scores import worst_risk
from ..decoding.commit import Flag
from ..outputs import Provenance, SafeSpecEvent, SafeSpecStatistics


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
    """Candidates of one batch."""

    def __init__(self, num: int, threshold: float):
        self.segments: list[list[int]] = [[] for _ in range(num)]
        self.risks: list[list[float]] = [[] for _ in range(num)]
        self.sums: list[float] = [0.0] * num
        self.threshold = threshold

    @property
    def log_probs(self) -> list[float]:
        pairs = zip(self.sums, self.segments, strict=True)
        return [total / len(tokens) if tokens else -math.inf for total, tokens in pairs]

    def worst(self) -> list[float]:
        return [worst_risk(risks) for risks in self.risks]

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
        is_scoring (`bool`): The last one has been sampled after the reflection, and is read again without.
    """

    def __init__(self, flag: Flag, room: int):
        self.flag = flag
        self.room = room
        self.sizes: list[int] = []
        self.tried: list[Candidates] = []
        self.is_scoring = False


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
