"""What a guarded call has decided before its first forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteriaList

from ..config import SafeSpecConfig
from .monitor import RiskMonitor

NUM_UNUSED = 8
"""Rows at the beginning of a table of positions that may be kept free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about a call that stays the same while it runs.

    Attributes:
        policy ([`SafeSpecConfig`]): What to do on risk.
        monitor ([`RiskMonitor`], *optional*): Scores the risk. `None` decodes unguarded, to measure what safety costs.
        risk_threshold (`float`): A token is unsafe iff its risk is >= this.
        num_draft_tokens (`int`): Drafts per round at most.
        do_sample (`bool`): Speculative sampling instead of greedy acceptance.
        eos_ids (`frozenset[int]`): Tokens that end an answer.
        criteria ([`~transformers.StoppingCriteriaList`]): All others that can end it.
        reflection_ids, refusal_ids (`list[int]`): The policy's texts, tokenised.
        separator_ids (`list[int]`): Comes between an answer's beginning and a refusal.
        max_context (`int`): Tokens the target can attend to.
        seeds (`list[int]`): Of candidate sampling, per row.
        num_positions (`int`, defaults to 2**31): Tokens the target can read at all, see [`num_positions`].
        pad_token_id (`int`, defaults to 0): What criteria see after the end of a row, in a batch.
    """

    policy: SafeSpecConfig
    monitor: RiskMonitor | None
    risk_threshold: float
    num_draft_tokens: int
    do_sample: bool
    eos_ids: frozenset[int]
    criteria: StoppingCriteriaList
    reflection_ids: list[int]
    refusal_ids: list[int]
    separator_ids: list[int]
    max_context: int
    seeds: list[int]
    num_positions: int = 2**31
    pad_token_id: int = 0


def recovery_seeds(seed: int | None, do_sample: bool, num_rows: int) -> list[int]:
    """One per row: the same for all, so that a row recovers as it would alone, but for samples without a seed."""
    if seed is not None or not do_sample:
        return [seed or 0] * num_rows
    return torch.randint(2**31, (num_rows,)).tolist()


def num_positions(model: PreTrainedModel) -> int:
    """How many tokens a model has positions for: as many as its table of them has rows, if it has one.

    Rotary positions are computed, so models with them read on, however well, and have no such limit.
    """
    text = model.config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    tables: list[torch.Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    # some tables begin with rows that no token uses
    sizes = {len(table) for table in tables} - {text.vocab_size}
    return 2**31 if most is None or not any(most <= size <= most + NUM_UNUSED for size in sizes) else most
