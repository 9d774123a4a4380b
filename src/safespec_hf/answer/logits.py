"""Logits processors: applying the caller's row by row, and the one of Safety Mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import FloatTensor, LongTensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as known

from .rows import Row

_OF_SCORES_ONLY = {
    known.EpsilonLogitsWarper,
    known.EtaLogitsWarper,
    known.InfNanRemoveLogitsProcessor,
    known.LogitNormalization,
    known.MinPLogitsWarper,
    known.TemperatureLogitsWarper,
    known.TopKLogitsWarper,
    known.TopPLogitsWarper,
    known.TypicalLogitsWarper,
}


def are_of_scores_only(processors: LogitsProcessorList) -> bool:
    """Whether processors look at no token of the context: then one call serves any number of positions.

    Known classes only: one that somebody derived may look at more.

    Example:

        >>> from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper
        >>> are_of_scores_only(LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)]))
        True
    """
    return all(type(processor) in _OF_SCORES_ONLY for processor in processors)


def split_processors(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """Processors in two parts: up to the last one that may look at the context, and those after it.

    What comes last in plain `generate`, warpers, is in the second part: one call serves all rows and positions.

    Example:

        >>> from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper
        >>> both = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2), TopKLogitsWarper(50)])
        >>> parts = split_processors(both)
        >>> [len(part) for part in parts]
        [1, 1]
    """
    places = (at for at in range(len(processors), 0, -1) if type(processors[at - 1]) not in _OF_SCORES_ONLY)
    num = next(places, 0)
    return LogitsProcessorList(processors[:num]), LogitsProcessorList(processors[num:])


class SafeSpecLogitsProcessor(LogitsProcessor):
    """Steers sampling away from the first tokens of continuations that were already found unsafe at a position.

    Pure: the result depends on its arguments only, so lengths can be revisited.

    Args:
        position (`int`): Length of `input_ids` at which it acts: the point that was rolled back to.
        flagged_token_ids (`Iterable[int]`): First tokens of the continuations found unsafe there.
        penalty (`float`, defaults to 3.0): Taken off their scores, in nats, >= 0; `inf` bans them.

    Raises:
        ValueError: If the penalty is negative.

    Example:

        >>> import torch
        >>> from safespec_hf import SafeSpecLogitsProcessor
        >>> steer = SafeSpecLogitsProcessor(2, [0], penalty=1.5)
        >>> steer(torch.tensor([[5, 6]]), torch.zeros(1, 3))
        tensor([[-1.5000,  0.0000,  0.0000]])
        >>> steer(torch.tensor([[5, 6, 7]]), torch.zeros(1, 3))
        tensor([[0., 0., 0.]])
    """

    def __init__(self, position: int, flagged_token_ids: Iterable[int], penalty: float = 3.0):
        if not penalty >= 0:
            raise ValueError(f"`penalty` must be >= 0, but it is {penalty}.")
        self.position = position
        self.flagged_token_ids = sorted(set(flagged_token_ids))
        self.penalty = penalty

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        if input_ids.shape[-1] != self.position or not self.flagged_token_ids:
            return scores
        return cast("FloatTensor", penalize(scores, self.flagged_token_ids, self.penalty))


def penalize(scores_KV: torch.Tensor, token_ids: Sequence[int], penalty: float = torch.inf) -> torch.Tensor:
    """Takes a penalty off the scores of tokens, but for rows where that would leave no token possible.

    Args:
        scores_KV (`torch.FloatTensor` of shape `(K, V)`): Scores.
        token_ids (`Sequence[int]`): The tokens; those without a score, as some end tokens are, are passed over.
        penalty (`float`, defaults to `inf`): In nats, >= 0; `inf` bans them.

    Example:

        >>> import torch
        >>> penalize(torch.zeros(1, 3), [0], 1.5)
        tensor([[-1.5000,  0.0000,  0.0000]])
    """
    penalized_KV = scores_KV.clone()
    scored = [token for token in token_ids if token < scores_KV.shape[1]]
    ids = torch.tensor(scored, dtype=torch.long, device=scores_KV.device)
    penalized_KV[:, ids] = -torch.inf if penalty == torch.inf else penalized_KV[:, ids] - penalty
    # with a ban, a caller's processors may have left nothing else
    is_possible_K1 = (penalized_KV > -torch.inf).any(dim=-1, keepdim=True)
    return torch.where(is_possible_K1, penalized_KV, scores_KV)


def process_rows(rows: Sequence[Row], ids: Sequence[torch.Tensor], scores_BV: torch.Tensor) -> torch.Tensor:
    """Applies each row's own logits processors, up to those that all rows share.

    Args:
        rows (`Sequence[Row]`): The rows.
        ids (`Sequence[torch.LongTensor]` of shape `(1, length)`): What the processors of each see.
        scores_BV (`torch.Tensor` of shape `(B, V)`): Raw logits.

    Returns:
        `torch.FloatTensor` of shape `(B, V)`: Scores, float32 as in plain `generate`.
    """
    scores_BV = scores_BV.to(torch.float32, copy=True)
    return torch.cat(
        [
            split_processors(row.processors)[0](cast("LongTensor", ids_1L), cast("FloatTensor", scores_V[None]))
            for row, ids_1L, scores_V in zip(rows, ids, scores_BV, strict=True)
        ]
    )
