"""A head of the draft looks at what the draft samples: the target reads the promising candidates and segments only.

It decides nothing about safety: the target's head scores every token that an answer gets, as without it.

Shapes: K candidates, R of them that have a new token, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answer.pooling import pool_block
from ..answer.rows import Row
from ..answer.segments import Place
from ..engine.cache import BlockOutput
from ..engine.transfer import to_host
from ..errors import UnsupportedRequestError
from ..heads.safety_head import SafetyHead, check_target, check_usable
from .assistant import Draft
from .candidate_scores import worst_risk
from .monitor import RiskMonitor
from .support import check_model


class DraftScreen:
    """Scores the candidates of one attempt while the draft samples them. A candidate begins a segment of its own.

    Args:
        row ([`Row`]): The row.
        monitor ([`RiskMonitor`]): Of the draft's head.
    """

    def __init__(self, row: Row, monitor: RiskMonitor):
        self.row = row
        self.monitor = monitor
        self.risks: list[list[float]] = []
        self._places: list[Place | None] = []
        self._pooled_KF: Tensor | None = None

    def watch(self, segments: Sequence[Sequence[int]], is_open: Sequence[bool], output: BlockOutput) -> list[bool]:
        """Takes a forward of the draft over the newest token of every candidate; the first is over the row's own ones.

        Returns:
            `list[bool]`: `is_open`: what is sampled does not depend on what is found.
        """
        if not self.risks:
            self.risks, self._places = [[] for _ in segments], [None for _ in segments]
            return list(is_open)
        read = [k for k, tokens in enumerate(segments) if len(tokens) > len(self.risks[k])]
        if read:
            self._score_next(segments, read, output)
        return list(is_open)

    def read(self, segment: Sequence[int], hidden_TF: Tensor) -> Tensor:
        """Risks of the tokens of one segment, given their hidden states: what `watch` finds one after the other."""
        config, counts = self.monitor.head.config, self.row.segments.counts_ahead(segment)
        return self.monitor.risks([pool_block(None, hidden_TF, counts, config.pooling, config.ewma_decay)])

    def _score_next(self, segments: Sequence[Sequence[int]], read: Sequence[int], output: BlockOutput) -> None:
        assert output.hidden_BTF is not None
        counts = []
        for k in read:
            *before, token = segments[k]
            count, self._places[k] = self.monitor.count_next(self.row, len(before), token, self._places[k])
            counts.append(count)
        which_R = torch.tensor(read).to(output.hidden_BTF.device, non_blocking=True)
        before_RF = None if self._pooled_KF is None else self._pooled_KF[which_R]
        pooled_RF = self.monitor.pool_next(before_RF, output.hidden_BTF[which_R, -1], counts)
        if self._pooled_KF is None:
            self._pooled_KF = pooled_RF.new_zeros(len(segments), pooled_RF.shape[1])
        self._pooled_KF[which_R] = pooled_RF
        (risks_R,) = to_host([self.monitor.risks([pooled_RF])])
        for k, risk in zip(read, risks_R.tolist(), strict=True):
            self.risks[k].append(risk)

    def promising(self, segments: Sequence[Sequence[int]]) -> list[int]:
        """The candidates that the draft's head finds safe, in their order; the safest one where there is none."""
        return choose_promising(
            [worst_risk(risks if tokens else []) for risks, tokens in zip(self.risks, segments, strict=True)],
            self.monitor.head.config.risk_threshold,
        )


def choose_promising(worst: Sequence[float], threshold: float) -> list[int]:
    """Which candidates the target is to read.

    Args:
        worst (`Sequence[float]`): The highest risk of each to the draft's head; `nan` if it is unknown.
        threshold (`float`): That head's own.

    Example:

        >>> choose_promising([0.2, 0.9, 0.1], 0.5), choose_promising([0.8, 0.6], 0.5)
        ([0, 2], [1])
    """
    return [k for k, risk in enumerate(worst) if risk < threshold] or [safest(worst)]


def safest(worst: Sequence[float]) -> int:
    """Which of some has the lowest risk, the first of several; an unknown one is higher than any.

    Example:

        >>> safest([math.nan, 0.4, 0.2])
        2
    """
    return min(range(len(worst)), key=lambda k: math.inf if math.isnan(worst[k]) else worst[k])


def check_draft_head(
    head: SafetyHead,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    ignore_mismatches: tuple[str, ...] = (),
) -> None:
    """Raises unless a head can read what a draft writes.

    Args:
        head ([`SafetyHead`]): Of the draft.
        draft ([`~transformers.PreTrainedModel`], *optional*): The draft that is attached.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The target's, which is the draft's too.
        ignore_mismatches (`tuple[str, ...]`): As for the target's head.

    Raises:
        UnsupportedRequestError: If there is no draft, if it is no language model, or if the head reads whole answers.
        HeadMismatchError: If the head was trained for another model.
    """
    kind = Draft(draft)
    if draft is None or not kind.writes:
        raise UnsupportedRequestError(
            "`draft_head` reads the hidden states of a draft that is a language model, attached as `draft`, but the "
            f"draft is {kind.title}."
        )
    check_target(head, draft, tokenizer, ignore_mismatches)
    check_usable(head, draft)
    if head.config.span != "segment":
        raise UnsupportedRequestError(
            f"`draft_head` must read segments (`span='segment'`), but it has span={head.config.span!r}: what a draft "
            "saw of the answer so far is not kept. Train one with a reading such as `mean-segment`."
        )
    check_model(draft)
