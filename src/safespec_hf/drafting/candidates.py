"""The drafters in the form that transformers takes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from ..answer.rows import Row
from ..config import SafeSpecConfig
from ..engine.evaluating import evaluating
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead
from .draft_length import DraftCosts
from .drafters import Proposal, num_common
from .router import DraftRouter


class SafeSpecCandidateGenerator(CandidateGenerator):
    """Our drafts wherever transformers takes a `CandidateGenerator`: of a smaller model, of prompt lookup, or of both.

    `input_ids` may be any continuation of what it drafted, go back behind it, or begin another prompt: what they have
    in common with the last ones is not read again. Drafts are chains: transformers verifies no trees.

    Args:
        assistant_model ([`~transformers.PreTrainedModel`], *optional*): The draft model, of the target's tokenizer.
        num_rows (`int`, defaults to 1): Rows of the batch.
        num_draft_tokens (`int`, defaults to 5): Drafts per round, >= 0.
        vocab_size (`int`, *optional*): The target's; drafts are limited to it. Default: the draft model's.
        max_matching_ngram_size (`int`, *optional*): Turns on prompt lookup, with n-grams of at most this size.
        logits_processor ([`~transformers.LogitsProcessorList`], *optional*): The target's.
        do_sample (`bool`, defaults to `False`): Sample drafts from the processed distribution instead of its argmax.
        costs ([`DraftCosts`], *optional*): Turns on draft lengths that adapt to how often drafts are accepted.
        takes_trees (`bool`, defaults to `False`): Without effect here.

    Raises:
        UnsupportedRequestError: For a [`DraftHead`], which needs states of the target that are not shown here.

    Example:

        >>> import torch
        >>> from safespec_hf import SafeSpecCandidateGenerator
        >>> lookup = SafeSpecCandidateGenerator(max_matching_ngram_size=2, num_draft_tokens=2)
        >>> lookup.get_candidates(torch.tensor([[7, 8, 9, 4, 7, 8]]))[0]
        tensor([[7, 8, 9, 4, 7, 8, 9, 4]])
    """

    def __init__(
        self,
        assistant_model: PreTrainedModel | None = None,
        *,
        num_rows: int = 1,
        num_draft_tokens: int = 5,
        vocab_size: int | None = None,
        max_matching_ngram_size: int | None = None,
        logits_processor: LogitsProcessorList | None = None,
        do_sample: bool = False,
        costs: DraftCosts | None = None,
        takes_trees: bool = False,
    ):
        if isinstance(assistant_model, DraftHead):
            raise UnsupportedRequestError(
                "A `SafeSpecCandidateGenerator` can't draft with a `DraftHead`, which reads hidden states of the "
                "target. Use `generate(..., safespec=True, assistant_model=draft)`, or a draft model here."
            )
        self.num_rows = num_rows
        self.num_draft_tokens = num_draft_tokens
        self.logits_processor = logits_processor
        self._router = DraftRouter(
            assistant_model,
            num_rows=num_rows,
            vocab_size=vocab_size,
            max_matching_ngram_size=max_matching_ngram_size,
            do_sample=do_sample,
            costs=costs,
        )
        self._last_ids: list[list[int]] = []

    @torch.no_grad()
    def get_candidates(self, input_ids: LongTensor, **kwargs: object) -> tuple[LongTensor, Any]:
        """transformers' `CandidateGenerator` contract.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_rows, sequence_length)`): Everything generated so far.

        Returns:
            `tuple`: Token ids of shape `(num_rows, sequence_length + num_drafts)`, and the log-probabilities
            that the drafts came from, of shape `(num_rows, num_drafts, vocab_size)`, or `None` if they were not
            sampled or there are none.

        Raises:
            UnsupportedRequestError: If there are more or fewer rows than it was made for.
        """
        if len(input_ids) != self.num_rows:
            raise UnsupportedRequestError(
                f"`input_ids` must have {self.num_rows} rows, but it has {len(input_ids)}. Pass `num_rows=` to "
                "`SafeSpecCandidateGenerator`."
            )
        rows = [self._as_row(index, ids) for index, ids in enumerate(input_ids)]
        if self._last_ids:
            pairs = zip(self._last_ids, rows, strict=True)
            self._router.keep([min(num_common(old, row.prompt), len(row.prompt) - 1) for old, row in pairs])
        # before drafting, so that a call that is broken off is known about as well
        self._last_ids = [row.prompt for row in rows]
        with evaluating(self._router.models):
            proposal = self._router.draft(rows, [self.num_draft_tokens] * len(rows))
        num = min(map(len, proposal.drafts))
        drafts = [tokens[:num] for tokens in proposal.drafts]
        self._last_ids = [row.prompt + tokens for row, tokens in zip(rows, drafts, strict=True)]
        new = input_ids.new_tensor(drafts).long().view(len(rows), num)
        return cast("LongTensor", torch.cat([input_ids, new], dim=1)), _log_probs(proposal, num)

    def _as_row(self, index: int, ids: Tensor) -> Row:
        is_real = torch.ones_like(ids, dtype=torch.bool)
        return Row(index, ids, is_real, max_new_tokens=0, policy=SafeSpecConfig(), processors=self.logits_processor)

    def update_candidate_strategy(self, input_ids: LongTensor, scores: Tensor, num_matches: int) -> None:
        """transformers' `CandidateGenerator` contract. Learns from what was accepted.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, sequence_length)`): Everything generated so far.
            scores (`torch.FloatTensor` of shape `(1, num_drafts + 1, vocab_size)`): The target's. Not used.
            num_matches (`int`): Drafts that were accepted.
        """
        self._router.record([range(num_matches)])


def _log_probs(proposal: Proposal, num: int) -> Tensor | None:
    """Of each row's first `num` drafts, which in the proposal end at the same column."""
    if proposal.probs_BGV is None or num == 0:
        return None
    most = proposal.probs_BGV.shape[1]
    starts = [most - len(tokens) for tokens in proposal.drafts]
    rows = zip(proposal.probs_BGV, starts, strict=True)
    return torch.stack([probs_GV[start : start + num] for probs_GV, start in rows]).log()
