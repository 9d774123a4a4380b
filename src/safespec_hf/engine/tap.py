"""Reads hidden states out of a forward that happens anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import output_capturing

SELECTS = hasattr(output_capturing, "selected_hidden_states")
"""Whether transformers keeps a list of hidden states as asked for: before, it counted those from the layer after."""


def tap_arguments(layers: Sequence[int]) -> dict[str, Any]:
    """Forward arguments that make transformers keep these hidden states, and only these where it can select."""
    return {"output_hidden_states": list(layers) if SELECTS else True} if layers else {}


def read_tap(model: PreTrainedModel, outputs: Any, layers: Sequence[int], num_positions: int) -> Tensor:
    """The tapped hidden states of the last positions of a forward.

    Args:
        model ([`~transformers.PreTrainedModel`]): Whose forward it was.
        outputs ([`~transformers.utils.ModelOutput`]): Of a forward called with [`tap_arguments`].
        layers (`Sequence[int]`): The layers asked for; concatenated in this order.
        num_positions (`int`): How many positions, counted from the end.

    Returns:
        `torch.Tensor` of shape `(batch, num_positions, hidden_size * len(layers))`: On the last layer's device.
    """
    states = [main_stream(model, outputs.hidden_states[layer])[:, -num_positions:] for layer in layers]
    # a target spread over several devices keeps each layer's states on its own
    return torch.cat([state.to(states[-1].device) for state in states], dim=-1)


def main_stream(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Of a layer's states that are several streams, what a head reads.

    Of Gemma 3n's that is the first, which goes through the layers themselves; of those of hyper-connections (HY-V4),
    none of which is before the others, their mean.
    """
    if states.dim() != 4:
        return states
    text = model.config.get_text_config(decoder=True)
    return states.mean(dim=2) if getattr(text, "altup_num_inputs", None) is None else states[0]


def split_tap(hidden_BTF: Tensor | None, num_first: int, num_layers: int) -> tuple[Tensor | None, Tensor | None]:
    """Parts tapped states into those of the first layers, which one reader asked for, and the others'.

    Args:
        hidden_BTF (`torch.Tensor` of shape `(B, T, F)`, *optional*): See [`read_tap`].
        num_first, num_layers (`int`): How many layers the first reader asked for, and how many there are.
    """
    if hidden_BTF is None or num_first == num_layers:
        return hidden_BTF, None
    size = hidden_BTF.shape[-1] * num_first // num_layers
    return hidden_BTF[..., :size], hidden_BTF[..., size:]
