"""Recurrent states of a batch of rows, and the way back: copies from some of the lengths that each row has had.

A row can only go back to a length of which there is a copy, or to its beginning, so it may go back further than asked.
What it is short of is read again in the next forward, with what comes next. Before tokens that may be rejected there
is always a copy; of older ones few are kept, for rollbacks that go further.

Shapes: B rows, T positions of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .mixers import Mixers, Parts, Snapshot, begin_layer, reset_layer, snapshot

SPAN = 64
"""A rollback of at most so many tokens, such as a flag's, finds a copy at most as far before where it goes."""


class Block(NamedTuple):
    """What a forward reads.

    Attributes:
        lengths, sizes, num_drafts (`Sequence[int]`):
            For each row its tokens, those it reads, and how many of them, the last ones, may be rejected.
        width (`int`): Of the block.
        to_left (`bool`): Whether padding comes after a row's tokens, and not before them.
    """

    lengths: Sequence[int]
    sizes: Sequence[int]
    num_drafts: Sequence[int]
    width: int
    to_left: bool

    def starts(self) -> list[int]:
        """Where the tokens of each row begin."""
        return [0 if self.to_left else self.width - size for size in self.sizes]


class Copy(NamedTuple):
    """The states of a row after its first `length` tokens: row `row` of a snapshot, which others may share.

    One that is pinned is kept: what comes before it can't be read again.
    """

    length: int
    states: Snapshot
    row: int
    is_pinned: bool = False


def thin(copies: Sequence[Copy]) -> list[Copy]:
    """Of a row's copies, ascending, those that are worth their memory; at most four, and a pinned one.

    Example:

        >>> copies = [Copy(length, {}, 0) for length in (10, 20, 30, 90, 100, 110)]
        >>> [copy.length for copy in thin(copies)]
        [10, 30, 90, 110]
    """
    if not copies or copies[0].is_pinned:
        return [*copies[:1], *thin(copies[1:])] if copies else []
    is_old = [copy.length <= copies[-1].length - SPAN for copy in copies]
    places = {0, is_old.count(True) - 1, is_old.count(True), len(copies) - 1}
    return [copies[place] for place in sorted(places) if 0 <= place < len(copies)]


class RecurrentStates:
    """The recurrent states in a cache, after a length of each row.

    Args:
        mixers ([`Mixers`]): The model's.
        cache (`Any`): The cache.
        num_rows (`int`): Rows of the batch, all empty.
    """

    def __init__(self, mixers: Mixers, cache: Any, num_rows: int):
        self.mixers = mixers
        self.cache = cache
        self._copies: list[list[Copy]] = [[] for _ in range(num_rows)]
        # after how many tokens the states in the cache are; not known while a forward runs, nor after padding
        self._at: list[int | None] = [0] * num_rows

    @contextmanager
    def reading(self, block: Block) -> Iterator[None]:
        """Runs a forward inside, from where rows are, and takes the copies that a way back needs."""
        self._settle(block.lengths)
        wanted = self._plan(block)
        places = {place for place, _, _ in wanted}
        cuts = self._cuts(block, places)
        parts = Parts(self.cache, block.width, cuts, {place: {} for place in places})
        self._at = [None] * len(self._at)
        with self.mixers.reading(parts):
            yield
        for place, row, length in wanted:
            self._copies[row].append(Copy(length, parts.kept[place], row))
        ends = zip(block.lengths, block.sizes, block.starts(), strict=True)
        self._at = [length + size if start + size == block.width else None for length, size, start in ends]

    def _plan(self, block: Block) -> list[tuple[int, int, int]]:
        """Where in a block a copy is wanted, of which row, which then has so many tokens. Copies what it has now."""
        wanted: list[tuple[int, int, int]] = []
        before: Snapshot = {}
        is_first = not any(block.lengths)
        rows = zip(block.lengths, block.sizes, block.num_drafts, block.starts(), strict=True)
        for row, (length, size, num, start) in enumerate(rows):
            first, last = start + size - num, start + size
            if num > 0 and (is_first or size - num > 1):
                places = [first]
            else:  # one token is sooner read again than by itself
                places = []
                if not is_first and self._is_short(row, length, num):
                    before = before or snapshot(self.cache, self.mixers.keys)
                    self._copies[row].append(Copy(length, before, row))
            if not self.mixers.reads_blocks:
                places += range(max(first, 1), min(last, block.width - 1) + 1)
            elif last < block.width:
                places.append(last)
            wanted += [(place, row, length + place - start) for place in sorted({*places})]
        return wanted

    def _is_short(self, row: int, length: int, num_drafts: int) -> bool:
        """Whether a row needs a copy of what it has now."""
        have = self._copies[row][-1].length if self._copies[row] else -SPAN
        return have < length and (num_drafts > 0 or have <= length - SPAN)

    def _cuts(self, block: Block, places: set[int]) -> list[int]:
        """Where the block is cut: where copies are wanted, or after every token that has others before it."""
        if self.mixers.reads_blocks or not block.width > 1:
            return sorted(places)
        start = min(places, default=block.width) if not any(block.lengths) else 1
        return list(range(start, block.width))

    def pin(self, lengths: Sequence[int]) -> None:
        """Copies what the cache has, of rows of these lengths, for good."""
        states = snapshot(self.cache, self.mixers.keys)
        for row, length in enumerate(lengths):
            self._copies[row].append(Copy(length, states, row, is_pinned=True))

    def keep(self, lengths: Sequence[int], wanted: Sequence[int]) -> list[int]:
        """Takes rows back, each to the wanted length at most; returns the lengths that they have then."""
        kept = []
        for row, (length, want) in enumerate(zip(lengths, wanted, strict=True)):
            copies = self._copies[row]
            is_there = self._at[row] == min(length, want)
            most = min(length, want) if is_there else max((c.length for c in copies if c.length <= want), default=0)
            self._at[row] = most if is_there else None
            self._copies[row] = thin([copy for copy in copies if copy.length <= most])
            kept.append(most)
        return kept

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        self._copies, self._at = [list(self._copies[row]) for row in rows], [self._at[row] for row in rows]
        for key in self.mixers.keys:
            state = key.read(self.cache)
            if state is not None:
                key.write(self.cache, state[list(rows)])

    def fork(self, row: int, num_copies: int, lengths: Sequence[int], cache: Any) -> RecurrentStates:
        """Those of an empty cache, which gets so many copies of a row."""
        self._settle(lengths)
        fork = RecurrentStates(self.mixers, cache, num_copies)
        fork._copies, fork._at = [list(self._copies[row]) for _ in range(num_copies)], [lengths[row]] * num_copies
        for at in {key.layer for key in self.mixers.keys}:
            begin_layer(self.cache.layers[at], cache.layers[at])
        for key in self.mixers.keys:
            state = key.read(self.cache)
            if state is not None:
                key.write(cache, state[row : row + 1].repeat_interleave(num_copies, dim=0))
        return fork

    def replace(self, row: int, other: RecurrentStates, other_row: int) -> None:
        """A row becomes one of another batch."""
        self._copies[row], self._at[row] = list(other._copies[other_row]), other._at[other_row]
        states = {key: key.read(other.cache) for key in self.mixers.keys}
        # where nothing is left of any row, there is nothing to write to, either
        begun = {key.layer for key, state in states.items() if state is not None and key.read(self.cache) is None}
        for at in begun:
            begin_layer(other.cache.layers[at], self.cache.layers[at])
        for key, theirs in states.items():
            if theirs is None:
                continue
            if key.layer in begun:
                key.write(self.cache, theirs.new_zeros(len(self._at), *theirs.shape[1:]))
            mine = key.read(self.cache)
            assert mine is not None
            mine[row].copy_(theirs[other_row])

    def pretend(self, length: int) -> None:
        """Says of every row, of which something has been read, that it has so many tokens."""
        self._at, self._copies = [length] * len(self._at), [[] for _ in self._at]

    def go_back(self, lengths: Sequence[int]) -> None:
        """Puts the states of these lengths into the cache."""
        self._settle(lengths)

    def _settle(self, lengths: Sequence[int]) -> None:
        rows = [row for row, (at, length) in enumerate(zip(self._at, lengths, strict=True)) if at != length]
        if rows and not any(lengths):
            for layer in self.cache.layers:
                reset_layer(layer)
            rows = []
        for row in rows:
            copy = self._copies[row][-1] if lengths[row] else None
            assert copy is None or copy.length == lengths[row]
            for key in self.mixers.keys:
                state = key.read(self.cache)
                if state is not None:
                    state[row].copy_(copy.states[key][copy.row]) if copy else state[row].zero_()
        self._at = list(lengths)
