"""What the target says of candidate segments: how risky they are, and how likely."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..answer.rows import Row
from ..answer.segments import Place
from ..engine.cache import BlockOutput
from ..engine.transfer import to_host
from .monitor import RiskMonitor
from .verification import mean_log_prob


class CandidateScores:
    """Scores segments that continue a row, all at once or while they are sampled.

    Args:
        row ([`Row`]): The row.
        monitor ([`RiskMonitor`]): Scores the risk.
        threshold (`float`): A token is unsafe iff its risk is >= this.
        safe_enough (`float`, *optional*): Up to this risk the likeliest segment is wanted, not the safest.
        all_up_to (`float`, *optional*): None is wanted any more once one has a higher risk than this.

    Attributes:
        segments (`Sequence[Sequence[int]]`): The segments.
        risks (`list[list[float]]`): Of each segment's tokens, in [0, 1].
        log_probs (`list[float]`): Mean log-probability of each segment's tokens, in nats.
        given_up (`set[int]`): Safe segments that `watch` said can't be chosen.
        watched (`list[float]`): Risk of each segment as `watch` had found it, if `read` came after it.
        seconds (`float`): Host time that the head took.
    """

    def __init__(
        self,
        row: Row,
        monitor: RiskMonitor,
        threshold: float,
        safe_enough: float | None = None,
        all_up_to: float | None = None,
    ):
        self.row = row
        self.monitor = monitor
        self.threshold = threshold
        self.safe_enough = -math.inf if safe_enough is None else safe_enough
        self.all_up_to = math.inf if all_up_to is None else all_up_to
        self.segments: Sequence[Sequence[int]] = []
        self.risks: list[list[float]] = []
        self.log_probs: list[float] = []
        self.given_up: set[int] = set()
        self.watched: list[float] = []
        self.seconds = 0.0
        # of each segment in parts, so that one more token costs the same however many there are
        self._pooled: list[list[Tensor]] = []
        self._states: list[list[Tensor]] = []
        self._worst: list[float] = []
        self._places: list[Place | None] = []  # where each segment leaves off
        self._log_probs_KV: Tensor | None = None

    def pooled(self, segment: int) -> Tensor:
        """The pooled states after a segment's tokens, and after the row's that waited for a risk."""
        return torch.cat(self._pooled[segment])

    def states(self, segment: int) -> Tensor:
        """All tapped states that were read for a segment, of shape `(T, F)`."""
        return torch.cat(self._states[segment])

    def read(self, segments: Sequence[Sequence[int]], num_waiting: int, output: BlockOutput) -> None:
        """Takes one forward over whole segments, in the context that they would stand in.

        Args:
            segments (`Sequence[Sequence[int]]`): The segments.
            num_waiting (`int`): Tokens of the row that were read before each of them.
            output ([`BlockOutput`]): Of the forward, aligned to the right.
        """
        assert output.hidden_BTF is not None
        start = time.perf_counter()
        self.segments, self.watched = segments, self.worst()
        sizes = [num_waiting + len(tokens) for tokens in segments]
        states = [states_TF[-size:] for states_TF, size in zip(output.hidden_BTF, sizes, strict=True)]
        num = self.monitor.num_tapped
        triples = zip(segments, states, strict=True)
        pooled = [self.monitor.pool(self.row, tokens, states_TF[:, :num]) for tokens, states_TF in triples]
        pairs = zip(output.logits_BTV, segments, strict=True)
        log_probs = torch.stack([mean_log_prob(logits_TV, tokens) for logits_TV, tokens in pairs])
        log_probs, risks = to_host([log_probs, self.monitor.risks(pooled)])
        split = zip(risks.split([len(one) for one in pooled]), segments, strict=True)
        self.risks = [risks_T.tolist()[len(risks_T) - len(tokens) :] for risks_T, tokens in split]
        self.log_probs = log_probs.tolist()
        self._states, self._pooled = [[one] for one in states], [[one] for one in pooled]
        self.seconds += time.perf_counter() - start

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
            self._begin(len(segments), output.hidden_BTF[0])
            self._log_probs_KV = log_probs_KV
            return list(is_open)
        for k, tokens in enumerate(segments):
            if not tokens:  # it has failed
                self.risks[k].clear()
                self._worst[k] = math.nan
        read = [k for k, tokens in enumerate(segments) if len(tokens) > len(self.risks[k])]
        if not read:
            return [False] * len(segments)
        self._score_next(read, output.hidden_BTF)
        self._log_probs_KV = log_probs_KV
        worst = self._worst
        safe = [risk < self.threshold for risk in worst]
        ended = [worst[k] for k, open_ in enumerate(is_open) if safe[k] and not open_]
        bound = max(min(ended, default=math.inf), self.safe_enough)
        if not all(risk <= self.all_up_to for risk in worst):
            bound = -math.inf
        self.given_up |= {k for k, open_ in enumerate(is_open) if open_ and safe[k] and worst[k] > bound}
        return [open_ and safe[k] and worst[k] <= bound for k, open_ in enumerate(is_open)]

    def _begin(self, num: int, hidden_TF: Tensor) -> None:
        pooled_TF = self.monitor.pool(self.row, [], hidden_TF[:, : self.monitor.num_tapped])
        self.risks, self.log_probs, self._places = [[] for _ in range(num)], [0.0] * num, [None] * num
        self._states, self._pooled = [[hidden_TF] for _ in range(num)], [[pooled_TF] for _ in range(num)]
        self._worst = [-math.inf] * num

    def _score_next(self, which: Sequence[int], hidden_BTF: Tensor) -> None:
        """Scores the newest token of some segments, with one wait for the device."""
        start = time.perf_counter()
        assert self._log_probs_KV is not None
        counts = []
        for k in which:
            tokens = self.segments[k]
            count, self._places[k] = self.monitor.count_next(self.row, len(tokens) - 1, tokens[-1], self._places[k])
            counts.append(count)
        ids = torch.tensor([which, [self.segments[k][-1] for k in which]]).to(hidden_BTF.device, non_blocking=True)
        hidden_KF = hidden_BTF[ids[0], -1]
        last_F = self.row.pooled.last()
        befores = [pooled_TF[-1] if len(pooled_TF := self._pooled[k][-1]) else last_F for k in which]
        known = [before_F for before_F in befores if before_F is not None]  # all, or none at an answer's beginning
        before_KF = torch.stack(known) if known else None
        pooled_KF = self.monitor.pool_next(before_KF, hidden_KF[:, : self.monitor.num_tapped], counts)
        log_probs, risks = to_host([self._log_probs_KV[ids[0], ids[1]], self.monitor.risks([pooled_KF])])
        found = zip(which, risks.tolist(), log_probs.tolist(), hidden_KF[:, None], pooled_KF[:, None], strict=True)
        for k, risk, log_prob, hidden_TF, pooled_TF in found:
            self.risks[k].append(risk)
            self._worst[k] = worst_risk([self._worst[k], risk])
            self._states[k].append(hidden_TF)
            self._pooled[k].append(pooled_TF)
            self.log_probs[k] += (log_prob - self.log_probs[k]) / len(self.segments[k])
        self.seconds += time.perf_counter() - start

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


def worst_risk(risks: Sequence[float]) -> float:
    """The highest of some risks; `nan` where one is unknown, or there are none: a nan must never pass for safe.

    Example:

        >>> worst_risk([0.2, 0.7]), worst_risk([0.2, math.nan])
        (0.7, nan)
    """
    return max(risks or [math.nan], key=lambda risk: math.inf if math.isnan(risk) else risk)
