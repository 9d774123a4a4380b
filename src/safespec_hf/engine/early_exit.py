"""A model that ends after some of another one's layers, and shares all weights with it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedRequestError
from .private_names import shell_of

RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")


def early_exit(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """The model's first layers, followed by its own norm and LM head. Made in microseconds; nothing is copied.

    transformers changes the config of the model itself for the time of a draft, which other threads would see.

    Args:
        model ([`~transformers.PreTrainedModel`]): Any that keeps its layers in a list.
        num_layers (`int`): How many of them, >= 1 and fewer than there are.

    Raises:
        UnsupportedRequestError: If it has no such layers, or not so many.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3))
        >>> len(early_exit(model, 1).model.layers), len(model.model.layers)
        (1, 3)
    """
    most = model.config.get_text_config(decoder=True).num_hidden_layers
    is_number = isinstance(num_layers, int) and not isinstance(num_layers, bool)
    if not is_number or not 0 < num_layers < most:
        raise UnsupportedRequestError(
            f"`assistant_early_exit` must be a number of layers from 1 to {most - 1}, fewer than there are, but it is "
            f"{num_layers!r}."
        )
    any_model: Any = model
    decoder = any_model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    homes = [model.get_submodule(name) for name in _prefixes(path)]
    lists = [name for name, module in decoder.named_children() if _is_list(module, most)]
    if len(lists) != 1 or any("forward" in vars(home) for home in homes):
        raise UnsupportedRequestError(
            f"`assistant_early_exit` can't be kept: {type(model).__name__} has no list of its {most} layers, or runs "
            "under hooks that move its inputs between devices. Use `assistant_model` or `prompt_lookup_num_tokens`."
        )
    view = shell_of(model)
    parent: nn.Module = view
    for name in path.split(".") if path else ():
        child = shell_of(parent.get_submodule(name))
        setattr(parent, name, child)
        parent = child
    layers: Any = decoder.get_submodule(lists[0])
    shorter = nn.ModuleList(layers[:num_layers])
    shorter.training = decoder.training
    setattr(parent, lists[0], shorter)
    config = _cut(model, num_layers, most)
    text = config.get_text_config(decoder=True)
    for home, name in zip(_homes(view, path), _prefixes(path), strict=True):
        if isinstance(home, PreTrainedModel):
            original: Any = model.get_submodule(name)
            home.config = config if original.config is model.config else text
    return view


def _prefixes(path: str) -> list[str]:
    """The names of all modules on a path, the outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:num]) for num in range(len(parts) + 1)]


def _homes(view: nn.Module, path: str) -> list[nn.Module]:
    return [view.get_submodule(name) for name in _prefixes(path)]


def _is_list(module: nn.Module, num: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == num


def _cut(model: PreTrainedModel, num_layers: int, most: int) -> Any:
    """A config of the first layers."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    num_shared = getattr(text, "num_kv_shared_layers", 0) or 0
    if num_layers > most - num_shared:
        raise UnsupportedRequestError(
            f"`assistant_early_exit` must be at most {most - num_shared}, but it is {num_layers}: the layers after "
            "that read the keys and values of others."
        )
    if num_shared:
        text.num_kv_shared_layers = 0
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == most:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    for each in (config, text):
        for name in RECORDS:
            # to record anything the layers, which are another model's, would get its hooks a second time
            if getattr(each, name, False):
                setattr(each, name, False)
    return config
