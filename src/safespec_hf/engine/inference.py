"""Inference mode, which saves a small model a twentieth of each forward, for those models that can run in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook

from .private_names import buffers_of
from .sharing import Shared
from .traits import is_plain

_RUNNING = Shared()
_KEEPERS: WeakSet[nn.Module] = WeakSet()
"""Models that were seen to keep tensors of a forward beside their buffers, where another thread could find them."""


@contextmanager
def inference_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Runs models in `torch.inference_mode()`, and leaves nothing of it in them, so that others can train them.

    Some models run without it: those with weights of a tensor type of its own, as some quantizations and tensor
    parallelism have, which often fail in it (pytorch/pytorch#170419); those with offloaded weights, which are loaded
    anew for every forward. So does everything under autocast, which keeps the weights that it casts.

    Args:
        models (`Sequence[torch.nn.Module]`): All that run.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or not all(map(_is_fit, models)):
        yield
        return
    things: dict[Hashable, Callable[[], Callable[[], object]]] = {"buffers": _watch_buffers}
    things |= {id(model): functools.partial(_watch, model) for model in models}
    with _RUNNING.held(things), torch.inference_mode():
        yield


@torch.inference_mode(False)
@torch.no_grad()
def ordinary_tensor(values: Sequence[int]) -> Tensor:
    """Whole numbers as a tensor that autograd can go on with, in inference mode too."""
    return torch.tensor(values)


def _is_fit(model: nn.Module) -> bool:
    if model in _KEEPERS:
        return False
    return all(is_plain(weight) and weight.device.type != "meta" for weight in _weights(model))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _watch_buffers() -> Callable[[], object]:
    return register_module_buffer_registration_hook(_ordinary).remove  # type: ignore[arg-type]  # it may return one


def _ordinary(module: nn.Module, name: str, buffer: Tensor | None) -> Tensor | None:
    """A buffer that is set in inference mode, such as a longer table of positions, as one for everybody's forwards."""
    return None if buffer is None or not buffer.is_inference() else _copy(buffer)


@torch.inference_mode(False)
@torch.no_grad()
def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _watch(model: nn.Module) -> Callable[[], object]:
    return functools.partial(_release, model)


def _release(model: nn.Module) -> None:
    """Makes ordinary tensors of what modules have kept from a forward."""
    for module in model.modules():
        for store in (buffers_of(module), module.__dict__):
            # as a tuple: another thread may add to it meanwhile
            for name, value in tuple(store.items()):
                if isinstance(value, Tensor) and value.is_inference():
                    store[name] = _copy(value)
                    _KEEPERS.add(model)
