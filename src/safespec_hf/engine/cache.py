"""The KV cache of a batch of rows that grow at different speeds. Differences between transformers versions stay here.

A row's tokens lie in order in the columns of the cache, but not every column holds a token of every row: rows are
padded on the left, shorter blocks are padded, and rejected tokens leave holes. `used_BL` says which columns
count. Trailing columns that no row uses are cropped, so a single row never has a hole.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..errors import UnsupportedRequestError
from .growing import GrowingLayer, growing_cache, make_plain
from .tap import read_tap, tap_arguments
from .token_tree import path_to

# Holes cost attention time. Gathering the cache costs about one copy of it, so do it when a quarter is wasted.
MAX_HOLE_FRACTION = 0.25
MIN_HOLES = 64
MAX_BLOCK = 64
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
"""What the installed transformers calls a cache, in arguments and outputs: version 5.24 renamed it."""


class BlockOutput(NamedTuple):
    """What one forward gives.

    Attributes:
        logits_BTV (`torch.Tensor` of shape `(B, T, V)`): Of the last positions asked for.
        hidden_BTF (`torch.Tensor` of shape `(B, T, F)`, *optional*):
            Tapped hidden states of the whole block; a draft head's own where it was given states.
    """

    logits_BTV: Tensor
    hidden_BTF: Tensor | None


@dataclass(slots=True)
class Usage:
    """Forwards of a model, and the host time they took."""

    num_forwards: int = 0
    seconds: float = 0.0


class CachedModel:
    """A causal language model with the KV cache of a batch of rows.

    Args:
        model ([`~transformers.PreTrainedModel`]): Target or draft.
        num_rows (`int`): Rows of the batch, all empty.
        layers (`Sequence[int]`): Hidden states to return with every forward.
        usage ([`Usage`], *optional*): Counts to add to.

    Raises:
        UnsupportedRequestError: If the model has layers whose state can't be rolled back.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, layers: Sequence[int] = (), usage: Usage | None = None):
        check_cache_layers(model)
        self.model = model
        self.layers = tuple(layers)
        # Without a config every layer keeps all its states: sliding windows are then a matter of the mask alone, and
        # any rollback is a crop.
        self.cache: Any = growing_cache()
        self._is_adopted = False
        self.used_BL = np.zeros((num_rows, 0), dtype=bool)
        self.lengths = [0] * num_rows
        self.usage = usage if usage is not None else Usage()
        self._device = model.device  # a property that looks for a weight each time
        self._fixed = {"use_cache": True, "return_dict": True, **tap_arguments(self.layers)}
        self._cache_name = cache_argument(model)
        model_interface: Any = model
        self._keeps_logits: bool = model_interface._supports_logits_to_keep()
        # some models keep a causal mask of this size and index it by column
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._max_columns = 2**31 if positions is None else positions - MAX_BLOCK
        is_local = "local" in (getattr(model.config, "attention_layers", None) or [])  # GPT-Neo's own sliding window
        self._is_sliding = is_local or any(DynamicCache(config=model.config).is_sliding)

    def forward(
        self,
        blocks: Sequence[Sequence[int]] | Tensor,
        num_logits: int,
        states_BTF: Tensor | None = None,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> BlockOutput:
        """Appends a block of tokens to every row.

        Args:
            blocks (`Sequence[Sequence[int]]` or `torch.LongTensor` of shape `(B, T)`):
                The tokens of each row, at least one; rows may differ in length.
            num_logits (`int`): Logits are returned for this many of the last positions.
            states_BTF (`torch.Tensor` of shape `(B, T, F)`, *optional*): For a [`DraftHead`], aligned to the right.
            parents (`Sequence[Sequence[int]]`, *optional*):
                For each row, the parents of its last tokens, which are a tree after the tokens before them. Only if
                [`takes_trees`].
        """
        start = time.perf_counter()
        self._compact()
        # a hole inside of a sliding window would make it shorter, so there it must come after the row's tokens
        is_left_aligned = self._is_sliding and self.used_BL.shape[1] > 0
        input_ids, added_BT = self._align(blocks, is_left_aligned)
        is_shifted = is_left_aligned and not added_BT.all()
        positions_BT = self._extend(added_BT)
        mask_BTL = None if parents is None else self._tree_mask(parents, positions_BT)
        arguments = self._arguments(input_ids, positions_BT, input_ids.shape[1] if is_shifted else num_logits)
        if mask_BTL is not None:
            arguments["attention_mask"] = self._as_attention_mask(mask_BTL)
        if states_BTF is not None:
            arguments["states"] = states_BTF
        outputs = self.model(**arguments)
        self.usage.num_forwards += 1
        hidden = read_tap(outputs, self.layers, input_ids.shape[1]) if self.layers else None
        if states_BTF is not None:
            hidden = outputs.hidden_states
        logits = outputs.logits
        if is_shifted:
            logits, hidden = (None if part is None else _shift_right(part, added_BT) for part in (logits, hidden))
        self.usage.seconds += time.perf_counter() - start
        return BlockOutput(logits[:, -num_logits:], hidden)

    def _align(self, blocks: Sequence[Sequence[int]] | Tensor, to_left: bool) -> tuple[Tensor, np.ndarray]:
        if isinstance(blocks, Tensor):
            return blocks.to(self._device), np.ones(tuple(blocks.shape), dtype=bool)
        width = max(len(block) for block in blocks)
        ids, added = np.zeros((len(blocks), width), dtype=np.int64), np.zeros((len(blocks), width), dtype=bool)
        for row, block in enumerate(blocks):
            assert len(block) > 0, "every row needs a token to forward"
            start = 0 if to_left else width - len(block)
            ids[row, start : start + len(block)] = block
            added[row, start : start + len(block)] = True
        return torch.from_numpy(ids).to(self._device, non_blocking=True), added

    def _is_whole(self) -> bool:
        """Whether there is one row, in all columns."""
        return len(self.lengths) == 1 and self.used_BL.shape[1] == self.lengths[0]

    def _extend(self, added_BT: np.ndarray) -> np.ndarray:
        """Adds columns; returns the positions of the tokens in them."""
        if self._is_whole():  # by far the most common case, and draft steps are short
            length = self.lengths[0] + added_BT.shape[1]
            positions_BT = np.arange(self.lengths[0], length)[None]
            self.used_BL, self.lengths = np.ones((1, length), dtype=bool), [length]
            return positions_BT
        self.used_BL = np.concatenate([self.used_BL, added_BT], axis=1)
        positions_BT = np.maximum(np.array(self.lengths)[:, None] + added_BT.cumsum(axis=1) - 1, 0)
        self.lengths = [length + int(new) for length, new in zip(self.lengths, added_BT.sum(axis=1), strict=True)]
        return positions_BT

    def _arguments(self, input_ids: Tensor, positions_BT: np.ndarray, num_logits: int) -> dict[str, Any]:
        device = input_ids.device
        arguments: dict[str, Any] = {"input_ids": input_ids, self._cache_name: self.cache, **self._fixed}
        arguments["position_ids"] = torch.from_numpy(positions_BT).to(device, non_blocking=True)
        if not (self._is_whole() or self.used_BL.all()):
            arguments["attention_mask"] = torch.from_numpy(self.used_BL).to(device, non_blocking=True).long()
        if self._keeps_logits:
            arguments["logits_to_keep"] = num_logits
        return arguments

    def _tree_mask(self, parents: Sequence[Sequence[int]], positions_BT: np.ndarray) -> np.ndarray:
        """What each token of the block sees, `(B, T, L)`; moves the positions of trees, in place."""
        width, num_columns = positions_BT.shape[1], self.used_BL.shape[1]
        causal_TL = np.tril(np.ones((width, num_columns), dtype=bool), num_columns - width)
        mask_BTL = causal_TL & self.used_BL[:, None]
        for row, tree in enumerate(parents):
            first = width - len(tree)
            for draft in range(len(tree)):
                path = path_to(draft, tree)
                positions_BT[row, first + draft] = positions_BT[row, first - 1] + len(path)
                mask_BTL[row, first + draft, num_columns - len(tree) :] = False
                mask_BTL[row, first + draft, num_columns - len(tree) + np.array(path)] = True
        # a column of padding sees itself: with nothing to see it would become nan, and spread
        mask_BTL |= np.eye(num_columns, dtype=bool)[num_columns - width :]
        return mask_BTL

    def _as_attention_mask(self, mask_BTL: np.ndarray) -> Tensor:
        mask = torch.from_numpy(mask_BTL).to(self._device, non_blocking=True)[:, None]
        if self.model.config._attn_implementation == "sdpa":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def keep_drafts(self, row: int, num_drafts: int, path: Sequence[int]) -> None:
        """Of a row's last `num_drafts` tokens, a tree, keeps those of a path."""
        columns = np.flatnonzero(self.used_BL[row])[-num_drafts:]
        kept, where = columns[list(path)], columns[: len(path)]
        self.used_BL[row, columns] = False
        self.lengths[row] -= num_drafts - len(path)
        if len(self.lengths) > 1:
            self.used_BL[row, kept] = True
            return
        # a single row never has a hole
        for layer in self.cache.layers if not np.array_equal(kept, where) else ():
            for state in (layer.keys, layer.values):
                state[:, :, torch.from_numpy(where)] = state[:, :, torch.from_numpy(kept)]
        self.used_BL[row, where] = True

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls every row back to its first `lengths[row]` tokens; a row that has fewer stays as it is."""
        for row, (have, want) in enumerate(zip(self.lengths, lengths, strict=True)):
            if want < have:
                self.used_BL[row, np.flatnonzero(self.used_BL[row])[want:]] = False
        self.lengths = [min(have, want) for have, want in zip(self.lengths, lengths, strict=True)]
        used_L = self.used_BL.any(axis=0)
        num_columns = int(np.flatnonzero(used_L)[-1]) + 1 if used_L.any() else 0
        if num_columns < used_L.size:
            self.cache.crop(num_columns - used_L.size)
            self.used_BL = self.used_BL[:, :num_columns]

    def adopt(self, cache: DynamicCache) -> None:
        """Goes on with a cache of one row that the caller filled."""
        length = cache.get_seq_length()
        self.cache, self.lengths, self.used_BL = cache, [length], np.ones((1, length), dtype=bool)
        self._is_adopted = True

    def leave(self, length: int) -> None:
        """Crops a single row's cache to its first tokens, even if a forward was interrupted halfway."""
        for layer in self.cache.layers:
            layer.crop(min(length - layer.get_seq_length(), 0))
        if self._is_adopted:
            make_plain(self.cache)

    def hand_over(self) -> Any:
        """The cache, for a caller to go on with."""
        if not self._is_adopted:
            make_plain(self.cache)
        return self.cache

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        if list(rows) == list(range(len(self.lengths))):
            return
        self.cache.batch_select_indices(torch.tensor(rows))
        self.used_BL = self.used_BL[list(rows)]
        self.lengths = [self.lengths[row] for row in rows]
        self.keep(self.lengths)

    def fork(self, row: int, num_copies: int) -> CachedModel:
        """A new batch of `num_copies` rows that all continue row `row`, sharing its states until the next forward."""
        fork = CachedModel(self.model, num_copies, self.layers, self.usage)
        columns = np.flatnonzero(self.used_BL[row])
        fork.used_BL = np.ones((num_copies, columns.size), dtype=bool)
        fork.lengths = [int(columns.size)] * num_copies
        for index, layer in enumerate(self.cache.layers):
            states = [_columns(state[row : row + 1], columns) for state in (layer.keys, layer.values)]
            _set_layer(fork.cache, index, *(state.expand(num_copies, -1, -1, -1) for state in states))
        return fork

    def replace(self, row: int, other: CachedModel, other_row: int) -> None:
        """Row `row` becomes row `other_row` of another batch of the same model."""
        columns = np.flatnonzero(other.used_BL[other_row])
        width = max(self.used_BL.shape[1], columns.size)
        used_BL = np.pad(self.used_BL, ((0, 0), (width - self.used_BL.shape[1], 0)))
        used_BL[row] = np.arange(width) >= width - columns.size
        for index, (mine, theirs) in enumerate(zip(self.cache.layers, other.cache.layers, strict=True)):
            states = []
            for own, new in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                state = torch.nn.functional.pad(own, (0, 0, width - own.shape[2], 0))
                state[row, :, width - columns.size :] = _columns(new[other_row : other_row + 1], columns)[0]
                states.append(state)
            _set_layer(self.cache, index, *states)
        self.used_BL = used_BL
        self.lengths[row] = int(columns.size)

    def _compact(self) -> None:
        """Closes the holes when they cost more than closing them, or would be counted into a sliding window."""
        num_columns, longest = self.used_BL.shape[1], max(self.lengths)
        if self._is_whole():
            return
        # a row that is padded on the left only has no hole
        has_holes = self._is_sliding and bool((np.diff(self.used_BL.astype(np.int8), axis=1) < 0).any())
        limit = min(max(MIN_HOLES, MAX_HOLE_FRACTION * num_columns), self._max_columns - longest)
        if num_columns - longest <= max(limit, 0) and not has_holes:
            return
        columns_BL = np.zeros((len(self.lengths), longest), dtype=np.int64)
        for row, length in enumerate(self.lengths):
            columns_BL[row, longest - length :] = np.flatnonzero(self.used_BL[row])
        for index, layer in enumerate(self.cache.layers):
            columns = torch.from_numpy(columns_BL).to(layer.keys.device)[:, None, :, None]
            states = [torch.take_along_dim(state, columns, dim=2) for state in (layer.keys, layer.values)]
            _set_layer(self.cache, index, *states)
        self.used_BL = np.arange(longest) >= longest - np.array(self.lengths)[:, None]


def _shift_right(values_BTX: Tensor, used_BT: np.ndarray) -> Tensor:
    """Moves the positions of each row to the right end of the block."""
    width = used_BT.shape[1]
    source_BT = np.maximum(np.arange(width) - (width - used_BT.sum(axis=1))[:, None], 0)
    return values_BTX.take_along_dim(torch.from_numpy(source_BT).to(values_BTX.device)[..., None], dim=1)


def cache_argument(model: PreTrainedModel) -> str:
    """What a model's forward calls its cache; one that takes any argument is left to the installed transformers."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), CACHE_NAME)


def check_cache_layers(model: PreTrainedModel) -> None:
    """Raises unless every layer's state can be rolled back by dropping columns.

    Raises:
        UnsupportedRequestError: For recurrent, linear-attention and other layers without a plain KV cache.
    """
    layers = DynamicCache(config=model.config).layers
    others = sorted({type(layer).__name__ for layer in layers if not _is_attention(layer)})
    if others or model._is_stateful:
        raise UnsupportedRequestError(
            f"{type(model).__name__} has layers whose state can't be rolled back ({', '.join(others) or 'stateful'}). "
            "Guarded decoding needs attention layers with a KV cache, full or sliding-window."
        )


def check_user_cache(cache: Cache, prompt_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raises unless a cache that the caller passed can be continued.

    Raises:
        UnsupportedRequestError: For anything but a `DynamicCache` of full-attention layers with one row of a part of
            the prompt, unpadded.
    """
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UnsupportedRequestError(
            f"`{CACHE_NAME}` must be a `DynamicCache` of full-attention layers, but it is a "
            f"{type(cache).__name__}. Leave it out, and the cache is made for you."
        )
    is_padded = attention_mask is not None and not bool(attention_mask.all())
    if prompt_ids.shape[0] > 1 or is_padded or cache.get_seq_length() >= prompt_ids.shape[1]:
        raise UnsupportedRequestError(
            f"`{CACHE_NAME}` can be continued for one unpadded row that is longer than the cache, but there are "
            f"{prompt_ids.shape[0]} rows of {prompt_ids.shape[1]} tokens and {cache.get_seq_length()} cached ones."
        )


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether a model can read a tree in one forward.

    A mask of who sees whom has to reach its attention as it is, and positions alone must tell the order of tokens.
    """
    text = model.config.get_text_config()
    has_own_mask = "create_causal_mask" not in vars(sys.modules[type(model).__module__])
    has_bias = bool(getattr(text, "alibi", False)) or getattr(text, "position_embedding_type", "") == "alibi"
    is_sliding = any(DynamicCache(config=model.config).is_sliding)
    return model.config._attn_implementation in ("sdpa", "eager") and not (has_own_mask or has_bias or is_sliding)


def _is_attention(layer: Any) -> bool:
    return type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")


def _columns(state_BHLD: Tensor, columns: np.ndarray) -> Tensor:
    if columns.size == state_BHLD.shape[2]:
        return state_BHLD
    return state_BHLD.index_select(2, torch.from_numpy(columns).to(state_BHLD.device))


def _set_layer(cache: Any, index: int, keys: Tensor, values: Tensor) -> None:
    while len(cache.layers) <= index:
        cache.layers.append(GrowingLayer())
    layer = cache.layers[index]
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
