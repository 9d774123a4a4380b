"""Models behave as in evaluation while a call runs, whatever mode they were left in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .sharing import Shared

_RUNNING = Shared()


@contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Without dropout, and with a cache although gradients may be checkpointed; afterwards every module is as before.

    Args:
        models (`Sequence[torch.nn.Module]`): All that run.
    """
    with _RUNNING.held({id(model): functools.partial(_evaluate, model) for model in models}):
        yield


def _evaluate(model: nn.Module) -> Callable[[], object]:
    changed = [module for module in model.modules() if module.training]
    _set(changed, False)
    return functools.partial(_set, changed, True)


def _set(modules: Sequence[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training
