"""What a guarded call has decided before its first forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import StoppingCriteriaList

from ..answer.rows import Row
from ..config import SafeSpecConfig
from ..errors import UnsupportedRequestError
from .attachment import find_prompt_threshold
from .monitor import RiskMonitor


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about a call that stays the same while it runs.

    Attributes:
        policy ([`SafeSpecConfig`]): What to do on risk, resolved.
        monitor ([`RiskMonitor`], *optional*): Scores the risk. `None` decodes unguarded, to measure what safety costs.
        risk_threshold (`float`): A token is unsafe iff its risk is >= this.
        num_draft_tokens (`int`): Drafts per round at most.
        do_sample (`bool`): Speculative sampling instead of greedy acceptance.
        eos_ids (`frozenset[int]`): Tokens that end an answer.
        criteria ([`~transformers.StoppingCriteriaList`]): All others that can end it.
        reflection_ids, refusal_ids (`list[int]`): The policy's texts, tokenised.
        separator_ids (`list[int]`): Comes between an answer's beginning and a refusal.
        max_context (`int`): Tokens that the target was made for; drafts and reflections stay within.
        max_positions (`int`): Tokens that it can read at all.
        seeds (`list[int]`): Of candidate sampling, per row.
        answer_seeds (`list[int]`): Of what the target samples, per row; none for a greedy call.
        pad_token_id (`int`, defaults to 0): What criteria see after the end of a row, in a batch.
        quality_ids (`list[int]`): The policy's quality prompt, tokenised; none where tokens are verified.
        digit_ids (`list[list[int]]`): Of each digit the tokens that spell it; none where tokens are verified.
        draft_monitor ([`RiskMonitor`], *optional*): Of the draft's own head, which sorts candidates and segments.
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
    max_positions: int = 2**31
    seeds: list[int]
    answer_seeds: list[int] = field(default_factory=list)
    pad_token_id: int = 0
    quality_ids: list[int] = field(default_factory=list)
    digit_ids: list[list[int]] = field(default_factory=list)
    draft_monitor: RiskMonitor | None = None

    @property
    def observes(self) -> bool:
        """Whether risks are only reported."""
        return self.policy.policy == "observe"

    @property
    def prompt_threshold(self) -> float:
        """A prompt is unsafe iff its risk is >= this; infinite where prompts are not scored."""
        return math.inf if self.monitor is None else find_prompt_threshold(self.policy, self.monitor.head)

    @property
    def screens_prompts(self) -> bool:
        """Whether prompts are scored."""
        return self.prompt_threshold < math.inf

    @property
    def safe_enough(self) -> float | None:
        """Up to which risk the likeliest candidate is taken instead of the safest, if at all."""
        policy = self.policy
        is_likeliest = policy.candidate_choice == "likeliest_safe"
        return self.risk_threshold * (1 - policy.safe_margin) if is_likeliest else None

    @property
    def harmless(self) -> float:
        """Up to which risk of all candidates without a reflection a flag counts as a false alarm."""
        return self.risk_threshold * (1 - (self.policy.false_alarm_margin or 0.0))

    def tests(self, row: Row) -> bool:
        """Whether a flag of this answer is put to the test: its first, where a reflection would follow."""
        is_wanted = self.policy.false_alarm_margin is not None and self.policy.num_candidates > 1
        return is_wanted and bool(self.reflection_ids) and not row.events


def check_context(rows: Sequence[Row], plan: Plan) -> None:
    """Raises for answers that the target has no positions for.

    An answer that may end before is begun; it ends with the last position.

    Raises:
        UnsupportedRequestError: If a prompt is longer than the target's context, or with `max_new_tokens` gets longer
            and nothing else can end its answer.
    """
    for row in rows:
        # the last token is written but not read
        needed = len(row.prompt) + (0 if plan.eos_ids or plan.criteria else row.max_new_tokens - 1)
        if needed > plan.max_positions:
            raise UnsupportedRequestError(
                f"The target has {plan.max_positions} positions, but prompt {row.index} with its answer takes "
                f"{needed}: {len(row.prompt)} tokens and up to {row.max_new_tokens} new ones. Shorten the prompt or "
                "lower `max_new_tokens`."
            )
