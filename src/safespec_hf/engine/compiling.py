"""Forwards through torch.compile: fewer and larger kernels, once they have been compiled."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedRequestError
from .cache import cache_argument

MAX_COMPILATIONS = 64
"""Of one call's models together: with and without a mask, for one token and for several, for each model."""


def check_compiler(device: torch.device) -> None:
    """Raises unless forwards can be compiled for a device.

    Raises:
        UnsupportedRequestError: On a CPU without a C++ compiler.
    """
    if device.type == "cpu" and find_compiler() is None:
        raise UnsupportedRequestError(
            "`compile=True` needs a C++ compiler on a CPU, but there is none on the PATH, nor does `CXX` name one. "
            "Install one, such as g++, or leave `compile` out."
        )


def find_compiler() -> str | None:
    """The path of a C++ compiler."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    return next((path for path in map(shutil.which, names) if path), None)


@contextmanager
def compiled_forwards(models: Sequence[nn.Module], is_wanted: bool = True) -> Iterator[None]:
    """Runs the forwards of models compiled, but for those that begin a cache: a prompt takes long enough by itself.

    Compilations are kept for the next time. A change of shapes needs no new one.

    Args:
        models (`Sequence[torch.nn.Module]`): Target and draft.
        is_wanted (`bool`, defaults to `True`): `False` leaves them as they are.
    """
    wanted: Sequence[Any] = models if is_wanted else []
    before = [model._compiled_call_impl for model in wanted]
    limits: dict[str, Any] = {"recompile_limit": MAX_COMPILATIONS, "accumulated_recompile_limit": MAX_COMPILATIONS}
    with torch._dynamo.config.patch(**limits) if is_wanted else nullcontext():
        try:
            for model in wanted:
                # where `Module.__call__` looks first, and where `Module.compile` puts what it has compiled
                model._compiled_call_impl = functools.partial(_call, model, cache_argument(model))
            yield
        finally:
            for model, call in zip(wanted, before, strict=True):
                model._compiled_call_impl = call


def _call(model: Any, cache_name: str, *args: Any, **kwargs: Any) -> Any:
    cache = kwargs.get(cache_name)
    if cache is None or cache.get_seq_length() == 0:
        return model._call_impl(*args, **kwargs)
    return _compiled()(model, *args, **kwargs)


@functools.cache
def _compiled() -> Callable[..., Any]:
    # one for all models: a compilation that is kept with its model would never let go of it
    return torch.compile(_forward, dynamic=True)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)
