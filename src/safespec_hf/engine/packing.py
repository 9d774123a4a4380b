"""Weights on a CPU, copied into the layouts that its kernels read fastest. The products stay the same.

torch.compile does the same when it freezes a model; here it takes no compilation, and some tenths of a second for 100
million weights. Layouts are chosen by [`products`][safespec_hf.engine.products].

A copy lives as long as the memory that it was made from: moving, recasting or loading weights lets go of it, and so
does [`release_packed`].
"""

from __future__ import annotations

import functools
import math
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .products import DTYPES, LAYOUTS, PLAIN, WIDTHS, fastest_layouts, usual_layouts, width_index
from .sharing import Shared, ThreadSwitch
from .speeds import describe, is_timed, remembered
from .traits import is_plain

MAX_AUTO_BYTES = 2**30
"""Packed weights take as much memory again. Up to this size nobody has to be asked."""
SPARE = "blocks"
"""For float32 weights that do not fit into the layout that was chosen."""
_WIDTH, _NUM_ROWS = 1024, 256  # weights are read for a fingerprint in rows, of which so many stay in a core's cache


@dataclass(slots=True)
class _Copies:
    """Of one weight: by the name of the layout, `None` where it can't be kept in it; and the products in use."""

    fingerprint: int
    end: weakref.finalize[[Any, None], Any]
    matrices: dict[str, Any] = field(default_factory=dict)
    in_use: list[Product | None] = field(default_factory=list)

    def products(self, layouts: Sequence[str]) -> list[Product | None]:
        """For each of [`WIDTHS`] what multiplies, or `None` where that is the layer itself."""
        found = {
            name: Product(LAYOUTS[name].multiply, copy) for name, copy in self.matrices.items() if copy is not None
        }
        return [None if name == PLAIN else found.get(name, found.get(SPARE)) for name in layouts]


class Product(NamedTuple):
    """A product with a copy of a weight."""

    multiply: Callable[[Tensor, Any, Tensor | None], Tensor]
    matrix: Any


_COPIES: dict[tuple[object, ...], _Copies] = {}
"""By the place of the original: torch.compile can't trace tensors of such layouts, so compiled code looks here."""
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
        self.products: list[Product | None] = []

    def put_on(self) -> Callable[[], None]:
        """Becomes the layer's forward; returns what undoes it."""
        # in the instance's own dictionary, where `Module.__call__` looks first
        vars(self.layer())["forward"] = self
        return self._take_off

    def _take_off(self) -> None:
        vars(self.layer()).pop("forward", None)
        self.weight = self.bias = None
        self.products = []

    def update(self, products: list[Product | None]) -> None:
        """Takes the weights that the layer has now, and their products for [`WIDTHS`]."""
        layer: Any = self.layer()
        self.weight, self.bias = layer.weight, layer.bias
        self.products = products

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's outputs."""
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                return nn.functional.linear(inputs, self.weight, self.bias)
            return torch.ops.safespec_hf.multiply(inputs, self.weight, self.bias)
        product = _choose(self.products, inputs) if _PACKS.is_on else None
        if product is None or torch.is_autocast_enabled("cpu"):
            return nn.Linear.forward(self.layer(), inputs)  # type: ignore[arg-type]  # who calls has it
        return product.multiply(inputs, product.matrix, self.bias)

    def __reduce__(self) -> Any:
        # a copy of the model that is made while a call runs gets the layer's own forward, of its own layer
        return _own_forward, (self.layer(),)


def _choose(products: Sequence[Product | None], inputs: Tensor) -> Product | None:
    return products[width_index(inputs.numel() // inputs.shape[-1])] if products else None


def _own_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return types.MethodType(nn.Linear.forward, layer)


_LIBRARY = torch.library.Library("safespec_hf", "DEF")
_LIBRARY.define("multiply(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")


def _multiply_compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    known = _COPIES.get(_place(weight))
    product = None if known is None else _choose(known.in_use, inputs)
    if product is None:  # such as in somebody else's compiled forward, which was traced while a call was running
        return nn.functional.linear(inputs, weight, bias)
    return product.multiply(inputs, product.matrix, bias)


def _shape_compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


_LIBRARY.impl("multiply", _multiply_compiled, "CPU")
torch.library.register_fake("safespec_hf::multiply", _shape_compiled, lib=_LIBRARY)


@contextmanager
def packed_weights(
    models: Sequence[nn.Module], is_wanted: bool | None = None, is_measured: bool = True
) -> Iterator[None]:
    """Runs the linear layers of models with packed weights, in this thread.

    Copies are kept for the next time, as long as the weights are the same. Under autocast, which casts weights as it
    goes, nothing is packed.

    Args:
        models (`Sequence[torch.nn.Module]`):
            What is on a CPU in float32, bfloat16 or float16 is packed if that is faster, the rest is left alone.
        is_wanted (`bool`, *optional*): `None` packs if the copies take at most 1 GiB.
        is_measured (`bool`, defaults to `True`):
            Whether to choose layouts by measurement, once on a machine, instead of by the kind of its CPU.
    """
    plans: list[tuple[Any, tuple[str, ...]]] = []
    if is_wanted is not False and not torch.is_autocast_enabled("cpu"):
        plans = _plan(models, math.inf if is_wanted else MAX_AUTO_BYTES, is_measured)
    with (
        _PATCHES.held({id(layer): _forward_of(layer).put_on for layer, _ in plans}),
        _PACKS.turned(bool(plans)),
    ):
        copies = _find_copies([(layer.weight, layouts) for layer, layouts in plans])
        for (layer, layouts), found in zip(plans, copies, strict=True):
            found.in_use = found.products(layouts)
            _forward_of(layer).update(found.in_use)
        yield


def _plan(models: Sequence[nn.Module], most_bytes: float, is_measured: bool) -> list[tuple[Any, tuple[str, ...]]]:
    """Layers to pack, and the layouts of each for [`WIDTHS`]."""
    layers: list[list[Any]] = [[each for each in model.modules() if _is_plain_linear(each)] for model in models]
    least = sum(2 * layer.weight.numel() for some in layers for layer in some)
    if least > most_bytes:
        return []
    plans = []
    for model, some in zip(models, layers, strict=True):
        for dtype in {layer.weight.dtype for layer in some}:
            own = [layer for layer in some if layer.weight.dtype == dtype]
            is_worth_it = is_measured and is_timed(model, sum(layer.weight.numel() for layer in own))
            layouts = _layouts(model, own, dtype) if is_worth_it else usual_layouts(dtype)
            plans += [(layer, layouts) for layer in own]
    if _num_bytes(plans) > most_bytes:
        # rather one copy than none: that for a few tokens, which most forwards are over
        plans = [(layer, (layouts[1],) * len(layouts)) for layer, layouts in plans]
    plans = [(layer, layouts) for layer, layouts in plans if set(layouts) != {PLAIN}]
    return plans if _num_bytes(plans) <= most_bytes else []


def _layouts(model: nn.Module, layers: Sequence[Any], dtype: torch.dtype) -> tuple[str, ...]:
    return remembered(
        "layouts",
        {"model": describe(model), "dtype": str(dtype)},
        lambda: fastest_layouts(layer.weight for layer in layers),
        _read_layouts,
    )


def _read_layouts(names: Sequence[str]) -> tuple[str, ...]:
    if len(names) != len(WIDTHS) or not set(names) <= {PLAIN, *LAYOUTS}:
        raise ValueError(f"Not names of layouts: {names}.")
    return tuple(names)


def _num_bytes(plans: Sequence[tuple[Any, tuple[str, ...]]]) -> int:
    return sum(LAYOUTS[name].num_bytes(layer.weight) for layer, names in plans for name in {*names} - {PLAIN})


def release_packed(model: nn.Module) -> None:
    """Lets go of the packed copies of a model's weights; they are made anew where they are wanted again.

    Args:
        model (`torch.nn.Module`): The model.
    """
    for layer in model.modules():
        known = _COPIES.get(_place(layer.weight)) if isinstance(layer, nn.Linear) else None
        if known is not None:
            known.end()


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
    return is_free and is_fit and layer.weight.device.type == "cpu" and layer.weight.dtype in DTYPES


def _place(weight: Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


def _find_copies(weights: Sequence[tuple[Tensor, Sequence[str]]]) -> list[_Copies]:
    """Those that are there, and those that are not yet: packed side by side, as each takes one core."""
    found = [_copies_of(weight) for weight, _ in weights]
    pairs = list(zip(found, weights, strict=True))
    _fill([(copies, weight, name) for copies, (weight, layouts) in pairs for name in {*layouts} - {PLAIN}])
    # layouts are chosen for models of a kind, and those of another one may hold numbers that do not fit in
    _fill(
        [
            (copies, weight, SPARE)
            for copies, (weight, layouts) in pairs
            if weight.dtype == torch.float32 and any(copies.matrices.get(name, weight) is None for name in layouts)
        ]
    )
    return found


def _fill(wanted: Sequence[tuple[_Copies, Tensor, str]]) -> None:
    # tied weights are there once
    missing = {(id(copies), name): (copies, weight, name) for copies, weight, name in wanted}
    missing = {key: each for key, each in missing.items() if key[1] not in each[0].matrices}
    if not missing:
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for (copies, _, name), matrix in zip(missing.values(), pool.map(_pack, missing.values()), strict=True):
            copies.matrices[name] = matrix


def _pack(missing: tuple[_Copies, Tensor, str]) -> Any:
    _, weight, name = missing
    return LAYOUTS[name].pack(weight)


def _copies_of(weight: Tensor) -> _Copies:
    place, now = _place(weight), fingerprint(weight)
    known = _COPIES.get(place)
    if known is not None and known.fingerprint != now:
        known.end()
        known = None
    if known is None:
        end = weakref.finalize(weight.untyped_storage(), _COPIES.pop, place, None)
        end.atexit = False
        known = _COPIES[place] = _Copies(now, end)
    return known


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
