"""An index of a growing context: what followed the same tokens earlier in it. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """Where each n-gram of a growing context occurred, so that a lookup does not read the context again.

    Args:
        max_size (`int`): Longest n-gram, >= 1.

    Example:

        >>> NgramIndex(2).continuation([7, 8, 9, 4], [7, 8], num_tokens=2)
        ([9, 4], 2)
    """

    def __init__(self, max_size: int):
        self.max_size = max_size
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._ngrams_at: list[list[tuple[int, ...]]] = [[]]  # by where they end, to take them back

    def keep(self, length: int) -> None:
        """Forgets what reaches beyond the first `length` context tokens."""
        while len(self._ngrams_at) > length + 1:
            for ngram in self._ngrams_at.pop():
                self._ends[ngram].pop()

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int], num_tokens: int) -> tuple[list[int], int]:
        """What followed the last earlier occurrence of the longest n-gram that the context ends with.

        Args:
            prompt, tokens (`Sequence[int]`): The context, in two parts.
            num_tokens (`int`): At most so many.

        Returns:
            `tuple[list[int], int]`: The continuation, and the size of the n-gram; empty and 0 if there is none.
        """
        total, split = len(prompt) + len(tokens), len(prompt)

        def part(start: int, end: int) -> list[int]:
            return [*prompt[start : min(end, split)], *tokens[max(start - split, 0) : max(end - split, 0)]]

        # an n-gram that ends with the context has no continuation yet, so the last token is not indexed
        for end in range(len(self._ngrams_at), total):
            self._ngrams_at.append([tuple(part(end - size, end)) for size in range(1, min(self.max_size, end) + 1)])
            for ngram in self._ngrams_at[-1]:
                self._ends.setdefault(ngram, []).append(end)
        for size in range(min(self.max_size, total - 1), 0, -1):
            if ends := self._ends.get(tuple(part(total - size, total))):
                return part(ends[-1], ends[-1] + num_tokens), size
        return [], 0
