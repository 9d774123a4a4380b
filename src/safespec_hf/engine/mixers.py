"""The parts of a model that keep a recurrent state, and how one forward of it can be interrupted for them.

Such a mixer (a state-space, linear-attention or convolution layer) has one state for all it has read. Nothing in it
can be dropped to go back, so a copy is needed from where to go back to, which may lie inside of the block that a
forward reads. There the mixer, and nothing but the mixer, reads it in parts. It is still one forward of the model.
"""

from __future__ import annotations

import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from ..errors import UnsupportedRequestError
from .growing import growing_cache, is_recurrent
from .sharing import Shared
from .traits import cache_argument, input_device

MORE, ROUNDING, NUM_EPS = 4.0, 1e-5, 3
"""How many times further from what is read at once a mixer may be that goes on with several tokens, than one that goes
on with single ones; and the other way round. Beyond the first it has forgotten something, beyond the second single
tokens are other arithmetic than blocks: then they are what plain `generate` goes by. What is mere rounding, in float32
or in units of a coarser format, says neither: there a block may happen to be read exactly as it was at once."""
PROBE = 6


class Key(NamedTuple):
    """One state of a cache: `"conv_states"` or `"recurrent_states"` number `number` of a layer."""

    layer: int
    kind: str
    number: int

    def read(self, cache: Any) -> Tensor | None:
        """The state, if there is one yet."""
        state: Tensor | None = getattr(cache.layers[self.layer], self.kind)[self.number]
        return state

    def write(self, cache: Any, state: Tensor) -> None:
        """Sets the state of a cache whose layer has begun."""
        getattr(cache.layers[self.layer], self.kind)[self.number] = state


Snapshot = dict[Key, Tensor]


@dataclass(slots=True)
class Parts:
    """How a block is read.

    Attributes:
        cache (`Any`): The forward's.
        width (`int`): Tokens of the block.
        cuts (`list[int]`): Where it is cut, ascending, between 0 and `width`.
        kept (`dict[int, Snapshot]`): For the cuts after which states are wanted, what they were.
    """

    cache: Any
    width: int
    cuts: list[int]
    kept: dict[int, Snapshot] = field(default_factory=dict)


class _Current(threading.local):
    parts: Parts | None = None


_CURRENT = _Current()
_PATCHES = Shared()


class Mixer:
    """The forward of one mixer, in parts where a forward of this thread asks for them.

    Args:
        module (`torch.nn.Module`): The mixer.
        keys (`Sequence[Key]`): The states that it writes.
    """

    def __init__(self, module: nn.Module, keys: Sequence[Key]):
        self.module = weakref.ref(module)
        self.keys = list(keys)
        self._own: Callable[..., Any] | None = None

    def put_on(self) -> Callable[[], None]:
        """Becomes the mixer's forward; returns what undoes it."""
        module: Any = self.module()
        before, self._own = vars(module).get("forward"), module.forward
        vars(module)["forward"] = self

        def take_off() -> None:
            vars(module).pop("forward")
            if before is not None:  # such as a hook that moves weights
                vars(module)["forward"] = before

        return take_off

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The mixer's outputs for the whole block."""
        own, parts = self._own, _CURRENT.parts
        assert own is not None
        if parts is None:
            return own(*args, **kwargs)
        outputs, spans = [], list(pairwise([0, *parts.cuts, parts.width]))
        for start, end in spans:
            given = (_cut(value, parts.width, start, end) for value in args)
            outputs.append(own(*given, **{name: _cut(each, parts.width, start, end) for name, each in kwargs.items()}))
            if end in parts.kept:
                parts.kept[end].update(snapshot(parts.cache, self.keys))
        return _join(outputs, [end - start for start, end in spans])

    def __reduce__(self) -> Any:
        # a copy of the model that is made while a forward runs gets the mixer's own forward, of its own mixer
        return _own_forward, (self.module(),)


def _own_forward(module: Any) -> Callable[..., Any]:
    return types.MethodType(type(module).forward, module)


def snapshot(cache: Any, keys: Sequence[Key]) -> Snapshot:
    """Copies of states, as they are now; a forward writes over them in place."""
    states = ((key, key.read(cache)) for key in keys)
    return {key: state.clone() for key, state in states if state is not None}


def begin_layer(like: Any, layer: Any) -> None:
    """Has a layer's recurrent part begin like that of another one, whose states it shares until they are set."""
    names = vars(LinearAttentionLayer()).keys()
    own = {name: value for name, value in vars(like).items() if name in names}
    vars(layer).update({name: dict(value) if isinstance(value, dict) else value for name, value in own.items()})


def reset_layer(layer: Any) -> None:
    """Forgets a layer's recurrent part, if it has one."""
    if isinstance(layer, LinearAttentionLayer):
        vars(layer).update(vars(LinearAttentionLayer(layer.number_of_states)))


def _cut(value: Any, width: int, start: int, end: int) -> Any:
    """Of a mixer's argument, what is about some tokens of a block."""
    if isinstance(value, Tensor):
        return value[:, start:end] if value.dim() >= 2 and value.shape[1] == width else value
    return tuple(_cut(each, width, start, end) for each in value) if isinstance(value, tuple) else value


def _join(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The outputs for the whole block: what is about its tokens one after the other, of anything else the last."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_join(each, sizes) for each in zip(*outputs, strict=True))
    is_of_tokens = isinstance(first, Tensor) and all(
        output.dim() >= 2 and output.shape[1] == size for output, size in zip(outputs, sizes, strict=True)
    )
    return torch.cat(list(outputs), dim=1) if is_of_tokens else outputs[-1]


@dataclass(frozen=True, slots=True)
class Mixers:
    """The mixers of a model.

    Attributes:
        mixers (`list[Mixer]`): All of them.
        reads_blocks (`bool`): Whether they go on from a state with several tokens at once. Others take one at a time.
    """

    mixers: list[Mixer]
    reads_blocks: bool

    @property
    def keys(self) -> list[Key]:
        """Their states."""
        return [key for mixer in self.mixers for key in mixer.keys]

    @contextmanager
    def reading(self, parts: Parts) -> Iterator[None]:
        """Has the forwards of this thread read their block in parts."""
        if not parts.cuts:
            yield
            return
        with _PATCHES.held({id(mixer): mixer.put_on for mixer in self.mixers}):
            _CURRENT.parts = parts
            try:
                yield
            finally:
                _CURRENT.parts = None


_KNOWN: WeakKeyDictionary[nn.Module, Mixers | None] = WeakKeyDictionary()


def mixers_of(model: PreTrainedModel) -> Mixers | None:
    """The mixers of a model, if it has any: found by what writes recurrent states, in forwards of a few tokens.

    Once for each model.

    Raises:
        UnsupportedRequestError: If its recurrent states are somewhere else than in the cache.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _study(model) if is_recurrent(model) else None
    return _KNOWN[model]


@torch.no_grad()
def _study(model: Any) -> Mixers:
    was_training = model.training
    model.eval()
    owners: dict[nn.Module, list[Key]] = {}
    cache = growing_cache(model)
    try:
        with _noting_writes(model, cache, owners):
            whole = _read(model, cache, [PROBE])
        mixers = [Mixer(module, keys) for module, keys in owners.items()]
        _check_written(model, cache, mixers)
        half = PROBE // 2
        parts = _read(model, growing_cache(model), [half, PROBE - half])
        steps = _read(model, growing_cache(model), [half] + [1] * (PROBE - half))
    finally:
        model.train(was_training)
    by_parts, by_steps = _error(whole, parts), _error(whole, steps)
    return Mixers(mixers, _are_alike(by_parts, by_steps, model.dtype))


def _are_alike(by_parts: float, by_steps: float, dtype: torch.dtype) -> bool:
    """Whether two errors differ by no more than rounding does.

    Example:

        >>> _are_alike(0.0, 0.008, torch.bfloat16), _are_alike(0.0, 0.008, torch.float32)
        (True, False)
        >>> _are_alike(0.079, 0.009, torch.bfloat16)
        False
    """
    rounding = max(ROUNDING, NUM_EPS * torch.finfo(dtype).eps)
    return max(by_parts, by_steps) <= MORE * min(by_parts, by_steps) + rounding


def _error(whole_TV: Tensor, other_TV: Tensor) -> float:
    """The relative error of the worst position of the second half."""
    whole_TV, other_TV = (logits_TV[PROBE // 2 :].float() for logits_TV in (whole_TV, other_TV))
    return float(((whole_TV - other_TV).norm(dim=-1) / whole_TV.norm(dim=-1).clamp(min=1e-6)).max())


def _check_written(model: nn.Module, cache: Any, mixers: Sequence[Mixer]) -> None:
    """Raises unless every recurrent layer has been written."""
    recurrent = {at for at, layer in enumerate(cache.layers) if isinstance(layer, LinearAttentionLayer)}
    if missing := recurrent - {key.layer for mixer in mixers for key in mixer.keys}:
        raise UnsupportedRequestError(
            f"{type(model).__name__} can't be guarded: the recurrent states of its layers {sorted(missing)} are not "
            "in its cache, so they can't be rolled back."
        )


def _read(model: Any, cache: Any, sizes: Sequence[int]) -> Tensor:
    """Logits of a few tokens, read in parts of these sizes."""
    names = inspect.signature(model.forward).parameters
    size, device = model.config.get_text_config(decoder=True).vocab_size, input_device(model)
    ids_T = torch.tensor([size * (2 * at + 1) // (2 * PROBE) for at in range(PROBE)], device=device)
    logits, start = [], 0
    for num in sizes:
        ends = slice(start, start + num)
        places = {"position_ids": torch.arange(PROBE, device=device)[None, ends]} if "position_ids" in names else {}
        given: dict[str, Any] = {cache_argument(model): cache, **places, "use_cache": True, "return_dict": True}
        logits.append(model(input_ids=ids_T[None, ends], **given).logits[0])
        start += num
    return torch.cat(logits)


@contextmanager
def _noting_writes(model: nn.Module, cache: Any, owners: dict[nn.Module, list[Key]]) -> Iterator[None]:
    """Notes for every state of a cache the innermost module that writes it."""
    running: list[nn.Module] = []

    def leave(*_: Any) -> None:
        running.pop()

    hooks: list[Any] = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _: running.append(module)))
        hooks.append(module.register_forward_hook(leave))
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            for kind, name in (("conv_states", "update_conv_state"), ("recurrent_states", "update_recurrent_state")):
                setattr(layer, name, _noting(getattr(layer, name), at, kind, running, owners))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _noting(
    write: Callable[..., Any], at: int, kind: str, running: Sequence[nn.Module], owners: dict[nn.Module, list[Key]]
) -> Callable[..., Any]:
    def noted(states: Tensor, state_idx: int = 0, **kwargs: Any) -> Any:
        keys, key = owners.setdefault(running[-1], []), Key(at, kind, state_idx)
        if key not in keys:
            keys.append(key)
        return write(states, state_idx, **kwargs)

    return noted
