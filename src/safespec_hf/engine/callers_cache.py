"""Caches that come from a caller, or go to one: plain `generate`'s own kinds, with a column for each place of its ids.

Guarded decoding reads into a cache of its own, in which rows lie as they grow. What a caller passes is opened into one
that holds every column, and what was read is laid out again as in the sequences that are returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..errors import UnsupportedRequestError
from .growing import column_states, set_column_states
from .traits import CACHE_NAME, goes_back_by_copies

TAKEN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
States = list[list[Tensor]]
"""For each layer the states of one row that have columns, of shape `(1, H, L, D)`; none where a layer has none."""


def check_user_cache(model: PreTrainedModel, cache: Cache, shape: tuple[int, ...], max_length: float = 0) -> None:
    """Raises unless a cache that the caller passed can be continued, by texts of so many tokens at most.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        cache ([`~transformers.Cache`]): What was passed.
        shape (`tuple[int, ...]`): Rows and places of the prompts, what is cached included.
        max_length (`float`, defaults to 0): Places of prompt and answer.

    Raises:
        UnsupportedRequestError: For anything but a dynamic or static cache of attention layers, full or with a sliding
            window, that holds the beginning of every row and has room for the rest.
    """
    is_known = isinstance(cache, (DynamicCache, StaticCache)) and not getattr(cache, "offloading", False)
    if not is_known or any(type(layer) not in TAKEN for layer in cache.layers) or goes_back_by_copies(model):
        copied = (
            " of a model with recurrent states, or rows that are read one by one" if goes_back_by_copies(model) else ""
        )
        raise UnsupportedRequestError(
            f"`{CACHE_NAME}` must be a `DynamicCache` or `StaticCache` of attention layers, not offloaded, but it is "
            f"a {type(cache).__name__}{copied}. Leave it out, and the cache is made for you."
        )
    length, (num_rows, num_places) = int(cache.get_seq_length()), shape
    held = {len(states[0]) for layer in cache.layers if length and (states := _states(layer))}
    if length >= num_places or held - {num_rows}:
        raise UnsupportedRequestError(
            f"`{CACHE_NAME}` can be continued by as many rows as it has, each longer than the cache, but there are "
            f"{num_rows} rows of {num_places} tokens, and {length} cached ones of {sorted(held) or 0} rows. "
            "Pass the whole text, what is cached included."
        )
    rooms = [layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer]
    if rooms and max_length - 1 > min(rooms):  # the last token is written but not read
        raise UnsupportedRequestError(
            f"`{CACHE_NAME}` has room for {min(rooms)} tokens, but the text may get {max_length} tokens long. Make it "
            "with a larger `max_cache_len`, or lower `max_new_tokens`."
        )


def is_plain(cache: Any, num_rows: int, attention_mask: Tensor | None) -> bool:
    """Whether a cache can be used as it is: one row without padding, all of whose columns are there."""
    is_padded = attention_mask is not None and not bool(attention_mask.all())
    is_whole = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return is_whole and num_rows == 1 and not is_padded


def open_cache(cache: Any) -> DynamicCache:
    """What a cache holds, with a column for each token that it has seen.

    A sliding layer has kept the last ones only: before them are zeros, which no later token looks at.

    Example:

        >>> import torch
        >>> from transformers import DynamicCache
        >>> from transformers.cache_utils import DynamicSlidingWindowLayer
        >>> cache = DynamicCache()
        >>> cache.layers.append(DynamicSlidingWindowLayer(sliding_window=3))
        >>> _ = cache.update(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), 0)
        >>> open_cache(cache).layers[0].keys[0, 0, :, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    opened, length = DynamicCache(), int(cache.get_seq_length())
    for layer in cache.layers:
        plain = DynamicLayer()
        if length:
            states = [state[:, :, : min(length, state.shape[2])] for state in _states(layer)]
            set_column_states(plain, [pad(state, (0, 0, length - state.shape[2], 0)) for state in states])
        opened.layers.append(plain)
    return opened


def _states(layer: Any) -> list[Tensor]:
    if not isinstance(layer, StaticLayer):
        return column_states(layer)
    states: list[Any] = [layer.keys, layer.values]
    return states if layer.is_initialized else []


def lay_out(rows: Sequence[States], columns: Sequence[np.ndarray], width: int) -> States:
    """The states of a batch, each row's where its tokens lie.

    Args:
        rows (`Sequence[States]`): Of each row, what it has read.
        columns (`Sequence[np.ndarray]`): The columns of its tokens, ascending; only those before `width` are wanted.
        width (`int`): Columns of the whole.
    """
    layers = []
    for parts in zip(*rows, strict=True):
        layer = []
        for each in zip(*parts, strict=True):
            first = each[0]
            laid = first.new_zeros(len(rows), first.shape[1], width, first.shape[3])
            for row, state in enumerate(each):
                places = torch.from_numpy(columns[row][columns[row] < width]).to(state.device)
                laid[row, :, places] = state[0, :, : len(places)]
            layer.append(laid)
        layers.append(layer)
    return layers


@torch.inference_mode(False)
@torch.no_grad()
def fill_cache(model: PreTrainedModel, states: States, cache: Any = None) -> Any:
    """Gives a cache these states, in the place of those that it has.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        states (`States`): Of the whole batch.
        cache ([`~transformers.Cache`], *optional*): The caller's, or one that `generate` made for it. Default: a new
            one, of the kinds of layers that the model has.
    """
    if cache is None:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    while len(cache.layers) < len(states):
        cache.layers.append(DynamicLayer())
    for layer, new in zip(cache.layers, states, strict=False):
        _empty(layer)
        if not new:
            continue
        new = [state.clone() for state in new]
        if len(new) == 2 and isinstance(layer, TAKEN):
            layer.update(*new)
        else:
            set_column_states(layer, new)
    return cache


def _empty(layer: Any) -> None:
    if isinstance(layer, StaticLayer):
        if layer.is_initialized:
            layer.reset()
        return
    if getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = 0


def used_columns(is_real_BL: Tensor) -> np.ndarray:
    """Which columns hold a token of a row, of shape `(B, L)`."""
    used: np.ndarray = is_real_BL.bool().cpu().numpy()
    return used
