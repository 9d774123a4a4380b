"""Weights on a CPU, copied into the layout that its kernels read fastest. The products stay the same.

A forward over few tokens is little but reading weights, and oneDNN reads a matrix that lies in blocks up to twice as
fast as one that lies in rows. torch.compile does the same when it freezes a model; here it takes no compilation, and a
tenth of a second for 100 million weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

MAX_AUTO_BYTES = 2**30
"""Packed weights take as much memory again. Up to this size nobody has to be asked."""


_PACKED: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()


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


class PackedLinear:
    """The forward of a linear layer with a packed copy of its weights.

    Args:
        layer (`torch.nn.Linear`): On a CPU.
        fingerprint (`tuple[int, ...]`): Tells whether the copy is still one.
    """

    def __init__(self, layer: Any, fingerprint: tuple[int, ...]):
        packed = pack(layer.weight)
        assert packed is not None
        self.weight, self.packed, self.bias, self.fingerprint = layer.weight, packed, layer.bias, fingerprint
        # the matrix is kept alive here, so that no other one can take its place in memory while the copy exists
        _PACKED_BY_PLACE[_place(self.weight)] = packed

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's outputs."""
        if torch.compiler.is_compiling():
            return torch.ops.safespec_hf.multiply(inputs, self.weight, self.bias)
        return multiply(inputs, self.packed, self.bias)


# torch.compile can't trace a tensor of oneDNN's layout, so compiled code finds it by the matrix it was packed from
_PACKED_BY_PLACE: WeakValueDictionary[tuple[int, ...], Tensor] = WeakValueDictionary()
_LIBRARY = torch.library.Library("safespec_hf", "DEF")
_LIBRARY.define("multiply(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")


def _multiply_compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(inputs, _PACKED_BY_PLACE[_place(weight)], bias)


def _shape_compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


_LIBRARY.impl("multiply", _multiply_compiled, "CPU")
torch.library.register_fake("safespec_hf::multiply", _shape_compiled, lib=_LIBRARY)


def _place(weight: Tensor) -> tuple[int, ...]:
    return weight.data_ptr(), *weight.shape


@contextmanager
def packed_weights(models: Sequence[nn.Module], is_wanted: bool | None = None) -> Iterator[None]:
    """Runs the linear layers of models with packed weights.

    Copies are kept for the next time, as long as the layer lives and its weights are the same.

    Args:
        models (`Sequence[torch.nn.Module]`):
            What is on a CPU in float32 or bfloat16 is packed, the rest is left alone.
        is_wanted (`bool`, *optional*): `None` packs if the weights take at most 1 GiB.
    """
    layers: list[Any] = [layer for model in models for layer in model.modules() if _is_plain_linear(layer)]
    num_bytes = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if is_wanted is False or (is_wanted is None and num_bytes > MAX_AUTO_BYTES):
        layers = []
    patched = []
    try:
        for layer in layers:
            # in the instance's own dictionary, where `Module.__call__` looks first
            layer.__dict__["forward"] = _packed(layer)
            patched.append(layer)
        yield
    finally:
        for layer in patched:
            layer.__dict__.pop("forward", None)


def is_plain(weight: Tensor) -> bool:
    """Whether it is no tensor type of its own, as quantized and distributed weights are."""
    return type(weight) in (Tensor, nn.Parameter)


def _is_plain_linear(layer: Any) -> bool:
    """Whether it is a linear layer and nothing more: no adapter, no offloading hook, no quantization."""
    is_linear = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    is_linear = is_linear and "forward" not in layer.__dict__ and is_plain(layer.weight)
    return is_linear and layer.weight.device.type == "cpu" and _is_supported(layer.weight.dtype)


def _packed(layer: Any) -> PackedLinear:
    bias = 0 if layer.bias is None else layer.bias.data_ptr()
    version = 0 if layer.weight.is_inference() else layer.weight._version  # inference tensors have none
    now = (layer.weight.data_ptr(), version, _sum_bits(layer.weight.detach()), bias)
    known = _PACKED.get(layer)
    if known is None or known.fingerprint != now:
        known = _PACKED[layer] = PackedLinear(layer, now)
    return known


def _sum_bits(weight: Tensor) -> int:
    """Changes with the weights, even where the version counter does not, as when an adapter is merged."""
    bits = weight.reshape(-1).view(torch.int16)
    num = bits.numel() // 4 * 4  # as 64-bit numbers they are read as fast as memory can
    return int(bits[:num].view(torch.int64).sum()) + int(bits[num:].sum())


@functools.cache
def _is_supported(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
