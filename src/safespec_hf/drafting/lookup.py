"""Drafts without a model: what followed the same tokens earlier in the context."""

from __future__ import annotations

from collections.abc import Sequence

from ..answer.rows import Row
from .draft_length import DraftLength, match_kind
from .drafters import Proposal, worthwhile
from .ngrams import NgramSearch


class LookupDrafter:
    """Drafts what followed the same n-gram earlier in the row.

    Args:
        max_size (`int`): Longest n-gram, >= 1.
        num_rows (`int`): Rows of the batch.
        length ([`DraftLength`]): How many drafts pay.
    """

    def __init__(self, max_size: int, num_rows: int, length: DraftLength):
        self.length = length
        self._searches = [NgramSearch(max_size) for _ in range(num_rows)]

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row."""
        drafts, kinds = [], []
        for row, search, most in zip(rows, self._searches, num_tokens, strict=True):
            tokens, size = search.continuation(row.prompt, row.tokens, most)
            drafts.append(tokens)
            # tokens that go on with a match match ever more
            kinds.append([match_kind(size + index) for index in range(len(tokens))])
        return worthwhile(self.length, drafts, kinds)

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""
        for search, length in zip(self._searches, lengths, strict=True):
            search.keep(length)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows."""
        self._searches = [self._searches[row] for row in rows]
