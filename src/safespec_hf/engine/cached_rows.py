"""The KV cache of a batch of rows that grow at different speeds: what they hold, and how they go back.

[`Columns`] knows which column of the cache holds which token; here the states follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .columns import Columns
from .growing import column_states, growing_cache, make_plain
from .mixers import mixers_of
from .prompt import AfterPrompt
from .recurrent import RecurrentStates
from .ropes import RowRopes
from .traits import has_windows, max_positions
from .windows import Windows, copy_columns, crop, fill_with_zeros, move_columns, put_row, row_states, set_layer

UNLIMITED = 2**31


class CachedRows:
    """What a model has read of a batch of rows.

    Args:
        model ([`~transformers.PreTrainedModel`]): Target or draft.
        num_rows (`int`): Rows of the batch, all empty.

    Raises:
        UnsupportedRequestError: If recurrent states of the model are not in its cache.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int):
        self.model = model
        self.cache: Any = growing_cache(model)
        self.columns = Columns(num_rows)
        mixers = mixers_of(model)
        # what can't be rolled back by dropping columns, if there is such a thing
        self.recurrent = None if mixers is None else RecurrentStates(mixers, self.cache, num_rows)
        self.windows = Windows.of(self.cache, [0] * num_rows)  # layers that keep the last columns only
        self.ropes = RowRopes.of(model, num_rows)  # positions whose frequencies change with the length
        self._read = [0] * num_rows  # tokens of each row that were read, some of which a rollback may have forgotten
        self._is_callers = False
        self._after: AfterPrompt | None = None  # of prompts that are more than tokens
        self._tree_start: int | None = None  # tokens before a tree whose path has not been chosen yet
        # some models keep a causal mask of this size and index it by column
        self._max_columns = max_positions(model) or UNLIMITED
        self._has_windows = has_windows(model)
        # whether all rows are in one row of the cache, which holds what they have in common once
        self._is_shared = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths = self.columns.lengths
        return lengths if self._after is None else self._after.in_tokens(lengths)

    @property
    def used_BL(self) -> np.ndarray:
        """Whether a column of the cache holds a token of a row, of shape `(B, L)`."""
        return self.columns.used_BL

    def keep_drafts(self, row: int, num_drafts: int, path: Sequence[int]) -> None:
        """Of a row's last `num_drafts` tokens, a tree, keeps those of a path."""
        moves = self.columns.keep_path(row, num_drafts, path)
        if moves is not None:
            copy_columns(self.cache, *moves)
        self._tree_start = None

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls every row back to its first `lengths[row]` tokens; a row that has fewer stays as it is.

        With recurrent states, or windows, it may have to go back further: [`lengths`] says how far, and what is
        missing is to be read again. A prompt that is more than tokens stays.
        """
        lengths = lengths if self._after is None else self._after.in_places(lengths)
        if self._can_reread:
            self._read = list(map(min, self._read, lengths))
        if self.recurrent is not None:
            lengths = self.recurrent.keep(self.columns.lengths, lengths)
        if self.windows is not None:
            lengths = self.windows.keep(self.columns, lengths)
            if self.recurrent is not None:  # both or none: a row has one length
                lengths = self.recurrent.keep(self.columns.lengths, lengths)
        self._crop(self.columns.keep(lengths))
        self._tree_start = None

    @property
    def _can_reread(self) -> bool:
        """Whether rows may have to read tokens once more."""
        return self.recurrent is not None or self.windows is not None or self.ropes is not None

    def reach(self, row: int, end: int) -> bool:
        """Prepares a row for being read up to a length; to be called before a forward that may pass another one.

        Returns:
            `bool`: Whether it is empty now, to be read again: what it held was read with the positions of a text on
            the other side of the length at which the model reads its text again; see `ropes`.
        """
        if self.ropes is None or self._after is not None:
            return False
        lengths, read = self.columns.lengths, self._read
        is_lost = not self.ropes.suits(row, lengths[row], end)
        if is_lost:
            self.keep([0 if index == row else length for index, length in enumerate(lengths)])
            self._read = read
        self.ropes.reach(row, end)
        return is_lost

    def before_change(self, length: int) -> int:
        """Tokens that a forward can read after so many without passing such a length."""
        num = None if self.ropes is None or self._after is not None else self.ropes.before_change(length)
        return UNLIMITED if num is None else num

    def _crop(self, num_columns: int) -> None:
        for layer in self.cache.layers if num_columns else ():
            if column_states(layer):
                layer.crop(-num_columns)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        if list(rows) == list(range(len(self.lengths))):
            return
        for layer in self.cache.layers if not self._is_shared else ():
            if column_states(layer):
                layer.batch_select_indices(torch.tensor(rows))
        if self.windows is not None:
            self.windows.lost(self.columns)
            self.windows.select(rows)
        if self.recurrent is not None:
            self.recurrent.select(rows)
        self.ropes = None if self.ropes is None else self.ropes.select(rows)
        self._read = [self._read[row] for row in rows]
        self._after = None if self._after is None else self._after.select(rows)
        self._crop(self.columns.select(rows))

    def replace(self, row: int, other: CachedRows, other_row: int) -> None:
        """Row `row` becomes row `other_row` of another batch, which began as its copies."""
        columns = other.columns.of(other_row)
        if self.windows is not None:
            self.windows.lost(self.columns)  # while it can be seen
        num_added = self.columns.put(row, columns.size)
        for index, theirs in enumerate(other.cache.layers):
            new = row_states(theirs, 0 if other._is_shared else other_row, columns)
            put_row(self.cache, index, row, new, num_added, self.columns.num)
        if self.windows is not None and other.windows is not None:
            self.windows.lost(self.columns)
            self.windows.replace(row, other.windows.lost(other.columns)[other_row])
        if self.recurrent is not None and other.recurrent is not None:
            self.recurrent.replace(row, other.recurrent, other_row)
        if self.ropes is not None and other.ropes is not None:
            self.ropes.replace(row, other.ropes, other_row)
        self._read[row] = other._read[other_row]

    def states_of(self, row: int, layer: int) -> list[Tensor]:
        """What a layer keeps of a row's tokens, a window of the last ones: keys and values of shape `(1, H, L, C)`."""
        return row_states(self.cache.layers[layer], row, self.columns.of(row))

    def keep_all(self) -> None:
        """Has layers with a window keep all that they read, because it will be wanted or can't be read again."""
        self.windows = None

    def pretend(self, length: int) -> None:
        """Makes of every row, of which something has been read, one of so many tokens whose states are zeros."""
        self.columns, self._read = Columns.filled(len(self.lengths), length), [length] * len(self.lengths)
        fill_with_zeros(self.cache, length)
        if self.recurrent is not None:
            self.recurrent.pretend(length)

    def take_cache(self, cache: DynamicCache) -> None:
        """Goes on with a cache of one row that the caller filled."""
        length = cache.get_seq_length()
        self.cache, self.columns, self._is_callers = cache, Columns.filled(1, length), True
        self._read = [length]
        if self.ropes is not None:
            self.ropes.hold(self._read)
        self.keep_all()

    def begin_with(self, states: Sequence[Sequence[Tensor]], used_BL: np.ndarray) -> None:
        """Makes of empty rows ones whose first tokens have been read, given each layer's states of all rows."""
        self.columns.extend(used_BL)
        self._read = list(map(max, self._read, self.lengths))
        if self.ropes is not None:
            self.ropes.hold(self._read)
        for index, each in enumerate(states):
            set_layer(self.cache, index, each, self.columns.num)

    def trim_cache(self, length: int) -> None:
        """Crops a single row's cache to its first tokens, wherever an exception may have interrupted a round."""
        if self._after is not None:  # where a row is padded, that is no token, but a column as well
            length = max(length - self._after.num_tokens[0], 0) + self._after.num_columns
        length = max(length, 0)  # of embeddings no token is known
        if self._tree_start is not None:
            length = min(length, self._tree_start)
        if self.ropes is not None and self._after is None:
            length = min(length, self.columns.num)
            length = length if self.ropes.suits(0, length, length) else 0
        if self.recurrent is not None:
            length = self.recurrent.keep([self.columns.num], [length])[0]
        if self.windows is not None and not self.windows.reaches(length, self.windows.num_dropped):
            length = 0
        if self.recurrent is not None:
            self.recurrent.go_back(self.recurrent.keep([self.columns.num], [length]))
        crop(self.cache, length)
        if self._is_callers:
            make_plain(self.cache)

    def give_cache(self) -> Any:
        """The cache, for a caller to go on with."""
        if not self._is_callers:
            make_plain(self.cache)
        return self.cache

    def _close_holes(self, num_new: int) -> None:
        if self.windows is not None:
            self.windows.lost(self.columns)  # while it can be seen
        columns_BL = self.columns.close(num_new, self._max_columns, self._has_windows)
        if columns_BL is not None:
            move_columns(self.cache, columns_BL, self.columns.num)
