"""Products of a few tokens with a matrix on a CPU, from copies of it in layouts that kernels read faster than rows.

A forward over few tokens is little but reading weights. Which layout is read fastest depends on the CPU, the format of
the weights and the number of tokens, and is measured: bfloat16 products of several tokens, for one, are emulated on
most CPUs, and take several times as long as they would elsewhere.
"""

from __future__ import annotations

import functools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .private_names import (
    has_bfloat16_blocks,
    has_blocked_products,
    multiplies_bfloat16,
    multiply_by_blocks,
    to_blocks,
)

PLAIN = "plain"
"""The name of the product that a layer has by itself."""
WIDTHS = (1, 4, 16, 64)
"""Tokens for which products are timed."""
FEW_ROWS, MAX_STEP = 32, 64
"""Rows from which on some are added, and how many at most."""
_NARROWEST = (1, 2, 9, 33)  # from how many on each of them counts
HOPELESS = 2.0  # a layout that takes so many times as long as another for several tokens is not tried with many
SAMPLE_BYTES = 2**25  # of a model's weights, which are timed instead of all of them
CLEARLY = 0.95  # a second layout has to save a twentieth of the time: it takes memory
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a half's numbers the smallest have a step of 2**-24, where the largest is scaled to less than 2**15
_TOLERANCE = 2.0**-38


class Layout(NamedTuple):
    """A way to keep a matrix.

    Attributes:
        pack (`Callable`): A copy of a weight, or `None` where it can't be kept this way.
        multiply (`Callable`): `torch.nn.functional.linear` of inputs with a copy, and with a bias or `None`.
        num_bytes (`Callable`): That a copy of a weight takes.
    """

    pack: Callable[[Tensor], Any]
    multiply: Callable[[Tensor, Any, Tensor | None], Tensor]
    num_bytes: Callable[[Tensor], int]


def pack_blocks(weight: Tensor) -> Tensor | None:
    """A matrix in oneDNN's blocks, in its own format; `None` where there is no such thing."""
    if weight.device.type != "cpu" or not _has_blocks(weight.dtype):
        return None
    return to_blocks(weight.detach())


def multiply_blocks(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with blocks. Has no gradient. Sums may be taken in another order.

    oneDNN makes a kernel for each number of rows, in milliseconds, and keeps a thousand of them, of some 0.6 MiB each.
    So that prompts of all lengths do not make a process grow by that much, many rows are read as a few more.

    Example:

        >>> import torch
        >>> weight = torch.eye(2)
        >>> packed = pack_blocks(weight)
        >>> (torch.ones(1, 2) if packed is None else multiply_blocks(torch.ones(1, 2), packed, None)).tolist()
        [[1.0, 1.0]]
    """
    num = inputs.numel() // max(inputs.shape[-1], 1)
    if num == (num_read := round_rows(num)):
        return multiply_by_blocks(inputs, packed, bias)
    rows = functional.pad(inputs.reshape(num, -1), (0, 0, 0, num_read - num))
    return multiply_by_blocks(rows, packed, bias)[:num].view(*inputs.shape[:-1], -1)


def round_rows(num: int) -> int:
    """The number of rows that so many are read as: itself where it is small, else at most an eighth more.

    Example:

        >>> [round_rows(num) for num in (1, 31, 33, 100, 1000)]
        [1, 31, 36, 104, 1024]
    """
    step = 1 if num < FEW_ROWS else min(1 << (num.bit_length() - 4), MAX_STEP)
    return -(-num // step) * step


class Halves(NamedTuple):
    """A matrix in FBGEMM's layout of 16-bit floats, with products and sums in 32 bits.

    Attributes:
        matrix: Its numbers times a power of two, so that the largest fit.
        unscale (`float`): Takes that back, in products.
    """

    matrix: Any
    unscale: float


def pack_halves(weight: Tensor) -> Halves | None:
    """A matrix as 16-bit floats, if they hold its numbers: those of bfloat16 and float16 do, once they are scaled.

    So are those of most float32 models, which were trained and published in bfloat16.

    Returns:
        `Halves`, or `None` where they don't, or where there is no such product. What is lost of a number is less than
        2**-38 of the largest one, which float32 sums lose as well.
    """
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or weight.dim() != 2 or not _has_halves():
        return None
    weight = weight.detach()
    largest = max((abs(float(number)) for number in torch.aminmax(weight)), default=0.0) if weight.numel() else 0.0
    if not math.isfinite(largest):
        return None
    scale = 2.0 ** max(min(15 - math.frexp(largest)[1], 60), -60)  # the scaled ones lie below 2**15
    wide = weight.float() * scale
    if weight.dtype == torch.float32 and weight.numel():
        lost = float((wide - wide.half().float()).abs().max())
        if not lost <= 2**15 * _TOLERANCE:
            return None
    return Halves(torch.ops.quantized.linear_prepack_fp16(wide, None), 1 / scale)


def multiply_halves(inputs: Tensor, packed: Halves, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with halves; inputs may be in any format. Has no gradient."""
    outputs = torch.ops.quantized.linear_dynamic_fp16(inputs.float(), packed.matrix).mul_(packed.unscale)
    if bias is not None:
        outputs += bias
    return outputs.to(inputs.dtype)


LAYOUTS: Mapping[str, Layout] = {
    "blocks": Layout(pack_blocks, multiply_blocks, lambda weight: weight.numel() * weight.element_size()),
    "halves": Layout(pack_halves, multiply_halves, lambda weight: weight.numel() * 2),
}


def width_index(num_tokens: int) -> int:
    """Which of [`WIDTHS`] stands for a number of tokens.

    Example:

        >>> [width_index(num) for num in (1, 2, 8, 9, 500)]
        [0, 1, 1, 2, 3]
    """
    return bisect_right(_NARROWEST, num_tokens, lo=1) - 1


def usual_layouts(dtype: torch.dtype) -> tuple[str, ...]:
    """What is fastest by what the CPU says of itself: blocks where it multiplies such numbers, elsewhere halves."""
    has_own = dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bfloat16())
    return (("blocks" if has_own and _has_blocks(dtype) else "halves" if _has_halves() else PLAIN),) * len(WIDTHS)


def fastest_layouts(weights: Iterable[Tensor]) -> tuple[str, ...]:
    """Times the products of some of a model's weights.

    Args:
        weights (`Iterable[torch.Tensor]`): Its matrices, of one format.

    Returns:
        `tuple[str, ...]`: For each of [`WIDTHS`] the name of a layout, or [`PLAIN`].
    """
    sample, size = [], 0
    for weight in weights:
        sample.append(weight.detach())
        size += weight.numel() * weight.element_size()
        if size >= SAMPLE_BYTES:
            break
    copies = {name: [layout.pack(weight) for weight in sample] for name, layout in LAYOUTS.items()}
    runs = {PLAIN: [functools.partial(_plain, weight) for weight in sample]}
    for name, packed in copies.items():
        if all(copy is not None for copy in packed):
            runs[name] = [functools.partial(_packed, LAYOUTS[name], copy) for copy in packed]
    sizes = {weight.shape[1] for weight in sample}
    seconds: dict[tuple[str, int], float] = {}
    for width in WIDTHS:
        inputs = {num: torch.ones(width, num, dtype=sample[0].dtype) for num in sizes}
        given = [inputs[weight.shape[1]] for weight in sample]
        for name in [*runs] * (2 if width < WIDTHS[-1] else 1):
            start = time.perf_counter()
            for product, each in zip(runs[name], given, strict=True):
                product(each)
            seconds[name, width] = min(seconds.get((name, width), math.inf), time.perf_counter() - start)
        least = HOPELESS * min(seconds[name, width] for name in runs)
        runs = {name: run for name, run in runs.items() if width == 1 or seconds[name, width] <= least}
    # for prompts a layout counts like any other: they are long, but there is one of them in a call
    usual = min(runs, key=lambda name: sum(seconds[name, width] for width in WIDTHS[:-1]))
    chosen = []
    for width in WIDTHS:
        found = {name: time for (name, at), time in seconds.items() if at == width}
        best = min(found, key=lambda name: found[name])
        chosen.append(best if found[best] < CLEARLY * found[usual] else usual)
    return tuple(chosen)


def _plain(weight: Tensor, inputs: Tensor) -> Tensor:
    return functional.linear(inputs, weight)


def _packed(layout: Layout, copy: Any, inputs: Tensor) -> Tensor:
    return layout.multiply(inputs, copy, None)


@functools.cache
def _has_blocks(dtype: torch.dtype) -> bool:
    if not has_blocked_products():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16_blocks())


@functools.cache
def _has_halves() -> bool:
    """Whether this torch multiplies with halves, and rightly: shown on a small matrix."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm") or not hasattr(torch.ops, "quantized"):
        return False
    rows = torch.arange(12.0).view(3, 4)
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(rows, None)
        found = torch.ops.quantized.linear_dynamic_fp16(rows[:2], packed)
    except (AttributeError, NotImplementedError, RuntimeError):  # built without it, or for another CPU
        return False
    return torch.equal(found, rows[:2] @ rows.T)
