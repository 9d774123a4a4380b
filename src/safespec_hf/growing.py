"""Keys and values of one layer, in buffers with room for more: a block is written in place, a rollback is a number."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 256
"""Columns to spare whenever a buffer is made. Copying the states is then one in so many tokens' work, not each one's."""


class GrowingLayer(DynamicLayer):
    """A [`~transformers.cache_utils.DynamicLayer`] that does not copy its states at every forward.

    States that are set from outside may be shared, as those of candidates are: they are copied before any is written.

    Example:

        >>> import torch
        >>> layer = GrowingLayer()
        >>> keys, values = layer.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
        >>> layer.crop(-2)
        >>> keys, values = layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        >>> keys[0, 0, :, 0].tolist()
        [1.0, 0.0]
    """

    def __init__(self, **kwargs: Any) -> None:
        self._states: dict[str, Tensor | None] = {}
        self._length = 0
        self._room = 0  # columns of buffers that are this layer's own; 0 if they are not
        super().__init__(**kwargs)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Of shape `(B, H, L, D)`."""
        return self._read("keys")

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._set("keys", states)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Of shape `(B, H, L, D)`."""
        return self._read("values")

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._set("values", states)

    def _read(self, name: str) -> Tensor | None:
        states = self._states[name]
        return None if states is None else states[:, :, : self._length]

    def _set(self, name: str, states: Tensor | None) -> None:
        self._states[name] = states
        self._length, self._room = 0 if states is None else states.shape[2], 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.is_initialized = key_states.device, True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[2]
        if torch.compiler.is_compiling():  # a write in place would be compiled anew for every buffer
            self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
            return self.keys, self.values
        if end > self._room:
            self._states = {name: _with_room(states, start, end + ROOM) for name, states in self._states.items()}
            self._room = end + ROOM
        keys = cast("Tensor", self._states["keys"])[:, :, :end]
        values = cast("Tensor", self._states["values"])[:, :, :end]
        keys[:, :, start:], values[:, :, start:] = key_states, value_states
        self._length = end
        return keys, values

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        self._length -= min(abs(tokens_to_remove), self._length)


def _with_room(states: Tensor | None, length: int, room: int) -> Tensor:
    assert states is not None
    buffer = states.new_empty(*states.shape[:2], room, states.shape[3])
    buffer[:, :, :length] = states[:, :, :length]
    return buffer


def growing_cache() -> DynamicCache:
    """An empty cache of such layers."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def make_plain(cache: Any) -> None:
    """Turns a cache into one that transformers and autograd go on with: of its own layers, with states of their own."""
    cache.layer_class_to_replicate = DynamicLayer
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized:
            keys, values = layer.keys.clone(), layer.values.clone()
            if isinstance(layer, GrowingLayer):
                layer = cache.layers[index] = DynamicLayer()
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
