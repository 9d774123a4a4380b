"""The private names of torch, transformers and accelerate that this code leans on: all of them, and nowhere else.

Such a name may move with any release. Here each one is used under a name of our own, and stands in [`NAMES`] with a
look at whether it is still there; `tests/engine/test_private_names.py` says which one moved, and so does
[`check_private_names`] before a head is attached. `tests/test_architecture.py` keeps them out of all other modules.

To add one: write a function here that does what the name is needed for, and a line in `NAMES`. A method of `generate`
that has to act otherwise in a guarded call goes into [`GenerateSteps`].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import accelerate
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn.modules import module as module_functions
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation.configuration_utils import GenerationMode

from ..errors import SafeSpecError

Module = TypeVar("Module", bound=nn.Module)

# --- transformers: configs


def attention_name(model: Any) -> str | None:
    """Which implementation of attention a model runs; `None` for a module without a config."""
    config: Any = getattr(model, "config", None)
    return None if config is None else config._attn_implementation


def commit_hash(config: PreTrainedConfig) -> str | None:
    """The revision on the Hub that a config was read from."""
    found: str | None = getattr(config, "_commit_hash", None)
    return found


def is_from_model_config(config: GenerationConfig) -> bool:
    """Whether transformers made a generation config out of a model's, and so drops entries that it does not know."""
    return bool(config._from_model_config)


def keep_as_own(config: GenerationConfig) -> None:
    """Takes that mark off."""
    config._from_model_config = False


def pad_token_id(config: GenerationConfig) -> int | None:
    """What `generate` pads with, once it has prepared a config: the end token where no other one is set."""
    tensor: Tensor | None = config._pad_token_tensor
    return None if tensor is None else int(tensor)


# --- transformers: what `generate` is made of


def mark_user_cache(kwargs: Mapping[str, Any]) -> None:
    """Marks a cache among the arguments of `generate` as the caller's, as not every release does by itself."""
    for name in ("cache", "past_key_values", "cache_params"):
        if isinstance(kwargs.get(name), Cache):
            kwargs[name]._is_user_defined = True


def is_user_cache(cache: Any) -> bool:
    """Whether a cache was brought by the caller of `generate`."""
    return bool(getattr(cache, "_is_user_defined", False))


def for_row(processor: PrefixConstrainedLogitsProcessor, row: int) -> PrefixConstrainedLogitsProcessor:
    """A processor for one row of a batch, on any number of its continuations.

    Its function is told the number that it is told in the batch: the row's or, in most releases, that of its prompt.
    """
    allowed, number, own = processor._prefix_allowed_tokens_fn, row // processor._num_beams, copy(processor)
    own._prefix_allowed_tokens_fn, own._num_beams = lambda _, ids: allowed(number, ids), 1
    return own


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether a model's state can't be cropped, by its class's own word."""
    return bool(model._is_stateful)


def num_writes(tensor: Tensor) -> int:
    """How often a tensor has been written in place."""
    return int(tensor._version)


def keeps_logits(model: Any) -> bool:
    """Whether a model's forward can be told how many positions it has to give logits of."""
    return bool(model._supports_logits_to_keep())


def next_model_kwargs(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model one token on, as plain decoding goes on with them."""
    return dict(model._update_model_kwargs_for_generation({}, dict(kwargs)))


if TYPE_CHECKING:

    class _Generating(PreTrainedModel, GenerationMixin):
        pass

else:
    _Generating = object


class GenerateSteps(_Generating):
    """Steps of `generate` under names of our own, for a class above that of a model."""

    def _kept_mode_kwargs(self, strategy: Any, given: Mapping[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        """What goes on to a strategy, of what was given and what transformers keeps of it."""
        return kept

    def _validated_mode(self, mode: GenerationMode, config: GenerationConfig, kwargs: Any) -> GenerationMode:
        """The mode to validate a request by."""
        return mode

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *args: Any
    ) -> dict[str, Any]:
        given = dict(kwargs)  # it takes out what it keeps
        kept: dict[str, Any] = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args)
        return self._kept_mode_kwargs(custom_generate, given, kept)

    def _validate_generation_mode(self, mode: Any, config: Any, kwargs: Any) -> None:
        step = cast("Any", super())._validate_generation_mode
        step(self._validated_mode(mode, config, kwargs), config, kwargs)


# --- torch: modules


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary of a module's own buffers itself, which another thread may add to."""
    return module._buffers


def shell_of(module: Module) -> Module:
    """The module itself, hooks and weights included, but what is put into it is not put into the original."""
    shell = object.__new__(type(module))
    vars(shell).update(vars(module), _modules=dict(module._modules))
    return shell


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What is called before a module's forward."""
    return list(module._forward_pre_hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after a module's forward, of its own or of all modules'."""
    own = (module._forward_hooks, module._forward_pre_hooks)
    return any(own) or bool(module_functions._global_forward_hooks or module_functions._global_forward_pre_hooks)


def uncompiled(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` wrapped; `None` if this one is no such wrapping."""
    return dict(module.named_children()).get("_orig_mod")


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module go through something that was put there, as `Module.compile` does."""
    return module._compiled_call_impl is not None


def set_compiled_call(model: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Puts a function in the place of a module's calls, where `Module.compile` puts its own; returns the undoing.

    Args:
        model (`torch.nn.Module`): The module.
        make (`Callable`): Makes the function, of what was there.
    """
    before = model._compiled_call_impl
    model._compiled_call_impl = make(before or model._call_impl)
    return functools.partial(setattr, model, "_compiled_call_impl", before)


def plain_call(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a module with its hooks, but not what it was compiled to."""
    return model._call_impl(*args, **kwargs)


def compiler_config() -> Any:
    """The settings of `torch.compile`, with its limits."""
    return torch._dynamo.config


# --- torch: kernels of a CPU, which are done without where they are not built in


def has_blocked_products() -> bool:
    """Whether oneDNN's layouts can be made."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def to_blocks(weight: Tensor) -> Tensor:
    """A matrix in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def multiply_by_blocks(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """The product with such a matrix."""
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


def has_bfloat16_blocks() -> bool:
    """Whether there are such products in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


# --- accelerate


def moving_hook(module: nn.Module) -> Any:
    """What accelerate has put on a module to move its weights and inputs; `None` if nothing."""
    return getattr(module, "_hf_hook", None)


# --- whether all of them are there


class PrivateName(NamedTuple):
    """A private name of a library.

    Attributes:
        home (`str`): What has it.
        name (`str`): The name.
        make_home (`Callable[[], object]`): Gives what has it.
    """

    home: str
    name: str
    make_home: Callable[[], object]

    def is_there(self) -> bool:
        """Whether the installed release has it."""
        home = self.make_home()
        return hasattr(home, self.name) or self.name in getattr(home, "__annotations__", {})


def _prefix_constrained() -> LogitsProcessor:
    return PrefixConstrainedLogitsProcessor(lambda *_: [0], 1)


def _kernels() -> object:
    return torch.ops.mkldnn


def _compiled() -> object:
    return torch.compile(nn.Identity())


def _hooked() -> object:
    return add_hook_to_module(nn.Identity(), ModelHook())


NAMES = (
    PrivateName("transformers.PreTrainedConfig", "_attn_implementation", PreTrainedConfig),
    PrivateName("transformers.GenerationConfig", "_from_model_config", GenerationConfig),
    PrivateName("transformers.GenerationConfig", "_pad_token_tensor", lambda: GenerationConfig),
    PrivateName("transformers.PrefixConstrainedLogitsProcessor", "_prefix_allowed_tokens_fn", _prefix_constrained),
    PrivateName("transformers.PrefixConstrainedLogitsProcessor", "_num_beams", _prefix_constrained),
    PrivateName("transformers.PreTrainedModel", "_is_stateful", lambda: PreTrainedModel),
    PrivateName("transformers.PreTrainedModel", "_init_weights", lambda: PreTrainedModel),
    PrivateName("transformers.GenerationMixin", "_supports_logits_to_keep", lambda: GenerationMixin),
    PrivateName("transformers.GenerationMixin", "_update_model_kwargs_for_generation", lambda: GenerationMixin),
    PrivateName("transformers.GenerationMixin", "_extract_generation_mode_kwargs", lambda: GenerationMixin),
    PrivateName("transformers.GenerationMixin", "_validate_generation_mode", lambda: GenerationMixin),
    PrivateName("torch.Tensor", "_version", lambda: Tensor),
    PrivateName("torch.nn.Module", "_buffers", nn.Module),
    PrivateName("torch.nn.Module", "_modules", nn.Module),
    PrivateName("torch.nn.Module", "_forward_pre_hooks", nn.Module),
    PrivateName("torch.nn.Module", "_forward_hooks", nn.Module),
    PrivateName("torch.nn.modules.module", "_global_forward_hooks", lambda: module_functions),
    PrivateName("torch.nn.modules.module", "_global_forward_pre_hooks", lambda: module_functions),
    PrivateName("torch.nn.Module", "_compiled_call_impl", nn.Module),
    PrivateName("torch.nn.Module", "_call_impl", nn.Module),
    PrivateName("torch.compile(module)", "_orig_mod", _compiled),
    PrivateName("torch._dynamo.config", "recompile_limit", compiler_config),
    PrivateName("torch.cpu", "_is_avx512_bf16_supported", lambda: torch.cpu),
    PrivateName("torch.ops.mkldnn", "_reorder_linear_weight", _kernels),
    PrivateName("torch.ops.mkldnn", "_linear_pointwise", _kernels),
    PrivateName("torch.ops.mkldnn", "_is_mkldnn_bf16_supported", _kernels),
    PrivateName("accelerate.hooks.add_hook_to_module(module)", "_hf_hook", _hooked),
)
"""All but `_commit_hash`, which transformers has given up: of newer releases, nothing tells a model's revision."""
OF_HEADS = ("_init_weights", "_supports_logits_to_keep")
"""What our own models define as methods, since transformers looks for it there."""
KERNELS = "torch.ops.mkldnn"
"""Not every build of torch has these: they are for speed only."""
UNASKED = (KERNELS, "torch.compile(module)", "torch._dynamo.config")
"""Whose names nobody has to have who attaches a head. The compiler takes seconds to import; without one of its names a
compiled draft is refused, and `compile=True` fails before the first forward."""


@functools.cache
def check_private_names() -> None:
    """Raises if a name that guarded decoding can't do without has moved: it would fail later, or run wrongly.

    Raises:
        SafeSpecError: Names it, and the versions.
    """
    moved = [f"{each.home}.{each.name}" for each in NAMES if each.home not in UNASKED and not each.is_there()]
    if moved:
        raise SafeSpecError(
            f"This release of safespec-hf can't run on transformers {transformers.__version__}, torch "
            f"{torch.__version__} and accelerate {accelerate.__version__}: it needs private names that have moved, "
            f"{moved}. Install other versions of them, or a newer safespec-hf."
        )
