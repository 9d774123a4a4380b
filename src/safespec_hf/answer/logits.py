"""Logits processors: applying the caller's row by row, and the one of Safety Mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import FloatTensor, LongTensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as known

from ..engine.token_tree import path_to
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
        token_ids (`Sequence[int]`): The tokens; those without a score, as some end tokens are (-1), are passed over.
        penalty (`float`, defaults to `inf`): In nats, >= 0; `inf` bans them.

    Example:

        >>> import torch
        >>> penalize(torch.zeros(1, 3), [0], 1.5)
        tensor([[-1.5000,  0.0000,  0.0000]])
    """
    penalized_KV = scores_KV.clone()
    scored = [token for token in token_ids if 0 <= token < scores_KV.shape[1]]
    ids = torch.tensor(scored, dtype=torch.long, device=scores_KV.device)
    penalized_KV[:, ids] = -torch.inf if penalty == torch.inf else penalized_KV[:, ids] - penalty
    # with a ban, a caller's processors may have left nothing else
    is_possible_K1 = (penalized_KV > -torch.inf).any(dim=-1, keepdim=True)
    return torch.where(is_possible_K1, penalized_KV, scores_KV)


def process_guesses(rows: Sequence[Row], ids: Sequence[torch.Tensor], scores_BV: torch.Tensor) -> torch.Tensor:
    """Applies each row's own logits processors, up to those that all rows share, to what a draft says of a next token.

    A draft may have gone where the target never will, so what processors raise there is no error: a guess goes without
    them. What they raise at a text of the target's, they raise again when that is read.

    Args:
        rows (`Sequence[Row]`): The rows.
        ids (`Sequence[torch.LongTensor]` of shape `(1, length)`): What the processors of each see.
        scores_BV (`torch.Tensor` of shape `(B, V)`): Raw logits.

    Returns:
        `torch.FloatTensor` of shape `(B, V)`: Scores, float32 as in plain `generate`.
    """
    processed = []
    for row, ids_1L, scores_1V in zip(rows, ids, scores_BV.float().split(1), strict=True):
        try:
            processed.append(_of_context(row, ids_1L, scores_1V))
        except (MemoryError, torch.OutOfMemoryError):  # no matter of the text
            raise
        except Exception:  # noqa: BLE001 - code of the caller's, at a text that it need not know
            processed.append(scores_1V)
    return torch.cat(processed)


def process_drafts(
    row: Row, ids: Sequence[torch.Tensor], drafts: Sequence[int], parents: Sequence[int], scores_TV: torch.Tensor
) -> torch.Tensor:
    """Applies a row's own logits processors, up to those that all rows share, before its drafts and after each.

    Drafts that can't stand, because the processors leave their token no chance, are passed over, with all that follows
    them: plain decoding never comes there, and a grammar may know nothing of such a text. On an accelerator the host
    would have to wait for every draft to see that, so there it looks only if a processor raises.

    Args:
        row (`Row`): The row.
        ids (`Sequence[torch.LongTensor]` of shape `(1, length)`): What they see before the drafts, and after each.
        drafts, parents (`Sequence[int]`): The tree.
        scores_TV (`torch.FloatTensor` of shape `(T, V)`): Raw logits: first those before the drafts.

    Returns:
        `torch.FloatTensor` of shape `(T, V)`: Scores, and raw logits where processors were not asked.
    """
    processed: list[torch.Tensor] = []

    def is_lost(draft: int) -> bool:
        return _is_impossible(processed[parents[draft] + 1], drafts[draft])

    looks, lost = looks_ahead(scores_TV), set[int]()
    for draft, (ids_1L, scores_1V) in enumerate(zip(ids, scores_TV.split(1), strict=True), start=-1):
        if draft >= 0 and (parents[draft] in lost or (looks and is_lost(draft))):
            lost.add(draft)
            processed.append(scores_1V)
            continue
        try:
            processed.append(_of_context(row, ids_1L, scores_1V))
        except Exception:
            if not any(map(is_lost, path_to(draft, parents))):
                raise
            lost.add(draft)
            processed.append(scores_1V)
    return torch.cat(processed)


def looks_ahead(scores_TV: torch.Tensor) -> bool:
    """Whether scores can be looked at without waiting for a device."""
    return scores_TV.device.type == "cpu"


def _of_context(row: Row, ids_1L: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
    scores = scores_1V.clone()  # a processor may write in place
    return split_processors(row.processors)[0](cast("LongTensor", ids_1L), cast("FloatTensor", scores))


def _is_impossible(scores_1V: torch.Tensor, token: int) -> bool:
    """Whether a token is left no chance, by -inf or the least finite number, and another one is."""
    if token >= scores_1V.shape[1]:
        return True
    least = torch.finfo(scores_1V.dtype).min
    return bool(scores_1V[0, token] <= least) and bool((scores_1V > least).any())
