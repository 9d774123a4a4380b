"""What a layer keeps of the tokens it has read, one class per kind: here all that lies in columns, one for a token.

Keys and values are in buffers with room for more: a block is written in place and nothing is copied. To go back,
columns are dropped. Layers that own none, as those that read another layer's, have nothing to take back. States that
have no columns are the business of [`RecurrentStates`].
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

MARGIN = 256
"""Columns before a window that stay: a rollback that goes back no further costs nothing."""
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

    @property
    def num_held(self) -> int:
        """Columns that it holds."""
        return DynamicLayer.get_seq_length(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # there, a copy is a kernel's work, and a length would be compiled in
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, num_new = self.num_held, key_states.shape[2]
        is_mine = self.keys is self._own and self._own is not None and len(self._own) == len(key_states)
        buffers = self._buffers if is_mine else None
        if buffers is None or start + num_new > buffers[0].shape[2]:
            room = start + num_new + ROOM
            buffers = self._buffers = _copy(self.keys, key_states, room), _copy(self.values, value_states, room)
        keys, values = buffers
        keys.narrow(2, start, num_new).copy_(key_states)
        values.narrow(2, start, num_new).copy_(value_states)
        self.keys = self._own = keys.narrow(2, 0, start + num_new)
        self.values = values.narrow(2, 0, start + num_new)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if self._buffers is None or self.keys is not self._own:
            super().crop(tokens_to_remove)
            return
        length = max(self.num_held - abs(tokens_to_remove), 0)
        self.keys = self._own = self._buffers[0].narrow(2, 0, length)
        self.values = self._buffers[1].narrow(2, 0, length)

    def reset(self) -> None:
        # said here, since not every release lets go of what it holds
        self.keys = self.values = self._own = self._buffers = None
        self.is_initialized = False
        super().reset()


def _copy(states: Tensor | None, new: Tensor, room: int) -> Tensor:
    """A buffer for states like the new ones, that begins with those there are."""
    buffer = new.new_empty(*new.shape[:2], room, new.shape[3])
    if states is not None and states.numel() > 0:
        buffer[:, :, : states.shape[2]] = states
    return buffer


class WindowLayer(GrowingLayer):
    """The same for a layer whose attention reaches no further back than a window: it drops the columns before that.

    Some columns before the window stay, for rollbacks. [`Windows`] knows what can still be done.

    Args:
        sliding_window (`int`): Of the layer, in columns.

    Attributes:
        num_dropped (`int`): Columns that it had before those that it holds.
        may_drop (`bool`): Whether its last columns hold the last tokens of every row, also of those to come.

    Example:

        >>> import torch
        >>> layer = WindowLayer(sliding_window=4)
        >>> layer.may_drop = True
        >>> keys, values = layer.update(torch.ones(1, 1, 900, 2), torch.ones(1, 1, 900, 2))
        >>> keys.shape[2], layer.num_held, layer.get_seq_length()
        (900, 260, 900)
    """

    is_sliding = True

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.num_dropped = 0
        self.may_drop = False

    def get_seq_length(self) -> int:
        return self.num_dropped + self.num_held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_held + query_length, self.num_dropped

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        states = super().update(key_states, value_states, *args, **kwargs)
        if self.may_drop and not torch.compiler.is_compiling():
            self.drop()
        return states

    @property
    def num_kept(self) -> int:
        """Columns that stay when it drops others."""
        return self.sliding_window + MARGIN

    def drop(self) -> None:
        """Drops what is not needed, once that is worth copying the rest."""
        num_kept = self.num_kept
        num = self.num_held - num_kept
        if num < MARGIN:
            return
        assert self.keys is not None
        assert self.values is not None
        self.num_dropped += num
        keys, values = (_copy(state[:, :, num:], state, num_kept + ROOM) for state in (self.keys, self.values))
        self._buffers = keys, values
        self.keys = self._own = keys.narrow(2, 0, num_kept)
        self.values = values.narrow(2, 0, num_kept)

    def crop(self, tokens_to_remove: int) -> None:
        num = abs(tokens_to_remove)
        self.num_dropped -= max(num - self.num_held, 0)
        super().crop(-min(num, self.num_held))

    def reset(self) -> None:
        super().reset()
        self.num_dropped = 0


class GrowingIndexedLayer(DynamicIndexedLayer, GrowingLayer):
    """The same with the keys of an indexer, which picks the columns that attention reads."""


class GrowingHybridLayer(LinearAttentionLayer, GrowingLayer):  # type: ignore[misc, override]  # as transformers' own
    """The same beside a recurrent state, which has no columns: [`RecurrentStates`] takes it back."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        GrowingLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        part = GrowingLayer if args else LinearAttentionLayer  # keys and values come by position, other states by name
        part.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        GrowingLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        GrowingLayer.crop(self, tokens_to_remove)


KINDS: dict[str, Any] = {
    "DynamicLayer": GrowingLayer,
    "DynamicSlidingWindowLayer": WindowLayer,
    "DynamicIndexedLayer": GrowingIndexedLayer,
    "LinearAttentionLayer": LinearAttentionLayer,
    "LinearAttentionAndFullAttentionLayer": GrowingHybridLayer,
    "LinearAttentionAndSlidingWindowAttentionLayer": GrowingHybridLayer,
    "DummyLayer": None,
}
"""Layers of transformers' caches, and what stands for each here; `None` keeps nothing, and stays as it is."""
PLAIN = {
    GrowingLayer: DynamicLayer,
    GrowingIndexedLayer: DynamicIndexedLayer,
    GrowingHybridLayer: LinearAttentionAndFullAttentionLayer,
}
"""What a caller can go on with in the place of each of ours."""


def growing_cache(model: PreTrainedModel | None = None) -> DynamicCache:
    """An empty cache of such layers.

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*): Says of which kinds they are. Default: keys and values.
    """
    theirs = [] if model is None else model_layers(model)
    kinds = [KINDS[type(layer).__name__] for layer in theirs]
    if model is None or all(kind is GrowingLayer for kind in kinds):
        cache = DynamicCache()
        cache.layer_class_to_replicate = GrowingLayer
        return cache
    cache = _own_class(model)()
    cache.layer_class_to_replicate = None
    for kind, layer in zip(kinds, theirs, strict=True):
        cache.layers.append(layer if kind is None else kind(**_arguments(layer)))
    return cache


def _arguments(layer: Any) -> dict[str, int]:
    """What a layer of the same kind is made with."""
    return {name: getattr(layer, name, 1) for name in ("number_of_states", "sliding_window")}


def empty_like(cache: Any) -> Any:
    """An empty cache of layers of the same kinds."""
    if cache.layer_class_to_replicate is not None or all(type(layer) is DynamicLayer for layer in cache.layers):
        return growing_cache()
    empty = copy.copy(cache)
    empty.layers = [type(layer)(**_arguments(layer)) for layer in cache.layers]
    return empty


def model_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of the cache that transformers makes for a model."""
    return list(DynamicCache(config=model.config).layers)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether a model has states that are no columns."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in model_layers(model))


def has_columns(model: PreTrainedModel) -> bool:
    """Whether any layer of a model has columns."""
    return any(isinstance(layer, DynamicLayer) for layer in model_layers(model))


class _NamedStates:
    """Gives recurrent states under the names that some models call them by."""

    layers: list[Any]

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        layer = self.layers[layer_idx]
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.layers[layer_idx].update_recurrent_state(linear_cache)
        self.layers[layer_idx].has_previous_state[0] = True

    def __len__(self) -> int:
        return len(self.layers)

    def batch_select_indices(self, indices: Tensor) -> None:
        DynamicCache.batch_select_indices(self, indices)  # type: ignore[arg-type]

    def crop(self, tokens_to_remove: int) -> None:
        DynamicCache.crop(self, tokens_to_remove)  # type: ignore[arg-type]


def _own_class(model: PreTrainedModel) -> Any:
    """The class of a model's cache: one that insists on a class of its own gets a class derived from it."""
    own = vars(sys.modules[type(model).__module__]).get("MiniMaxCache")
    return DynamicCache if own is None else type(own.__name__, (_NamedStates, own), {})


def column_states(layer: Any) -> list[Tensor]:
    """A layer's states that have a column for each token, of shape `(B, H, L, D)` each; none before the first one."""
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.keys.dim() < 4:  # empty, without a shape yet
        return []
    states: list[Any] = [layer.keys, layer.values]
    if isinstance(layer, DynamicIndexedLayer) and layer.indexer_keys is not None:
        states.append(layer.indexer_keys[:, None])
    return states


def num_columns(cache: Any) -> int:
    """The columns of a cache; 0 where no layer has any, which transformers' caches don't say."""
    return next((states[0].shape[2] for layer in cache.layers if (states := column_states(layer))), 0)


def set_column_states(layer: Any, states: Sequence[Tensor]) -> None:
    """Sets what [`column_states`] gives, for a layer that may have read nothing."""
    if not states:
        return
    keys, values, *others = states
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    for state in others:
        if not layer.is_indexer_initialized:
            layer.lazy_initialization_indexer(state[:, 0])
        layer.indexer_keys = state[:, 0]


def num_dropped(layer: Any) -> int:
    """Columns that a layer has let go of, before those that it holds."""
    return layer.num_dropped if isinstance(layer, WindowLayer) else 0


def _plain_window(layer: WindowLayer, states: list[Tensor]) -> tuple[DynamicLayer, list[Tensor]]:
    if not layer.num_dropped:
        return DynamicLayer(), states  # as before, and it can be cropped to any length
    plain = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    plain.cumulative_length = layer.get_seq_length()
    return plain, [state[:, :, max(state.shape[2] - layer.sliding_window + 1, 0) :] for state in states]


@torch.inference_mode(False)
@torch.no_grad()
def make_plain(cache: Any) -> None:
    """Turns a cache into one that transformers and autograd can go on with: own layers, own states."""
    if cache.layer_class_to_replicate is GrowingLayer:
        cache.layer_class_to_replicate = DynamicLayer
    for index, layer in enumerate(cache.layers):
        states = [state.clone() for state in column_states(layer)]
        plain: Any = PLAIN[type(layer)]() if type(layer) in PLAIN else layer
        if isinstance(layer, WindowLayer):
            plain, states = _plain_window(layer, states)
        if isinstance(layer, LinearAttentionLayer):
            vars(plain).update({name: value for name, value in vars(layer).items() if name in vars(plain)})
            for kept in (plain.conv_states, plain.recurrent_states):
                kept.update({at: None if state is None else state.clone() for at, state in kept.items()})
        cache.layers[index] = plain
        set_column_states(plain, states)
