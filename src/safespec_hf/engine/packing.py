"""Weights on a CPU, copied into the layouts that its kernels read fastest. The products stay the same.

torch.compile does the same when it freezes a model; here it takes no compilation, and some tenths of a second for 100
million weights. Layouts are chosen by [`products`][safespec_hf.engine.products].

A copy lives as long as the memory that it was made from: moving, recasting or loading weights lets go of it, and so
does [`release_packed`].
"""

from __future__ import annotations

import math
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fingerprints import fingerprint
from .private_names import has_hooks
from .products import DTYPES, LAYOUTS, PLAIN, WIDTHS, fastest_layouts, usual_layouts, width_index
from .sharing import Shared, ThreadSwitch
from .speeds import describe, is_timed, remembered
from .traits import is_plain

MAX_AUTO_BYTES = 2**30
"""Packed weights take as much memory again. Up to this size nobody has to be asked."""
SPARE = "blocks"
"""For float32 weights that do not fit into the layout that was chosen."""


class Product(NamedTuple):
    """A product with a copy of a weight."""

    multiply: Callable[[Tensor, Any, Tensor | None], Tensor]
    matrix: Any


@dataclass(slots=True)
class _Copies:
    """Of a stack's weights: by the name of the layout, `None` where they can't be kept in it; and those in use."""

    fingerprints: list[int]
    ends: list[weakref.finalize[[Any, None], Any]]
    matrices: dict[str, Any] = field(default_factory=dict)
    in_use: list[Product | None] = field(default_factory=list)

    def products(self, layouts: Sequence[str]) -> list[Product | None]:
        """For each of [`WIDTHS`] what multiplies, or `None` where that is the layers themselves."""
        found = {
            name: Product(LAYOUTS[name].multiply, copy) for name, copy in self.matrices.items() if copy is not None
        }
        return [None if name == PLAIN else found.get(name, found.get(SPARE)) for name in layouts]

    def end(self) -> None:
        """Lets go of them."""
        for end in self.ends:
            end()


_COPIES: dict[tuple[tuple[object, ...], ...], _Copies] = {}
"""By the places of the originals: torch.compile can't trace tensors of such layouts, so compiled code looks here."""
# One for each layer: compiled code remembers which one it saw
_FORWARDS: weakref.WeakKeyDictionary[nn.Module, PackedLinear] = weakref.WeakKeyDictionary()
_PATCHES = Shared()
_PACKS = ThreadSwitch()


class Stack:
    """Linear layers that read the same inputs: with packed weights, one product with the rows of all of them.

    It holds weights for the time of calls only, so that it keeps none in memory.

    Args:
        layers (`Sequence[torch.nn.Linear]`): One or more.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self._layers = [weakref.ref(layer) for layer in layers]
        self.bias: Tensor | None = None
        self.products: list[Product | None] = []

    @property
    def layers(self) -> list[Any]:
        """The layers."""
        return [layer() for layer in self._layers]

    @property
    def weights(self) -> list[Tensor]:
        """What they have now."""
        return [layer.weight for layer in self.layers]

    def update(self, products: list[Product | None]) -> None:
        """Takes the products of the weights that the layers have now, for [`WIDTHS`]."""
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in biases]) if len(biases) > 1 else next(iter(biases), None)
        self.products = products

    def clear(self) -> None:
        """Lets go of them."""
        self.bias, self.products = None, []

    def product(self, inputs: Tensor) -> Product | None:
        """What multiplies inputs in this thread; `None` where that is the layers themselves."""
        is_on = _PACKS.is_on and not torch.is_autocast_enabled("cpu")
        return _choose(self.products, inputs) if is_on else None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The outputs of all layers, one after the other in the last dimension."""
        product = self.product(inputs)
        if product is None:
            outputs = [layer(inputs) for layer in self.layers]
            return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return product.multiply(inputs, product.matrix, self.bias)


class PackedLinear(Stack):
    """The forward of a linear layer: with packed weights in the threads that want it, elsewhere the layer's own.

    Args:
        layer (`torch.nn.Linear`): On a CPU.
    """

    def __init__(self, layer: nn.Module):
        super().__init__([layer])
        self.layer = self._layers[0]
        self.weight: Any = None

    def put_on(self) -> Callable[[], None]:
        """Becomes the layer's forward; returns what undoes it."""
        # in the instance's own dictionary, where `Module.__call__` looks first
        vars(self.layer())["forward"] = self
        return self._take_off

    def _take_off(self) -> None:
        vars(self.layer()).pop("forward", None)
        self.weight = None
        self.clear()

    def update(self, products: list[Product | None]) -> None:
        super().update(products)
        layer: Any = self.layer()
        self.weight = layer.weight

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layer's outputs."""
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                return nn.functional.linear(inputs, self.weight, self.bias)
            return torch.ops.safespec_hf.multiply(inputs, self.weight, self.bias)
        product = self.product(inputs)
        if product is None:
            return nn.Linear.forward(self.layer(), inputs)  # type: ignore[arg-type]  # who calls has it
        return product.multiply(inputs, product.matrix, self.bias)

    def __reduce__(self) -> Any:
        # a copy of the model that is made while a call runs gets the layer's own forward, of its own layer
        return own_forward, (self.layer(),)


def _choose(products: Sequence[Product | None], inputs: Tensor) -> Product | None:
    return products[width_index(inputs.numel() // inputs.shape[-1])] if products else None


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, for this one."""
    return types.MethodType(type(module).forward, module)


_LIBRARY = torch.library.Library("safespec_hf", "DEF")
_LIBRARY.define("multiply(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")


def _multiply_compiled(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    known = _COPIES.get((_place(weight),))
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
    models: Sequence[nn.Module],
    is_wanted: bool | None = None,
    is_measured: bool = True,
    stacks: Sequence[Stack] = (),
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
        stacks (`Sequence[Stack]`, *optional*): Of these layers the weights are packed together.
    """
    plans = _plan(models, stacks, is_wanted, is_measured)
    alone = [stack for stack, _ in plans if isinstance(stack, PackedLinear)]
    with _PATCHES.held({id(stack.layer()): stack.put_on for stack in alone}), _PACKS.turned(bool(plans)):
        copies = _find_copies([(stack.weights, layouts) for stack, layouts in plans])
        for (stack, layouts), found in zip(plans, copies, strict=True):
            found.in_use = found.products(layouts)
            stack.update(found.in_use)
        yield


def _plan(
    models: Sequence[nn.Module], stacks: Sequence[Stack], is_wanted: bool | None, is_measured: bool
) -> list[tuple[Stack, tuple[str, ...]]]:
    """What to pack, and the layouts of each for [`WIDTHS`]."""
    layers = [_plain_layers(model) for model in models]
    if not _may_pack(layers, is_wanted):
        return []
    most_bytes = math.inf if is_wanted else MAX_AUTO_BYTES
    plans: list[tuple[Stack, tuple[str, ...]]] = []
    for model, some in zip(models, layers, strict=True):
        for dtype in {layer.weight.dtype for layer in some}:
            own = [layer for layer in some if layer.weight.dtype == dtype]
            is_worth_it = is_measured and is_timed(model, sum(layer.weight.numel() for layer in own))
            layouts = _layouts(model, own, dtype) if is_worth_it else usual_layouts(dtype)
            plans += [(stack, layouts) for stack in _divide(own, stacks)]
    if _num_bytes(plans) > most_bytes:
        # rather one copy than none: that for a few tokens, which most forwards are over
        plans = [(stack, (layouts[1],) * len(layouts)) for stack, layouts in plans]
    plans = [(stack, layouts) for stack, layouts in plans if set(layouts) != {PLAIN}]
    return plans if _num_bytes(plans) <= most_bytes else []


def may_pack(models: Sequence[nn.Module], is_wanted: bool | None = None) -> bool:
    """Whether weights of models are packed where that is faster, for `is_wanted` of [`packed_weights`]."""
    return _may_pack(map(_plain_layers, models), is_wanted)


def _may_pack(layers: Iterable[Sequence[Any]], is_wanted: bool | None) -> bool:
    if is_wanted is not None or torch.is_autocast_enabled("cpu"):
        return bool(is_wanted) and not torch.is_autocast_enabled("cpu")
    return sum(2 * layer.weight.numel() for some in layers for layer in some) <= MAX_AUTO_BYTES


def _plain_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if is_plain_linear(layer)]


def _divide(layers: Sequence[Any], stacks: Sequence[Stack]) -> list[Stack]:
    """The stacks that consist of some of these layers, and each of the others for itself."""
    free = {id(layer): layer for layer in layers}
    found = []
    for stack in stacks:
        if all(id(layer) in free for layer in stack.layers):  # a draft may be the target itself
            found.append(stack)
            for layer in stack.layers:
                del free[id(layer)]
    return [*found, *map(_forward_of, free.values())]


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


def _num_bytes(plans: Sequence[tuple[Stack, tuple[str, ...]]]) -> int:
    return sum(
        LAYOUTS[name].num_bytes(weight)
        for stack, names in plans
        for name in {*names} - {PLAIN}
        for weight in stack.weights
    )


def release_packed(model: nn.Module) -> None:
    """Lets go of the packed copies of a model's weights; they are made anew where they are wanted again.

    Args:
        model (`torch.nn.Module`): The model.
    """
    places = {_place(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    for place, copies in tuple(_COPIES.items()):
        if not places.isdisjoint(place):
            copies.end()


def _forward_of(layer: nn.Linear) -> PackedLinear:
    known = _FORWARDS.get(layer)
    return _FORWARDS.setdefault(layer, PackedLinear(layer)) if known is None else known


def is_plain_linear(layer: Any) -> bool:
    """Whether it is a linear layer and nothing more: no adapter, no hooks, no offloading, no quantization."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or has_hooks(layer):
        return False  # a hook may set the weight before each forward, as pruning and `weight_norm` do
    forward, weights = layer.__dict__.get("forward"), [layer.weight, *([] if layer.bias is None else [layer.bias])]
    is_free = forward is None or isinstance(forward, PackedLinear)  # of another thread's call
    is_fit = all(is_plain(weight) and weight.dtype == layer.weight.dtype for weight in weights)
    return is_free and is_fit and layer.weight.device.type == "cpu" and layer.weight.dtype in DTYPES


def _place(weight: Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


def _find_copies(weights: Sequence[tuple[list[Tensor], Sequence[str]]]) -> list[_Copies]:
    """Those that are there, and those that are not yet: packed side by side, as each takes one core."""
    found = [_copies_of(some) for some, _ in weights]
    pairs = list(zip(found, weights, strict=True))
    _fill([(copies, some, name) for copies, (some, layouts) in pairs for name in {*layouts} - {PLAIN}])
    # layouts are chosen for models of a kind, and those of another one may hold numbers that do not fit in
    _fill(
        [
            (copies, some, SPARE)
            for copies, (some, layouts) in pairs
            if some[0].dtype == torch.float32 and any(copies.matrices.get(name, some) is None for name in layouts)
        ]
    )
    return found


def _fill(wanted: Sequence[tuple[_Copies, list[Tensor], str]]) -> None:
    # tied weights are there once
    missing = {(id(copies), name): (copies, weights, name) for copies, weights, name in wanted}
    missing = {key: each for key, each in missing.items() if key[1] not in each[0].matrices}
    if not missing:
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for (copies, _, name), matrix in zip(missing.values(), pool.map(_pack, missing.values()), strict=True):
            copies.matrices[name] = matrix


def _pack(missing: tuple[_Copies, list[Tensor], str]) -> Any:
    _, weights, name = missing
    return LAYOUTS[name].pack(torch.cat([weight.detach() for weight in weights]) if weights[1:] else weights[0])


def _copies_of(weights: list[Tensor]) -> _Copies:
    places, now = tuple(map(_place, weights)), list(map(fingerprint, weights))
    known = _COPIES.get(places)
    if known is not None and known.fingerprints != now:
        known.end()
        known = None
    if known is None:
        ends = [weakref.finalize(weight.untyped_storage(), _COPIES.pop, places, None) for weight in weights]
        for end in ends:
            end.atexit = False
        known = _COPIES[places] = _Copies(now, ends)
    return known
