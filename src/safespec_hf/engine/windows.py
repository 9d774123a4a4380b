"""Which tokens of a batch of rows are still in the layers that keep a window only, and how far rows can go back.

A row can go back to a length whose window is still there, and to its beginning. So a rollback that goes back further
than the margin of those layers leaves the row empty: it is read again in the next forward, with what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .columns import Columns
from .growing import GrowingLayer, WindowLayer, column_states, num_dropped, set_column_states


class Windows:
    """The layers of a cache that keep a window only.

    Args:
        layers (`list[WindowLayer]`): All of them, at least one.
        lost (`Sequence[int]`): Of each row, how many tokens, the first ones, are in none of them any more.
    """

    def __init__(self, layers: list[WindowLayer], lost: Sequence[int]):
        self.layers = layers
        self.size = max(layer.sliding_window for layer in layers)
        self._lost = list(lost)

    @classmethod
    def of(cls, cache: Any, lost: Sequence[int]) -> Windows | None:
        """Those of a cache, if there are any."""
        layers = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
        return cls(layers, lost) if layers else None

    @property
    def num_dropped(self) -> int:
        """Columns that are not in all of the layers any more."""
        return max(layer.num_dropped for layer in self.layers)

    def begin(self, may_drop: bool) -> None:
        """A forward begins, with the last tokens of all rows in the last columns, which stays so or not."""
        for layer in self.layers:
            layer.may_drop = may_drop
            layer.drop()

    def lost(self, columns: Columns) -> list[int]:
        """Of each row, how many tokens, the first ones, are not in all of the layers any more."""
        if num := self.num_dropped:
            gone = [num] * len(self._lost) if columns.is_full else columns.used_BL[:, :num].sum(axis=1).tolist()
            self._lost = list(map(max, self._lost, gone))
        return self._lost

    def keep(self, columns: Columns, lengths: Sequence[int]) -> list[int]:
        """To which lengths rows go back that are to have at most these."""
        lost = self.lost(columns)
        kept = [min(pair) for pair in zip(columns.lengths, lengths, strict=True)]
        for row, (have, length) in enumerate(zip(columns.lengths, kept, strict=True)):
            if length < have and not self.reaches(length, lost[row]):
                kept[row] = 0
            if kept[row] == 0:
                lost[row] = 0
        return kept

    def reaches(self, length: int, lost: int) -> bool:
        """Whether a row that has lost so many tokens can go on from a length."""
        return lost <= max(length - self.size + 1, 0)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        self._lost = [self._lost[row] for row in rows]

    def replace(self, row: int, lost: int) -> None:
        """A row becomes one that has lost so many tokens."""
        self._lost[row] = lost


def columns_of(state_BHLD: Tensor, columns: np.ndarray, num_dropped: int = 0) -> Tensor:
    """Some columns of a state, as far as it has not dropped them."""
    columns = columns[columns >= num_dropped] - num_dropped
    if columns.size == state_BHLD.shape[2]:
        return state_BHLD
    return state_BHLD.index_select(2, torch.from_numpy(columns).to(state_BHLD.device))


def row_states(layer: Any, row: int, columns: np.ndarray) -> list[Tensor]:
    """What a layer holds of some columns of a row, of shape `(1, H, L, D)` each."""
    return [columns_of(state[row : row + 1], columns, num_dropped(layer)) for state in column_states(layer)]


def put_row(cache: Any, index: int, row: int, new: Sequence[Tensor], num_added: int, num_columns: int) -> None:
    """Puts states into the last columns of a row of a layer, which gets so many columns more on the left."""
    layer, states = cache.layers[index], []
    for own, added in zip(column_states(layer), new, strict=True):
        # what a window does not hold of the longer ones is not needed on its left, either
        room = max(added.shape[2] - own.shape[2], 0) if isinstance(layer, WindowLayer) else num_added
        state = torch.nn.functional.pad(own, (0, 0, room, 0))
        state[row, :, state.shape[2] - added.shape[2] :] = added[0]
        states.append(state)
    set_layer(cache, index, states, num_columns)


def move_columns(cache: Any, columns_BL: np.ndarray, num_columns: int) -> None:
    """Gives every layer, for each of its last columns, the one that is named for it."""
    for index, layer in enumerate(cache.layers):
        if not (states := column_states(layer)):
            continue
        held = min(num_columns, states[0].shape[2]) if isinstance(layer, WindowLayer) else num_columns
        # what a row has lost is somewhere before its window, and never seen
        places_BL = np.maximum(columns_BL[:, num_columns - held :] - num_dropped(layer), 0)
        places = torch.from_numpy(places_BL)[:, None, :, None]
        moved = [torch.take_along_dim(state, places.to(state.device), dim=2) for state in states]
        set_layer(cache, index, moved, num_columns)


def fill_with_zeros(cache: Any, num_columns: int) -> None:
    """Makes of a cache in which something has been read one of so many columns of zeros."""
    for index, layer in enumerate(cache.layers):
        held = min(num_columns, layer.num_kept) if isinstance(layer, WindowLayer) else num_columns
        states = [state.new_zeros(*state.shape[:2], held, state.shape[3]) for state in column_states(layer)]
        set_layer(cache, index, states, num_columns)


def copy_columns(cache: Any, source: Any, place: Any) -> None:
    """Copies columns of all rows to others, in every layer."""
    for layer in cache.layers:
        for state in column_states(layer):
            state[:, :, place] = state[:, :, source]


def crop(cache: Any, length: int) -> None:
    """Drops all columns of a cache after the first ones."""
    for layer in cache.layers:
        if states := column_states(layer):
            layer.crop(min(length - num_dropped(layer) - states[0].shape[2], 0))


def set_layer(cache: Any, index: int, states: Sequence[Tensor], num_columns: int) -> None:
    """Sets the states of a layer, which are those of the last of so many columns."""
    while len(cache.layers) <= index:
        cache.layers.append(GrowingLayer())
    set_column_states(cache.layers[index], states)
    if states and isinstance(layer := cache.layers[index], WindowLayer):
        layer.num_dropped = num_columns - states[0].shape[2]
