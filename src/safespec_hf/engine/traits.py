"""What has to be known of a model to run its forwards here. Differences between transformers versions stay here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..errors import UnsupportedRequestError
from .growing import KINDS, column_states, is_recurrent, model_layers
from .private_names import attention_name, buffers_of, is_stateful, moving_hook

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
"""What the installed transformers calls a cache, in arguments and outputs: version 5.24 renamed it."""
STATE_NAME = "state"
"""What a forward calls all that it keeps, where that is no cache but tensors that it takes and returns (RWKV)."""
CACHE_NAMES = ("cache", "past_key_values", "cache_params", STATE_NAME)
"""What forwards call it, and have called it; the third one is of state-space models."""
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What the code of a model raises that is given something it does not know."""
WHOLE_CONTEXT = {"full_attention", "global", "indexed_attention"}
"""What configs call a layer that attends to all tokens before."""
NO_CONTEXT = {"linear_attention", "conv", "hybrid", "mamba", "moe", "mlp"}
"""What they call one that attends to none, but for the whole context where it is beside a recurrent state."""
_HAS_TABLE: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_ALONE: WeakSet[nn.Module] = WeakSet()
MAX_OFFSET = 8
"""Rows that a table of positions may have beyond those that can be used; OPT's has 2."""


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache; one that takes any argument is left to the installed transformers."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in names), CACHE_NAME)


def with_cache_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with their cache under one name, whatever the model calls it.

    Example:

        >>> list(with_cache_name({"cache_params": None, "use_cache": True})) == [CACHE_NAME, "use_cache"]
        True
    """
    return {CACHE_NAME if name in CACHE_NAMES else name: value for name, value in arguments.items()}


class FilledCache(DynamicCache):
    """Stands for a cache that holds `num_tokens`, to ask what a model would do with one."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens


def prepare_inputs(model: Any, input_ids: Tensor, **arguments: Any) -> dict[str, Any]:
    """What a model's own `prepare_inputs_for_generation` makes of the arguments of a forward."""
    names = inspect.signature(model.prepare_inputs_for_generation).parameters
    if "cache_params" in names and CACHE_NAME in arguments.keys() - names.keys():
        arguments["cache_params"] = arguments.pop(CACHE_NAME)
    return dict(model.prepare_inputs_for_generation(input_ids, **arguments))


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model's forward names `position_ids`; one that takes any argument is given them as well."""
    parameters = inspect.signature(model.forward).parameters
    has_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return "position_ids" in parameters or (has_any and parameters.keys().isdisjoint(CACHE_NAMES))


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


def lacks_weights(model: nn.Module) -> bool:
    """Whether weights of a model are nowhere: on the `meta` device, and no hook of accelerate brings them."""
    return is_offloaded(model) and next(_hooks(model), None) is None


def sharing_groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """Groups of processes that hold parts of a model's weights: all of each must run the same forwards.

    Empty where this process has the whole model, be there others or not.
    """
    if not _has_processes() or dist.get_world_size() == 1:
        return []
    from torch.distributed.tensor import DTensor

    meshes = [weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)]
    groups = {group.group_name: group for mesh in meshes for group in mesh.get_all_groups()}
    if not groups and (_sharded_modules(model) or any(map(_is_parted, model.parameters()))):
        # FSDP's weights are together for the moment, or what parts them does not say between whom
        return [dist.group.WORLD] if dist.group.WORLD is not None else []
    return [group for _, group in sorted(groups.items()) if dist.get_world_size(group) > 1]


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Has FSDP put its weights apart again, before and after what needs to see a module as it was."""
    sharded = _sharded_modules(model)
    for module in sharded:
        module.reshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def _is_parted(weight: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 or the first FSDP keeps it in parts."""
    return "ds_id" in vars(weight) or type(weight).__name__ == "FlatParameter"


def _has_processes() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Those whose weights FSDP keeps apart between forwards."""
    if not _has_processes():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


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


def min_window(model: PreTrainedModel) -> int:
    """The shortest sliding window of a model's layers; 0 where its cache does not say."""
    windows = [getattr(layer, "sliding_window", None) for layer in model_layers(model)]
    return min((window for window in windows if window), default=0)


def takes_trees(model: PreTrainedModel) -> bool:
    """Whether a model can read a tree in one forward.

    A mask of who sees whom has to reach its attention as it is, and positions alone must tell the order of tokens.
    """
    has_own_mask = "create_causal_mask" not in vars(sys.modules[type(model).__module__])
    is_fit = attention_name(model) in ("sdpa", "eager")
    is_fit = is_fit and takes_positions(model) and not reads_alone(model)
    return is_fit and not (has_own_mask or has_alibi(model) or has_windows(model) or is_recurrent(model))


def has_alibi(model: PreTrainedModel) -> bool:
    """Whether a config says that attention counts distances by the mask, and takes no positions for them."""
    text = model.config.get_text_config()
    return bool(getattr(text, "alibi", False)) or getattr(text, "position_embedding_type", "") == "alibi"


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


def is_known(model: PreTrainedModel) -> bool:
    """Whether it is known how to roll back in place what transformers says a model keeps of the tokens before."""
    is_in_layers = not is_stateful(model) or is_recurrent(model)
    return is_in_layers and {type(layer).__name__ for layer in model_layers(model)} <= KINDS.keys()


def reads_alone(model: PreTrainedModel) -> bool:
    """Whether the rows of a model have to be read one by one, each with a cache of its own; see [`RowsAlone`]."""
    return model in _ALONE or not is_known(model)


def read_alone(model: PreTrainedModel) -> None:
    """Has the rows of a model be read one by one from now on."""
    _ALONE.add(model)


def goes_back_by_copies(model: PreTrainedModel) -> bool:
    """Whether a rollback takes copies of states, because something of them has no columns that could be dropped."""
    return is_recurrent(model) or reads_alone(model)


def check_prompt_columns(model: PreTrainedModel, cache: Any, width: int) -> None:
    """Raises unless a forward over a prompt has left a column for each of its places, in every layer that has any.

    Raises:
        UnsupportedRequestError: If it has not, as with layers that attend to images by themselves.
    """
    nums = {state.shape[2] for layer in cache.layers for state in column_states(layer)} - {width}
    if nums:
        raise UnsupportedRequestError(
            f"{type(model).__name__} read a prompt of {width} places and keeps {max(nums)} in a layer: what cross-"
            "attention keeps of images can't be rolled back with the tokens. Generate without `safespec`."
        )
