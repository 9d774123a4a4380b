"""Searches of a growing context for what followed the tokens that it ends with. Pure.

Nothing is indexed: to compare every token of a long prompt with the last one takes some microseconds, and leaves few
places to look at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class NgramSearch:
    """Finds where the n-gram that a growing context ends with occurred before.

    It keeps the context as an array, of 8 bytes a token at most.

    Args:
        max_size (`int`): Longest n-gram, >= 1.

    Example:

        >>> NgramSearch(2).continuation([7, 8, 9, 4], [7, 8], num_tokens=2)
        ([9, 4], 2)
    """

    def __init__(self, max_size: int):
        self.max_size = max_size
        self._tokens = np.empty(0, np.int32)
        self._length = 0

    def keep(self, length: int) -> None:
        """Forgets what reaches beyond the first `length` context tokens."""
        self._length = min(self._length, length)

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int], num_tokens: int) -> tuple[list[int], int]:
        """What followed the last earlier occurrence of the longest n-gram that the context ends with.

        Args:
            prompt, tokens (`Sequence[int]`): The context, in two parts.
            num_tokens (`int`): At most so many.

        Returns:
            `tuple[list[int], int]`: The continuation, and the size of the n-gram; empty and 0 if there is none.
        """
        context = self._read(prompt, tokens)
        if not len(context):
            return [], 0
        # where a continuation begins; an n-gram that ends with the context has none yet
        starts, size = np.flatnonzero(context[:-1] == context[-1]) + 1, 1
        if not len(starts):
            return [], 0
        while size < self.max_size:
            longer = starts[starts > size]
            longer = longer[context[longer - size - 1] == context[-size - 1]] if len(longer) else longer
            if not len(longer):
                break
            starts, size = longer, size + 1
        return context[starts[-1] : starts[-1] + num_tokens].tolist(), size

    def _read(self, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.int32]:
        """The context, of which only what is new is copied."""
        total, known = len(prompt) + len(tokens), self._length
        if total > len(self._tokens):
            grown = np.empty(max(total, 2 * known), np.int32)
            grown[:known] = self._tokens[:known]
            self._tokens = grown
        if known < len(prompt):
            self._tokens[known : len(prompt)] = prompt[known:]
            known = len(prompt)
        self._tokens[known:total] = tokens[known - len(prompt) :]
        self._length = total
        return self._tokens[:total]
