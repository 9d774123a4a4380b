"""The segments of one answer: lines, or so many tokens where no line ends before. What a rollback gives up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..config import SafeSpecConfig
from .characters import Piece, character_edges, find_pieces
from .pooling import find_newline_ids, segment_counts


class Boundaries(NamedTuple):
    """Which tokens of a vocabulary can end a line, and which are no whole characters."""

    newline_ids: frozenset[int]
    pieces: Mapping[int, Piece]


class Place(NamedTuple):
    """After a token: scored tokens in the open segment, and bytes of an unfinished character."""

    num_open: int
    num_missing: int


_BOUNDARIES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Boundaries]] = WeakKeyDictionary()


class Segments:
    """Where segments begin, for every token that an answer has; a rollback is an index.

    Args:
        policy ([`SafeSpecConfig`]): Segment lengths.
        newline_ids (`frozenset[int]`): Tokens that end a segment.
        pieces (`Mapping[int, Piece]`): Tokens that are no whole characters: no segment ends inside of one.

    Attributes:
        starts (`list[int]`): Index of the first token of every segment, ascending, from 0.
        counts (`list[int]`): For each token, how many scored tokens of its segment come before it.

    Example:

        >>> segments = Segments(SafeSpecConfig(max_segment_tokens=2))
        >>> for token in (11, 12, 13):
        ...     segments.append(token)
        >>> segments.starts, segments.counts, segments.num_open
        ([0, 2], [0, 1, 0], 1)
    """

    def __init__(
        self,
        policy: SafeSpecConfig,
        newline_ids: frozenset[int] = frozenset(),
        pieces: Mapping[int, Piece] | None = None,
    ):
        self.policy = policy
        self.newline_ids = newline_ids
        self.pieces = pieces or {}
        self.starts = [0]
        self.counts: list[int] = []
        self._num_open: list[int] = []  # scored tokens in the open segment, after each token
        self._num_missing: list[int] = []  # bytes of an unfinished character, after each token

    @property
    def num_open(self) -> int:
        """Scored tokens in the open segment."""
        return self._num_open[-1] if self._num_open else 0

    @property
    def index(self) -> int:
        """Which segment the next token belongs to, from 0."""
        return len(self.starts) - 1

    def closes_after(self, tokens: Sequence[int]) -> bool:
        """Whether the next tokens end a segment with their last one."""
        return self._look_ahead(tokens)[1] == 0

    def counts_ahead(self, tokens: Sequence[int]) -> list[int]:
        """For each of the next tokens, how many scored tokens of its segment come before it."""
        return self._look_ahead(tokens)[0]

    def is_whole(self, num: int) -> bool:
        """Whether the first so many tokens end with a whole character."""
        return num == 0 or self._num_missing[num - 1] == 0

    def append(self, token: int) -> None:
        """Adds a scored token."""
        index = len(self.counts)
        (count,), num_open, num_missing = self._look_ahead([token])
        if count == 0 and self.starts[-1] < index and self.num_open:
            self.starts.append(index)  # it was full before, but waited for a character to end
        self._add(count, num_open, num_missing)
        if num_open == 0:
            self.starts.append(index + 1)

    def insert(self) -> None:
        """Adds a token that is not scored, and so belongs to no segment."""
        self._add(0, self.num_open, 0)

    def truncate(self, kept: int) -> None:
        """Drops all tokens after the first `kept`."""
        del self.counts[kept:], self._num_open[kept:], self._num_missing[kept:]
        del self.starts[bisect_right(self.starts, kept) :]

    def _add(self, count: int, num_open: int, num_missing: int) -> None:
        self.counts.append(count)
        self._num_open.append(num_open)
        self._num_missing.append(num_missing)

    def step(self, token: int, after: Place | None = None) -> tuple[int, Place]:
        """How many scored tokens of its segment come before a token, and where that token leaves off.

        Args:
            token (`int`): The token.
            after ([`Place`], *optional*): Where a token before it left off. Default: it is the next one of the answer.
        """
        (count,), num_open, num_missing = self._look_ahead([token], after)
        return count, Place(num_open, num_missing)

    def _look_ahead(self, tokens: Sequence[int], after: Place | None = None) -> tuple[list[int], int, int]:
        last = Place(self.num_open, self._num_missing[-1] if self._num_missing else 0)
        (start, num_missing), policy = after or last, self.policy
        edges, missing = character_edges(num_missing, tokens, self.pieces)
        is_newline = [token in self.newline_ids for token in tokens]
        limits = (policy.min_segment_tokens, policy.max_segment_tokens)
        counts, num_open = segment_counts(start, is_newline, *limits, edges)
        return counts, num_open, missing[-1] if missing else num_missing


def find_boundaries(tokenizer: PreTrainedTokenizerBase) -> Boundaries:
    """The boundaries of a tokenizer's tokens, for which its whole vocabulary is decoded once."""
    num_tokens, found = _BOUNDARIES.get(tokenizer, (-1, None))
    if found is None or num_tokens != len(tokenizer):
        found = Boundaries(find_newline_ids(tokenizer), find_pieces(tokenizer))
        _BOUNDARIES[tokenizer] = len(tokenizer), found
    return found
