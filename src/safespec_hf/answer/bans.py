"""Tokens that an answer is kept off after a recovery: the one that was flagged in error, and those of a loop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..engine.token_tree import path_to
from .logits import penalize
from .rows import Row

NUM_TIMES, MIN_TOKENS = 3, 12
NUM_LOOKED_AT = 24 * NUM_TIMES
"""At the end of an answer: so a passage is 24 tokens long at most."""


def looping_tokens(tokens: Sequence[int]) -> list[int]:
    """Tokens that would go on with a passage that has just come three times in a row, over 12 tokens or more.

    Args:
        tokens (`Sequence[int]`): Of an answer; only the last `NUM_LOOKED_AT` are looked at.

    Example:

        >>> looping_tokens([7, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]), looping_tokens([5] * 11), looping_tokens([5] * 12)
        ([1], [], [5])
    """
    last = list(tokens[-NUM_LOOKED_AT:])
    found = set()
    for period in range(1, len(last) // NUM_TIMES + 1):
        num = max(period * NUM_TIMES, MIN_TOKENS)
        if num <= len(last) and last[-num + period :] == last[-num:-period]:
            found.add(last[-period])
    return sorted(found)


def may_loop(row: Row) -> bool:
    """Whether loops are stopped in this answer: once a recovery has changed it."""
    return row.policy.break_loops and row.num_recoveries > 0


def banned_after(row: Row, path: Sequence[int]) -> list[int]:
    """Tokens that may not follow a row and some drafts."""
    loops = looping_tokens([*row.tokens[-NUM_LOOKED_AT:], *path]) if may_loop(row) else []
    return [*loops, *row.banned.get(len(row.tokens) + len(path), ())]


def keep_off(
    rows: Sequence[Row], drafts: Sequence[Sequence[int]], trees: Sequence[Sequence[int]], scores_BTV: Tensor
) -> Tensor:
    """Scores without the tokens that recovered answers are kept off: those flagged in error, and those of a loop.

    Args:
        rows (`Sequence[Row]`): The rows.
        drafts, trees (`Sequence[Sequence[int]]`): Of each row its drafts, and their parents.
        scores_BTV (`torch.FloatTensor` of shape `(B, T, V)`): After the context and each draft, aligned to the right.

    Returns:
        `torch.FloatTensor` of shape `(B, T, V)`: The scores. A token stays where nothing else is possible.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        # of most answers there is nothing to look at, in no round
        for draft in range(-1, len(drafts[index])) if row.banned or may_loop(row) else ():
            path = [drafts[index][step] for step in path_to(draft, trees[index])]
            if token_ids := banned_after(row, path):
                found[index, scores_BTV.shape[1] - len(drafts[index]) + draft] = token_ids
    if found:
        scores_BTV = scores_BTV.clone()
        for (index, place), token_ids in found.items():
            scores_BTV[index, place] = penalize(scores_BTV[index, place, None], token_ids)[0]
    return scores_BTV
