"""What has to be known of a model to run its forwards here. Differences between transformers versions stay here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..errors import UnsupportedRequestError
from .growing import KINDS, is_recurrent, model_layers
from .private_names import attention_name, buffers_of, is_stateful, moving_hook

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
"""What the installed transformers calls a cache, in arguments and outputs: version 5.24 renamed it."""
WHOLE_CONTEXT = {"full_attention", "global", "indexed_attention"}
"""What configs call a layer that attends to all tokens before."""
NO_CONTEXT = {"linear_attention", "conv", "hybrid", "mamba", "moe", "mlp"}
"""What they call one that attends to none, but for the whole context where it is beside a recurrent state."""
_HAS_TABLE: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
MAX_OFFSET = 8
"""Rows that a table of positions may have beyond those that can be used; OPT's has 2."""


def cache_argument(model: PreTrainedModel) -> str:
    """What a model's forward calls its cache; one that takes any argument is left to the installed transformers."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), CACHE_NAME)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model's forward names `position_ids`; one that takes any argument is given them as well."""
    parameters = inspect.signature(model.forward).parameters
    has_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return "position_ids" in parameters or (has_any and parameters.keys().isdisjoint(("cache", "past_key_values")))


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs and gives its outputs.

    The weights of an offloaded model are on the `meta` device, and come to another one for the time they are needed:
    its hooks know which.
    """
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    for hook in _hooks(model):
        if hook.execution_device is not None:
            return torch.empty(0, device=hook.execution_device).device  # it may be a number or a name
    return next((weight.device for weight in model.parameters() if weight.device.type != "meta"), device)


def is_plain(weight: Tensor) -> bool:
    """Whether it is no tensor type of its own, as quantized and distributed weights are."""
    return type(weight) in (Tensor, nn.Parameter)


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of a model are elsewhere until they are needed."""
    return any(weight.device.type == "meta" for weight in model.parameters())


def _hooks(model: nn.Module) -> Iterator[Any]:
    """accelerate's hooks that move weights and inputs, the outermost module's first."""
    for module in model.modules():
        hook = moving_hook(module)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                yield each


def has_windows(model: PreTrainedModel) -> bool:
    """Whether a layer of a model sees the last tokens only: a sliding window, a chunk, local attention.

    Configs say so in many ways. The number of a window without a word on which layers have one counts for all.
    """
    if any(DynamicCache(config=model.config).is_sliding):
        return True
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)
    if kinds:
        return any(kind not in WHOLE_CONTEXT | NO_CONTEXT for kind in kinds)
    return any(
        isinstance(value, int) and value > 0 and any(word in name for word in ("window", "local", "attention_chunk"))
        for name, value in vars(text).items()
    )


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether a model can read a tree in one forward.

    A mask of who sees whom has to reach its attention as it is, and positions alone must tell the order of tokens.
    """
    text = model.config.get_text_config()
    has_own_mask = "create_causal_mask" not in vars(sys.modules[type(model).__module__])
    has_bias = bool(getattr(text, "alibi", False)) or getattr(text, "position_embedding_type", "") == "alibi"
    is_fit = attention_name(model) in ("sdpa", "eager")
    is_fit = is_fit and takes_positions(model)
    return is_fit and not (has_own_mask or has_bias or has_windows(model) or is_recurrent(model))


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a row can have at most: the size of a table of positions, or of a mask that lies ready.

    `None` where there is no such table. A model with rotary embeddings goes on past the length it was trained for.
    """
    num = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if num is None:
        return None
    known = _HAS_TABLE.get(model)
    if known is None or known[0] != num:
        # once: it takes as long as reading a token, and every call asks
        known = _HAS_TABLE[model] = num, _has_table(model, num)
    return int(num) if known[1] else None


def _has_table(model: nn.Module, num: int) -> bool:
    embedded = _input_embeddings(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            has_table = module is not embedded and num <= module.num_embeddings < num + MAX_OFFSET
        else:
            tables = [*buffers_of(module).values(), *vars(module).values()]
            has_table = any(isinstance(table, Tensor) and table.dim() > 1 and num in table.shape for table in tables)
        if has_table:
            return True
    return False


def _input_embeddings(model: Any) -> nn.Module | None:
    try:
        found: nn.Module | None = model.get_input_embeddings()
        return found
    except NotImplementedError:  # a draft head has none of its own
        return None


def check_cache_layers(model: PreTrainedModel) -> None:
    """Raises unless it is known how to roll every layer's state back.

    Raises:
        UnsupportedRequestError: For layers of other kinds, and for models whose state is in no cache.
    """
    layers = model_layers(model)
    others = sorted({type(layer).__name__ for layer in layers} - KINDS.keys())
    if others or (is_stateful(model) and not is_recurrent(model)):
        raise UnsupportedRequestError(
            f"{type(model).__name__} has layers whose state can't be rolled back ({', '.join(others) or 'stateful'}). "
            "Guarded decoding knows attention with a KV cache, full, sliding-window or indexed, and recurrent states "
            "that are in the cache."
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
