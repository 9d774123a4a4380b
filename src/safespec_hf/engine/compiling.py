"""Forwards through torch.compile: fewer and larger kernels, once they have been compiled."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedRequestError
from .private_names import compiler_config, plain_call, set_compiled_call
from .sharing import Shared, ThreadSwitch
from .traits import cache_argument

MAX_COMPILATIONS = 64
"""Of one call's models together: with and without a mask, for one token and for several, for each model."""
_LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_FOUND: dict[str, int] = {}
_PATCHES = Shared()
_COMPILES = ThreadSwitch()


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
    """Runs the forwards of models compiled, in this thread.

    Those that begin a cache are not: a prompt takes long enough by itself. Compilations are kept for the next time. A
    change of shapes needs no new one.

    Args:
        models (`Sequence[torch.nn.Module]`): Target and draft.
        is_wanted (`bool`, defaults to `True`): `False` leaves them as they are.
    """
    if not is_wanted:
        with _COMPILES.turned(False):
            yield
        return
    things: dict[Hashable, Any] = {id(model): functools.partial(_put_on, model) for model in models}
    with _PATCHES.held(things), nullcontext() if _COMPILES.is_on else _raised_limits(), _COMPILES.turned(True):
        yield


def _put_on(model: Any) -> Callable[[], None]:
    return set_compiled_call(model, functools.partial(functools.partial, _call, model, cache_argument(model)))


@contextmanager
def _raised_limits() -> Iterator[None]:
    """Raises torch's limits, which are each thread's own or all threads', by the version of torch."""
    config = compiler_config()
    # another thread's call may have raised them already: what to go back to is what there was before any call
    _FOUND.update({name: getattr(config, name) for name in _LIMITS if getattr(config, name) != MAX_COMPILATIONS})
    found = dict(_FOUND)
    try:
        for name in _LIMITS:
            setattr(config, name, MAX_COMPILATIONS)
        yield
    finally:
        for name, value in found.items():
            setattr(config, name, value)


def _call(model: Any, cache_name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    cache = kwargs.get(cache_name)
    if not _COMPILES.is_on:
        return plain(*args, **kwargs)
    if cache is None or cache.get_seq_length() == 0:
        return plain_call(model, *args, **kwargs)
    return _compiled()(model, *args, **kwargs)


@functools.cache
def _compiled() -> Callable[..., Any]:
    # one for all models: a compilation that is kept with its model would never let go of it
    return torch.compile(_forward, dynamic=True)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    return plain_call(model, *args, **kwargs)
