"""Whether the model that answers is still the one that its head was calibrated on: adapters, and other weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..engine.private_names import forward_pre_hooks
from ..engine.traits import is_plain
from ..errors import UnsupportedRequestError

NUM_MATRICES, NUM_VALUES = 24, 16
"""Weights that are looked at for every call: an adapter that was merged changes all numbers of its matrices."""
logger = logging.get_logger(__name__)
Sample = Mapping[str, tuple[str, list[float]]]


class Weights(NamedTuple):
    """What a model's states come from, as far as one can see at a glance.

    Attributes:
        adapters (`frozenset[str]`): Names of the adapters that act, merged ones included.
        sample (`dict[str, tuple[str, list[float]]]`): Some numbers of some matrices, and their format, by name.
    """

    adapters: frozenset[str]
    sample: Sample

    def what_differs(self, other: Weights) -> str | None:
        """What another look at the same model shows, if it is another one; matrices that were recast tell nothing."""
        if self.adapters != other.adapters:
            return f"its adapters were {sorted(self.adapters) or 'none'} and are {sorted(other.adapters) or 'none'}"
        pairs = ((self.sample[name], other.sample[name]) for name in self.sample.keys() & other.sample.keys())
        is_changed = any(then[0] == now[0] and then[1] != now[1] for then, now in pairs)
        return "its weights have changed, as merging an adapter or training does" if is_changed else None


def look_at(model: PreTrainedModel) -> Weights:
    """The adapters of a model, and a few of its numbers."""
    return Weights(_adapters(model), _sample(model))


def _adapters(model: PreTrainedModel) -> frozenset[str]:
    found: set[str] = set()
    for layer in _tuned_layers(model):
        found.update(layer.merged_adapters, () if layer.disable_adapters else layer.active_adapters)
    return frozenset(found)


def describe_adapters(model: PreTrainedModel) -> list[list[Any]]:
    """What acts of the adapters of each layer that has some, as JSON can hold it; their weights are the model's.

    Returns:
        `list[list]`: Names of those that are merged, of those that act besides, and the scale of each, if it has one.
    """
    return [
        [
            sorted(layer.merged_adapters),
            [] if layer.disable_adapters else sorted(layer.active_adapters),
            dict(getattr(layer, "scaling", {})),  # not every kind of adapter has one
        ]
        for layer in _tuned_layers(model)
    ]


def _tuned_layers(model: PreTrainedModel) -> list[Any]:
    peft = sys.modules.get("peft")
    kind = () if peft is None else peft.tuners.tuners_utils.BaseTunerLayer
    return [module for module in model.modules() if isinstance(module, kind)]


def _sample(model: PreTrainedModel) -> Sample:
    # PEFT puts a layer inside of its own
    named = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters()}
    matrices = {name: weight for name, weight in named.items() if _is_matrix(name, weight)}
    kept = sorted(matrices)[:: len(matrices) // NUM_MATRICES + 1]
    return {name: (str(matrices[name].dtype), _some_of(matrices[name])) for name in kept}


def _is_matrix(name: str, weight: Tensor) -> bool:
    # an embedding is resized, and its rows are not what adapters change
    is_own = ".lora_" not in name
    return is_own and weight.dim() == 2 and is_plain(weight) and weight.device.type != "meta"


def _some_of(weight: Tensor) -> list[float]:
    values = weight.detach().reshape(-1)
    return values[:: max(1, values.numel() // NUM_VALUES)].float().tolist()


def warn_of_changes(then: Weights | None, model: PreTrainedModel) -> None:
    """Says once for each kind of change that a head reads another model than the one it was attached to."""
    why = None if then is None else then.what_differs(look_at(model))
    if why is not None:
        logger.warning_once(
            "The safety head was calibrated on another model than the one that answers now: since it was attached, "
            f"{why}. It goes on guarding, but what it flags may be too much or too little. Measure it on this model, "
            "or train a head for it (`safespec make-head`), and attach again."
        )


def check_adapters(model: PreTrainedModel) -> None:
    """Raises for a soft prompt, and if PEFT gives each row of the batch an adapter of its own.

    Raises:
        UnsupportedRequestError: Names the kind of adapter, or the argument.
    """
    peft, owner = sys.modules.get("peft"), getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    if peft is not None and isinstance(owner, peft.PeftModel) and owner.active_peft_config.is_prompt_learning:
        kind = owner.active_peft_config.peft_type
        raise UnsupportedRequestError(
            f"The model has a soft prompt ({getattr(kind, 'value', kind)}), whose virtual tokens are no tokens: they "
            "have no risk and can't be rolled back to. Use an adapter of weights, such as LoRA, or generate without "
            "`safespec`."
        )
    hooks = [hook for module in model.modules() for hook in forward_pre_hooks(module)]
    keywords = [hook.keywords for hook in hooks if isinstance(hook, functools.partial)]
    for name in ("adapter_names", "alora_offsets"):
        # rows end, and candidates multiply them
        if any(given.get(name) is not None for given in keywords):
            raise UnsupportedRequestError(
                f"`{name}` gives rows of a batch adapters of their own, but guarded decoding has rows of its own. "
                "Call `set_adapter`, and generate with one adapter at a time."
            )
