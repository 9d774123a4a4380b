"""Weights on a CPU, copied into the layout that its kernels read fastest. The products stay the same.

A forward over few tokens is little but reading weights, and oneDNN reads a matrix that lies in blocks up to twice as
fast as one that lies in rows. torch.compile does the same when it freezes a model; here it takes no compilation, and a
tenth of a second for 100 million weights.

A copy lives as long as the memory that it was made from: moving, recasting or loading weights lets go of it, and so
does [`release_packed`].
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .sharing import Shared, ThreadSwitch

MAX_AUTO_BYTES = 2**30
"""Packed weights take as much memory again. Up to this size nobody has to be asked."""
_WIDTH, _NUM_ROWS = 1024, 256  # weights are read for a fingerprint in rows, of which so many stay in a core's cache


def pack(weight: Tensor) -> Tensor | None:
    """A packed copy of a matrix, for [`multiply`]; `None` where there is no such thing."""
    if weight.device.type != "cpu" or not _is_supported(weight.dtype):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def multiply(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a packed matrix. Has no gradient. Sums may be taken in another order.

    Example:

        >>> import torch
        >>> weight = torch.eye(2, dtype=torch.bfloat16)
        >>> packed = pack(weight)
        >>> inputs = torch.ones(1, 2, dtype=torch.bfloat16)
        >>> (inputs if packed is None else multiply(inputs, packed, None)).tolist()
        [[1.0, 1.0]]
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")


class _Copy(NamedTuple):
    matrix: Tensor
    fingerprint: int
    end: weakref.finalize[[Any, None], Any]


# By the place of the original: torch.compile can't trace a tensor of oneDNN's layout, so compiled code looks here
_COPIES: dict[tuple[object, ...], _Copy] = {}
# One for each layer: compiled code remembers which one it saw
_FORWARDS: weakref.WeakKeyDictionary[nn.Module, PackedLinear] = weakref.WeakKeyDictionary()
_PATCHES = Shared()
_PACKS = ThreadSwitch()


class PackedLinear:
    """The forward of a linear layer: with packed weights in the threads that want it, elsewhere the layer's own.

    It holds weights for the time of calls only, so that it keeps none in memory.

    Args:
        layer (`torch.nn.Linear`): On a CPU.
    """

    def __init__(self, layer: nn.Linear):
        self.layer = weakref.ref(layer)
        self.weight: Any = None
        self.bias: Tensor | None = None
        self.packed: Tensor | None = None

    def put_on(self) -> Callable[[], None]:
        """Becomes the layer's forward; returns what undoes it."""
        # in the instance's own dictionary, where `Module.__call__` looks first
        vars(self.layer())["forward"] = self
        return self._take_off

    def _take_off(self) -> None:
        vars(self.layer()).pop("forward", None)
        self.weight = self.bias = self.packed = None

    def update(self) -> None:
        """Takes the weights that the layer has now."""
        layer: Any = self.layer()
        self.weight, self.bias = layer.weight, layer.bias
        self.packed = _find_copy(layer.weight)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's outputs."""
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                return nn.functional.linear(inputs, self.weight, self.bias)
            return torch.ops.safespec_hf.multiply(inputs, self.weight, self.bias)
        packed = self.packed
        if packed is None or not _PACKS.is_on or torch.is_autocast_enabled("cpu"):
            return nn.Linear.forward(self.layer(), inputs)  # type: ignore[arg-type]  # who calls has it
        return multiply(inputs, packed, self.bias)

    def __reduce__(self) -> Any:
        # a copy of the model that is made while a call runs gets the layer's own forward, of its own layer
        return _own_forward, (self.layer(),)


def _own_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return types.MethodType(nn.Linear.forward, layer)


_LIBRARY = torch.library.Library("safespec_hf", "DEF")
_LIBRARY.define("multiply(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")


def _multiply_compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    known = _COPIES.get(_place(weight))
    if known is None:  # somebody else's compiled forward, which was traced while a call was running
        return nn.functional.linear(inputs, weight, bias)
    return multiply(inputs, known.matrix, bias)


def _shape_compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


_LIBRARY.impl("multiply", _multiply_compiled, "CPU")
torch.library.register_fake("safespec_hf::multiply", _shape_compiled, lib=_LIBRARY)


@contextmanager
def packed_weights(models: Sequence[nn.Module], is_wanted: bool | None = None) -> Iterator[None]:
    """Runs the linear layers of models with packed weights, in this thread.

    Copies are kept for the next time, as long as the weights are the same. Under autocast, which casts weights as it
    goes, nothing is packed.

    Args:
        models (`Sequence[torch.nn.Module]`):
            What is on a CPU in float32 or bfloat16 is packed, the rest is left alone.
        is_wanted (`bool`, *optional*): `None` packs if the weights take at most 1 GiB.
    """
    layers: list[Any] = [layer for model in models for layer in model.modules() if _is_plain_linear(layer)]
    num_bytes = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    is_too_large = is_wanted is None and num_bytes > MAX_AUTO_BYTES
    if is_wanted is False or is_too_large or torch.is_autocast_enabled("cpu"):
        layers = []
    with (
        _PATCHES.held({id(layer): _forward_of(layer).put_on for layer in layers}),
        _PACKS.turned(bool(layers)),
    ):
        for layer in layers:
            _forward_of(layer).update()
        yield


def release_packed(model: nn.Module) -> None:
    """Lets go of the packed copies of a model's weights; they are made anew where they are wanted again.

    Args:
        model (`torch.nn.Module`): The model.
    """
    for layer in model.modules():
        known = _COPIES.pop(_place(layer.weight), None) if isinstance(layer, nn.Linear) else None
        if known is not None:
            known.end.detach()


def is_plain(weight: Tensor) -> bool:
    """Whether it is no tensor type of its own, as quantized and distributed weights are."""
    return type(weight) in (Tensor, nn.Parameter)


def _forward_of(layer: nn.Linear) -> PackedLinear:
    known = _FORWARDS.get(layer)
    return _FORWARDS.setdefault(layer, PackedLinear(layer)) if known is None else known


def _is_plain_linear(layer: Any) -> bool:
    """Whether it is a linear layer and nothing more: no adapter, no offloading hook, no quantization."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    forward, weights = layer.__dict__.get("forward"), [layer.weight, *([] if layer.bias is None else [layer.bias])]
    is_free = forward is None or isinstance(forward, PackedLinear)  # of another thread's call
    is_fit = all(is_plain(weight) and weight.dtype == layer.weight.dtype for weight in weights)
    return is_free and is_fit and layer.weight.device.type == "cpu" and _is_supported(layer.weight.dtype)


def _place(weight: Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


def _find_copy(weight: Tensor) -> Tensor:
    place, now = _place(weight), fingerprint(weight)
    known = _COPIES.get(place)
    if known is not None and known.fingerprint == now:
        return known.matrix
    if known is not None:
        known.end.detach()
    matrix, end = pack(weight), weakref.finalize(weight.untyped_storage(), _COPIES.pop, place, None)
    end.atexit = False
    assert matrix is not None
    _COPIES[place] = _Copy(matrix, now, end)
    return matrix


def fingerprint(weight: Tensor) -> int:
    """A number that changes with any bit of a matrix and with the order of its numbers, at the speed of reading them.

    The version counter would not do: merging an adapter, or whatever else writes through `.data`, leaves it as it is.

    Example:

        >>> import torch
        >>> rows = torch.eye(3)
        >>> fingerprint(rows) == fingerprint(rows.clone()), fingerprint(rows) == fingerprint(rows[[1, 0, 2]])
        (True, False)
    """
    bits = weight.detach().reshape(-1).view(torch.int16)
    num = bits.numel() // 4 * 4  # as 64-bit numbers they are read as fast as memory can
    words = bits[:num].view(torch.int64)
    num_rows, num_rest = divmod(words.numel(), _WIDTH)
    rows = words[: num_rows * _WIDTH].view(num_rows, _WIDTH)
    # A number counts as often as the multipliers of its row and its column say, together: whatever is swapped, the sum
    # changes. Sums over rows and columns need no product of 64-bit numbers, which is slow, for every one of them.
    # Odd multipliers lose no bit, and sums are taken modulo 2**64.
    column_W, row_R = _multipliers(_WIDTH), _multipliers(num_rows + 2)
    total = torch.zeros((), dtype=torch.int64)
    for start in range(0, num_rows, _NUM_ROWS):
        part = rows[start : start + _NUM_ROWS]
        total += torch.dot(part.sum(dim=1), row_R[start : min(start + _NUM_ROWS, num_rows)])
        # the multipliers together are even where both are odd: those of columns are made even, so that none is lost
        total += torch.dot(part.sum(dim=0), column_W - 1)
    rest = torch.dot(words[num_rows * _WIDTH :], column_W[:num_rest]) * row_R[num_rows]
    end = torch.dot(bits[num:].to(torch.int64), column_W[: bits.numel() - num]) * row_R[num_rows + 1]
    return int(total + rest + end)


@functools.lru_cache(maxsize=256)
def _multipliers(num: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(-(2**62), 2**62, (num,), generator=generator, dtype=torch.int64).mul_(2).add_(1)


@functools.cache
def _is_supported(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
