"""Which column of a KV cache holds which token of which row. Pure: numpy and lists, no model.

A row's tokens lie in order in the columns, but not every column holds a token of every row: rows are padded on the
left, shorter blocks are padded, and rejected tokens leave holes. Trailing columns that no row uses are dropped, so a
single row never has a hole.

Shapes: B rows, T positions of a block, L columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .token_tree import path_to

# Holes cost attention time. Gathering the cache costs about one copy of it, so do it when a quarter is wasted.
MAX_HOLE_FRACTION = 0.25
MIN_HOLES = 64


class Columns:
    """The columns of a batch of rows that grow at different speeds.

    Args:
        num_rows (`int`): Rows of the batch, all empty.

    Attributes:
        lengths (`list[int]`): Tokens of each row.
        num (`int`): Columns.

    Example:

        >>> import numpy as np
        >>> columns = Columns(2)
        >>> columns.extend(np.array([[True, True], [False, True]])).tolist()
        [[0, 1], [0, 0]]
        >>> columns.keep([1, 1])
        0
        >>> columns.used_BL.tolist()
        [[True, False], [False, True]]
    """

    def __init__(self, num_rows: int):
        self.lengths = [0] * num_rows
        self.num = 0
        # nothing where every column holds a token of every row: by far the most common case, and draft steps are short
        self._used_BL: np.ndarray | None = None

    @classmethod
    def filled(cls, num_rows: int, length: int) -> Columns:
        """Rows of one length, without holes."""
        columns = cls(num_rows)
        columns.lengths, columns.num = [length] * num_rows, length
        return columns

    @property
    def is_full(self) -> bool:
        """Whether every column holds a token of every row."""
        return self._used_BL is None

    @property
    def used_BL(self) -> np.ndarray:
        """Whether a column holds a token of a row, of shape `(B, L)`."""
        return np.ones((len(self.lengths), self.num), dtype=bool) if self._used_BL is None else self._used_BL

    def of(self, row: int) -> np.ndarray:
        """The columns of a row's tokens."""
        return np.arange(self.num) if self._used_BL is None else np.flatnonzero(self._used_BL[row])

    def extend(self, added_BT: np.ndarray | tuple[int, int]) -> np.ndarray:
        """Adds columns.

        Args:
            added_BT (`np.ndarray` of shape `(B, T)` or `tuple[int, int]`):
                Which of them hold a token of a row; a shape where all do.

        Returns:
            `np.ndarray` of shape `(B, T)`: The positions of the tokens.
        """
        if isinstance(added_BT, tuple):
            if self._used_BL is None:
                start, self.num = self.num, self.num + added_BT[1]
                self.lengths = [self.num] * len(self.lengths)
                return np.arange(start, self.num)[None].repeat(len(self.lengths), axis=0)
            added_BT = np.ones(added_BT, dtype=bool)
        positions_BT = np.maximum(np.array(self.lengths)[:, None] + added_BT.cumsum(axis=1) - 1, 0)
        self.lengths = [length + int(new) for length, new in zip(self.lengths, added_BT.sum(axis=1), strict=True)]
        self._set(np.concatenate([self.used_BL, added_BT], axis=1))
        return positions_BT

    def extend_apart(self, added_BT: np.ndarray | tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Adds columns, other ones for each row: rows that share a row of the cache lie there one after the other.

        Args:
            added_BT (`np.ndarray` of shape `(B, T)` or `tuple[int, int]`): As [`Columns.extend`] takes it.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: The positions of the tokens, of shape `(B, T)`, and what each of them
            sees, of shape `(B * T, L)`.

        Example:

            >>> columns = Columns.filled(2, 1)
            >>> columns.extend_apart((2, 1))[1].astype(int).tolist()
            [[1, 1, 0], [1, 0, 1]]
        """
        added_BT = np.ones(added_BT, dtype=bool) if isinstance(added_BT, tuple) else added_BT
        (num_rows, width), lengths = added_BT.shape, np.array(self.lengths)[:, None]
        apart_BBT = np.zeros((num_rows, num_rows, width), dtype=bool)
        apart_BBT[np.arange(num_rows), np.arange(num_rows)] = added_BT
        self.extend(apart_BBT.reshape(num_rows, -1))
        num_new = num_rows * width
        sees_NL = np.tril(self.used_BL.repeat(width, axis=0), self.num - num_new)
        # padding sees itself: with nothing to see it would become nan
        sees_NL |= np.eye(num_new, self.num, self.num - num_new, dtype=bool)
        return np.maximum(lengths + added_BT.cumsum(axis=1) - 1, 0), sees_NL

    def tree_mask(self, parents: Sequence[Sequence[int]], positions_BT: np.ndarray) -> np.ndarray:
        """What each token of the newest columns sees, of shape `(B, T, L)`; moves the positions of trees, in place.

        Args:
            parents (`Sequence[Sequence[int]]`): For each row, the parents of its last tokens, which are a tree.
            positions_BT (`np.ndarray` of shape `(B, T)`): Of the newest columns.
        """
        width = positions_BT.shape[1]
        causal_TL = np.tril(np.ones((width, self.num), dtype=bool), self.num - width)
        mask_BTL = causal_TL & self.used_BL[:, None]
        for row, tree in enumerate(parents):
            first, last = width - len(tree), self.lengths[row] - len(tree) - 1
            for draft in range(len(tree)):
                path = path_to(draft, tree)
                positions_BT[row, first + draft] = last + len(path)
                mask_BTL[row, first + draft, self.num - len(tree) :] = False
                mask_BTL[row, first + draft, self.num - len(tree) + np.array(path)] = True
        # a column of padding sees itself: with nothing to see it would become nan, and spread
        mask_BTL |= np.eye(width, self.num, self.num - width, dtype=bool)
        return mask_BTL

    def keep_path(self, row: int, num_drafts: int, path: Sequence[int]) -> tuple[list[int], list[int]] | None:
        """Of a row's last tokens, a tree, keeps those of a path.

        Returns:
            `tuple[list[int], list[int]]`, *optional*: Columns whose states have to be moved, and where to: a single
            row stays without holes.
        """
        columns = self.of(row)[-num_drafts:].tolist()
        kept, first = [columns[draft] for draft in path], columns[: len(path)]
        used_BL, is_single = self.used_BL, len(self.lengths) == 1
        used_BL[row, columns] = False
        used_BL[row, first if is_single else kept] = True
        self.lengths[row] -= num_drafts - len(path)
        self._used_BL = used_BL
        return (kept, first) if is_single and kept != first else None

    def keep(self, lengths: Sequence[int]) -> int:
        """Rolls every row back to its first `lengths[row]` tokens; a row that has fewer stays as it is.

        Returns:
            `int`: Trailing columns that no row uses any more, and which are dropped.
        """
        before = self.num
        kept = [min(have, want) for have, want in zip(self.lengths, lengths, strict=True)]
        if self._used_BL is None and min(kept) == max(kept):
            self.lengths, self.num = kept, kept[0]
            return before - self.num
        used_BL = self.used_BL
        for row, (have, want) in enumerate(zip(self.lengths, kept, strict=True)):
            if want < have:
                used_BL[row, np.flatnonzero(used_BL[row])[want:]] = False
        self.lengths = kept
        used = np.flatnonzero(used_BL.any(axis=0))
        self._set(used_BL[:, : int(used[-1]) + 1 if used.size else 0])
        return before - self.num

    def select(self, rows: Sequence[int]) -> int:
        """Keeps only these rows, in this order; returns how many trailing columns are dropped."""
        self.lengths = [self.lengths[row] for row in rows]
        if self._used_BL is not None:
            self._set(self._used_BL[list(rows)])
        return self.keep(self.lengths)

    def put(self, row: int, length: int) -> int:
        """Lays a row anew, at the right end, and adds columns on the left where that takes some.

        Returns:
            `int`: How many were added.
        """
        added = max(length - self.num, 0)
        used_BL = np.pad(self.used_BL, ((0, 0), (added, 0)))
        used_BL[row] = np.arange(used_BL.shape[1]) >= used_BL.shape[1] - length
        self.lengths[row] = length
        self._set(used_BL)
        return added

    def close(self, num_new: int, max_columns: int, has_windows: bool) -> np.ndarray | None:
        """Closes the holes when they cost more than closing them, or would be in the way.

        Args:
            num_new (`int`): Columns that are going to be added.
            max_columns (`int`): The most there may be.
            has_windows (`bool`): Whether a hole inside of a row would be counted into a sliding window.

        Returns:
            `np.ndarray` of shape `(B, L)`, *optional*: The columns to gather.
        """
        if self._used_BL is None:
            return None
        longest = max(self.lengths)
        # a row that is padded on the left only has no hole
        has_holes = has_windows and bool((np.diff(self._used_BL.astype(np.int8), axis=1) < 0).any())
        limit = min(max(MIN_HOLES, MAX_HOLE_FRACTION * self.num), max_columns - num_new - longest)
        if self.num - longest <= max(limit, 0) and not has_holes:
            return None
        columns_BL = np.zeros((len(self.lengths), longest), dtype=np.int64)
        for row, length in enumerate(self.lengths):
            columns_BL[row, longest - length :] = self.of(row)
        self._set(np.arange(longest) >= longest - np.array(self.lengths)[:, None])
        return columns_BL

    def _set(self, used_BL: np.ndarray) -> None:
        self.num = used_BL.shape[1]
        self._used_BL = None if used_BL.all() else used_BL


def align_blocks(blocks: Sequence[Sequence[int]], to_left: bool) -> tuple[np.ndarray, np.ndarray | tuple[int, int]]:
    """Blocks of different lengths as one array.

    Args:
        blocks (`Sequence[Sequence[int]]`): The tokens of each row, at least one.
        to_left (`bool`): Pads on the right instead of on the left.

    Returns:
        `tuple`: Token ids of shape `(B, T)`, and which of them are tokens, as [`Columns.extend`] takes it.

    Example:

        >>> ids_BT, added_BT = align_blocks([[7, 8], [9]], to_left=False)
        >>> ids_BT.tolist(), added_BT.tolist()
        ([[7, 8], [0, 9]], [[True, True], [False, True]])
    """
    width = max(map(len, blocks))
    assert all(blocks), "every row needs a token to forward"
    if all(len(block) == width for block in blocks):
        return np.array(blocks, dtype=np.int64), (len(blocks), width)
    ids, added = np.zeros((len(blocks), width), dtype=np.int64), np.zeros((len(blocks), width), dtype=bool)
    for row, block in enumerate(blocks):
        start = 0 if to_left else width - len(block)
        ids[row, start : start + len(block)] = block
        added[row, start : start + len(block)] = True
    return ids, added


def right_ends(added_BT: np.ndarray) -> np.ndarray:
    """For blocks that are padded on the right, the position to read in the place of each to have them on the left."""
    width = added_BT.shape[1]
    ends: np.ndarray = np.maximum(np.arange(width) - (width - added_BT.sum(axis=1))[:, None], 0)
    return ends
