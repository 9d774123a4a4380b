"""What the target says of candidate segments: how risky they are, and how likely."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..answer.rows import Row
from ..engine.cache import BlockOutput
from .monitor import RiskMonitor
from .verification import mean_log_prob


class CandidateScores:
    """Scores segments that continue a row, all at once or while they are sampled.

    Args:
        row ([`Row`]): The row.
        monitor ([`RiskMonitor`]): Scores the risk.
        threshold (`float`): A token is unsafe iff its risk is >= this.
        safe_enough (`float`, *optional*): Up to this risk the likeliest segment is wanted, not the safest.

    Attributes:
        segments (`Sequence[Sequence[int]]`): The segments.
        risks (`list[list[float]]`): Of each segment's tokens, in [0, 1].
        pooled (`list[torch.Tensor]`): The pooled states after them, and after the row's that waited for a risk.
        log_probs (`list[float]`): Mean log-probability of each segment's tokens, in nats.
        states (`list[torch.Tensor]`): All tapped states that were read for each segment, each of shape `(T, F)`.
        given_up (`set[int]`): Safe segments that `watch` said can't be chosen.
        watched (`list[float]`): Risk of each segment as `watch` had found it, if `read` came after it.
        seconds (`float`): Host time that the head took.
    """

    def __init__(self, row: Row, monitor: RiskMonitor, threshold: float, safe_enough: float | None = None):
        self.row = row
        self.monitor = monitor
        self.threshold = threshold
        self.safe_enough = -math.inf if safe_enough is None else safe_enough
        self.segments: Sequence[Sequence[int]] = []
        self.risks: list[list[float]] = []
        self.pooled: list[Tensor] = []
        self.log_probs: list[float] = []
        self.states: list[Tensor] = []
        self.given_up: set[int] = set()
        self.watched: list[float] = []
        self.seconds = 0.0
        self._log_probs_KV: Tensor | None = None

    def read(self, segments: Sequence[Sequence[int]], num_waiting: int, output: BlockOutput) -> None:
        """Takes one forward over whole segments, in the context that they would stand in.

        Args:
            segments (`Sequence[Sequence[int]]`): The segments.
            num_waiting (`int`): Tokens of the row that were read before each of them.
            output ([`BlockOutput`]): Of the forward, aligned to the right.
        """
        assert output.hidden_BTF is not None
        self.segments, self.watched = segments, self.worst()
        sizes = [num_waiting + len(tokens) for tokens in segments]
        self.states = [states_TF[-size:] for states_TF, size in zip(output.hidden_BTF, sizes, strict=True)]
        self.risks, self.pooled = [[] for _ in segments], [torch.empty(0) for _ in segments]
        self._score(segments, range(len(segments)))
        pairs = zip(output.logits_BTV, segments, strict=True)
        self.log_probs = [mean_log_prob(logits_TV, tokens) for logits_TV, tokens in pairs]

    def watch(self, segments: Sequence[Sequence[int]], is_open: Sequence[bool], output: BlockOutput) -> list[bool]:
        """Takes a forward over the newest token of every segment; the first one is over the row's own tokens.

        Args:
            segments (`Sequence[Sequence[int]]`): The segments so far.
            is_open (`Sequence[bool]`): Which of them have not come to their end.
            output ([`BlockOutput`]): Of the forward.

        Returns:
            `list[bool]`: Which open segments may still be chosen. A segment is as unsafe as its worst token, so it is
            out once it is unsafe, or worse than one that has ended and not safe enough.
        """
        assert output.hidden_BTF is not None
        self.segments = segments
        log_probs_KV = output.logits_BTV[:, -1].float().log_softmax(dim=-1)
        if self._log_probs_KV is None:
            self.risks, self.states = [[] for _ in segments], list(output.hidden_BTF)
            self.pooled, self.log_probs = [torch.empty(0) for _ in segments], [0.0] * len(segments)
            self._log_probs_KV = log_probs_KV
            return list(is_open)
        for k, tokens in enumerate(segments):
            del self.risks[k][len(tokens) :]  # one that has failed is empty
        read = [k for k, tokens in enumerate(segments) if len(tokens) > len(self.risks[k])]
        if not read:
            return [False] * len(segments)
        newest = torch.tensor([segments[k][-1] for k in read], device=log_probs_KV.device)
        for k, log_prob in zip(read, self._log_probs_KV[read].gather(1, newest[:, None])[:, 0].tolist(), strict=True):
            self.states[k] = torch.cat([self.states[k], output.hidden_BTF[k]])
            self.log_probs[k] += (log_prob - self.log_probs[k]) / len(segments[k])
        self._log_probs_KV = log_probs_KV
        self._score(segments, read)
        worst = self.worst()
        safe = [risk < self.threshold for risk in worst]
        ended = [worst[k] for k, open_ in enumerate(is_open) if safe[k] and not open_]
        bound = max(min(ended, default=math.inf), self.safe_enough)
        self.given_up |= {k for k, open_ in enumerate(is_open) if open_ and safe[k] and worst[k] > bound}
        return [open_ and safe[k] and worst[k] <= bound for k, open_ in enumerate(is_open)]

    def worst(self) -> list[float]:
        """The highest risk found along each segment; an unknown one is higher than any, as is that of an empty one."""
        worst = [worst_risk(risks) for risks in self.risks]
        return [worst_risk(pair) for pair in zip(worst, self.watched, strict=True)] if self.watched else worst

    def count(self, max_tokens: int) -> tuple[int, int]:
        """How many segments are safe to their end, and how many unsafe; of the others that is not known.

        Args:
            max_tokens (`int`): Tokens that a segment has at most.
        """
        safe = [k for k, risk in enumerate(self.worst()) if risk < self.threshold]
        num_unknown = sum(k in self.given_up and len(self.segments[k]) < max_tokens for k in safe)
        return len(safe) - num_unknown, len(self.segments) - len(safe)

    def _score(self, segments: Sequence[Sequence[int]], which: Sequence[int]) -> None:
        start = time.perf_counter()
        for k in which:
            self.pooled[k] = self.monitor.pool(self.row, segments[k], self.states[k][:, : self.monitor.num_tapped])
        values = iter(self.monitor.risks([self.pooled[k] for k in which]).tolist())
        for k in which:
            self.risks[k] = [next(values) for _ in segments[k]]
        self.seconds += time.perf_counter() - start


def worst_risk(risks: Sequence[float]) -> float:
    """The highest of some risks; `nan` where one is unknown, or there are none: a nan must never pass for safe.

    Example:

        >>> worst_risk([0.2, 0.7]), worst_risk([0.2, math.nan])
        (0.7, nan)
    """
    return max(risks or [math.nan], key=lambda risk: math.inf if math.isnan(risk) else risk)
