"""Which drafted tokens stand, and what follows them. Pure: no model, no cache.

Shapes: B rows, G drafts at most, V vocabulary. Rows with fewer drafts are aligned to the right, so that position G is
always the one after a row's last draft. p = target, q = draft, after the same logits processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NO_TOKEN = -1
"""Stands where a token was to be drawn and none could be."""


class Verification(NamedTuple):
    """Outcome of a round, per row.

    Attributes:
        num_accepted_B (`torch.LongTensor` of shape `(B,)`): Drafts that stand, from a row's first one on.
        next_token_B (`torch.LongTensor` of shape `(B,)`): The target's own token after them; -1 where there is none.
    """

    num_accepted_B: Tensor
    next_token_B: Tensor


def verify_sampled(
    scores_BTV: Tensor,
    drafts_BG: Tensor,
    num_drafts_B: Tensor,
    draft_probs_BGV: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Verification:
    """Exact speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): tokens are distributed as p.

    Args:
        scores_BTV (`torch.FloatTensor` of shape `(B, G + 1, V)`): The target's processed scores.
        drafts_BG (`torch.LongTensor` of shape `(B, G)`): Drafts, right-aligned.
        num_drafts_B (`torch.LongTensor` of shape `(B,)`): How many of them each row has.
        draft_probs_BGV (`torch.FloatTensor` of shape `(B, G, V)`, *optional*):
            The distributions the drafts were really sampled from. `None` for a draft that does not sample: q is 1 at
            the draft.
        generator (`torch.Generator`, *optional*): Of the scores' device.
    """
    p_BTV = scores_BTV.softmax(dim=-1)
    if draft_probs_BGV is None:
        draft_probs_BGV = torch.zeros_like(p_BTV[:, :-1]).scatter_(2, drafts_BG[..., None], 1.0)
    p_of_draft_BG = p_BTV[:, :-1].gather(2, drafts_BG[..., None])[..., 0]
    q_of_draft_BG = draft_probs_BGV.gather(2, drafts_BG[..., None])[..., 0]
    chance_BG = torch.rand(drafts_BG.shape, dtype=p_BTV.dtype, device=p_BTV.device, generator=generator)
    stands_BG = chance_BG * q_of_draft_BG < p_of_draft_BG
    position_B, num_accepted_B = _first_rejection(stands_BG, num_drafts_B)
    p_BV = _at(p_BTV, position_B)
    # past the last draft q is nothing, and the residual is p itself
    q_BV = _at(torch.nn.functional.pad(draft_probs_BGV, (0, 0, 0, 1)), position_B)
    residual_BV = (p_BV - q_BV).clamp(min=0)
    # where p and q agree up to rounding a draft is all but surely accepted; p is then the residual's limit
    is_empty_B1 = residual_BV.sum(dim=-1, keepdim=True) <= torch.finfo(residual_BV.dtype).tiny
    weights_BV = torch.where(is_empty_B1, p_BV, residual_BV)
    drawn_B = torch.multinomial(weights_BV.nan_to_num(nan=1.0), 1, generator=generator)[:, 0]
    return Verification(num_accepted_B, drawn_B.masked_fill(weights_BV.isnan().any(dim=-1), NO_TOKEN))


def mean_log_prob(logits_TV: Tensor, tokens: Sequence[int]) -> Tensor:
    """Mean log-probability of a block's last tokens, in nats; a number on the device of the logits.

    Args:
        logits_TV (`torch.Tensor` of shape `(T, V)`): Logits of the block's last positions, more of them than tokens.
        tokens (`Sequence[int]`): The block's last tokens.

    Example:

        >>> import torch
        >>> round(float(mean_log_prob(torch.zeros(3, 4), [1, 2])), 4)
        -1.3863
    """
    log_probs_TV = logits_TV[-1 - len(tokens) : -1].float().log_softmax(dim=-1)
    index = torch.tensor(list(tokens), dtype=torch.long, device=log_probs_TV.device)[:, None]
    return log_probs_TV.gather(1, index).mean()


def _first_rejection(stands_BG: Tensor, num_drafts_B: Tensor) -> tuple[Tensor, Tensor]:
    """Position of the first draft that does not stand (G if all do), and the number of drafts before it."""
    num_positions = stands_BG.shape[1]
    num_padding_B = num_positions - num_drafts_B
    is_padding_BG = torch.arange(num_positions, device=stands_BG.device) < num_padding_B[:, None]
    position_B = (stands_BG | is_padding_BG).long().cumprod(dim=1).sum(dim=1)
    return position_B, position_B - num_padding_B


def _at(values_BTV: Tensor, position_B: Tensor) -> Tensor:
    return values_BTV[torch.arange(values_BTV.shape[0], device=values_BTV.device), position_B]
