"""Scores prompts in the step that reads their last token, and closes what would follow an unsafe one. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads.safety_head import SafetyHead
from .entries import Entry, Marks, StepRow


class Asked(NamedTuple):
    """A prompt that is to be scored.

    Attributes:
        place (`int`): Of its last token, among the hidden states of the step.
        logits (`int`): The row of logits after it.
        limit (`float`): It is unsafe unless its risk is below; infinite where risks are only observed.
    """

    entry: Entry
    place: int
    logits: int
    limit: float


def score_prompts(
    head: SafetyHead, rows: Sequence[StepRow], entries: Mapping[str, Entry], hidden_NH: Tensor, marks: Marks
) -> None:
    """Notes the risks of prompts whose last token a step has read; in `marks`, forces what follows unsafe ones.

    Args:
        head ([`SafetyHead`]): The head.
        rows (`Sequence[StepRow]`): Of the batch, in its order.
        entries (`Mapping[str, Entry]`): By the engine's ids.
        hidden_NH (`torch.Tensor` of shape `(N, H)`): Tapped hidden states of all tokens of the step.
        marks ([`Marks`]): Of the step; changed in place.
    """
    asked = find_asked(rows, entries)
    # where logits are other than expected, all of them are forced already
    if not asked or len(marks.is_forced_R) != sum(1 + row.num_drafts for row in rows):
        return
    risk_B = head.prompt_risk(hidden_NH[[one.place for one in asked]])
    limit_B = torch.tensor([one.limit for one in asked], device=risk_B.device, dtype=torch.float64)
    # not "risk >= threshold": a nan must never pass for safe; but what is only observed is never flagged
    marks.is_forced_R[[one.logits for one in asked]] |= ~(risk_B.double() < limit_B) & ~limit_B.isinf()
    for one, risk in zip(asked, risk_B, strict=True):
        one.entry.prompt_risk = risk


def find_asked(rows: Sequence[StepRow], entries: Mapping[str, Entry]) -> list[Asked]:
    """The prompts that a step read to their end, of requests that are to have them scored."""
    asked, num_tokens, num_logits = list[Asked](), 0, 0
    for row in rows:
        entry, end = entries.get(row.request), num_logits + 1 + row.num_drafts
        order = None if entry is None or entry.failure is not None else entry.order
        if entry is not None and order is not None and order.prompt_threshold is not None:
            num_before = order.start - 1 - row.start
            num_from = row.num_tokens - num_before  # the last one of the prompt, and those after it
            if num_before >= 0 and 1 <= num_from <= 1 + row.num_drafts:
                limit = math.inf if order.threshold is None else order.prompt_threshold
                asked.append(Asked(entry, num_tokens + num_before, end - num_from, limit))
        num_tokens, num_logits = num_tokens + row.num_tokens, end
    return asked
