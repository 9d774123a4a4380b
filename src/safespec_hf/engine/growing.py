"""Keys and values of one layer, in buffers with room for more: a block is written in place and nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 256
"""Columns to spare whenever a buffer is made: states are copied once for so many tokens, not once for each."""


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
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._own: Tensor | None = None  # the keys, as long as they lie in the buffer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # there, a copy is a kernel's work, and a length would be compiled in
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, num_new = self.get_seq_length(), key_states.shape[2]
        if self._buffers is None or self.keys is not self._own or start + num_new > self._buffers[0].shape[2]:
            room = start + num_new + ROOM
            self._buffers = _copy(self.keys, key_states, room), _copy(self.values, value_states, room)
        keys, values = self._buffers
        keys.narrow(2, start, num_new).copy_(key_states)
        values.narrow(2, start, num_new).copy_(value_states)
        self.keys = self._own = keys.narrow(2, 0, start + num_new)
        self.values = values.narrow(2, 0, start + num_new)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if self._buffers is None or self.keys is not self._own:
            super().crop(tokens_to_remove)
            return
        length = max(self.get_seq_length() - abs(tokens_to_remove), 0)
        self.keys = self._own = self._buffers[0].narrow(2, 0, length)
        self.values = self._buffers[1].narrow(2, 0, length)


def _copy(states: Tensor | None, new: Tensor, room: int) -> Tensor:
    """A buffer for states like the new ones, that begins with those there are."""
    buffer = new.new_empty(*new.shape[:2], room, new.shape[3])
    if states is not None and states.numel() > 0:
        buffer[:, :, : states.shape[2]] = states
    return buffer


def growing_cache() -> DynamicCache:
    """An empty cache of such layers."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


@torch.inference_mode(False)
@torch.no_grad()
def make_plain(cache: Any) -> None:
    """Turns a cache into one that transformers and autograd can go on with: own layers, own states."""
    if cache.layer_class_to_replicate is GrowingLayer:
        cache.layer_class_to_replicate = DynamicLayer
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized:
            keys, values = layer.keys.clone(), layer.values.clone()
            if isinstance(layer, GrowingLayer):
                layer = cache.layers[index] = DynamicLayer()
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
