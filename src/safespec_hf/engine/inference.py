"""Inference mode, which saves a small model a twentieth of each forward, for those models that bear it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .packing import is_plain


@contextmanager
def inference_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Runs models in `torch.inference_mode()`, and leaves nothing of it behind in them.

    Models with weights of a tensor type of its own, as some quantizations and tensor parallelism have, often fail in
    inference mode (pytorch/pytorch#170419), and run without it.

    Args:
        models (`Sequence[torch.nn.Module]`): All that run.
    """
    is_borne = all(is_plain(weight) for model in models for weight in _weights(model))
    try:
        with torch.inference_mode() if is_borne else nullcontext():
            yield
    finally:
        if is_borne and not torch.is_inference_mode_enabled():
            for model in models:
                _release(model)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _release(model: nn.Module) -> None:
    """Makes ordinary tensors of what modules have kept from a forward, such as a longer table of positions."""
    for module in model.modules():
        for store in (module._buffers, module.__dict__):
            for name, value in store.items():
                if isinstance(value, Tensor) and value.is_inference():
                    store[name] = value.clone()


@contextmanager
def evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Runs models without dropout, and leaves every module in the mode that it was in.

    Args:
        models (`Sequence[torch.nn.Module]`): All that run.
    """
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
