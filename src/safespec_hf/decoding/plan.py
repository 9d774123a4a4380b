"""What a guarded call has decided before its first forward."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import StoppingCriteriaList

from ..config import SafeSpecConfig
from .monitor import RiskMonitor


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
