"""What a forward over a block of tokens of every row gives, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .columns import right_ends
from .private_names import attention_name


class BlockOutput(NamedTuple):
    """What one forward gives.

    Attributes:
        logits_BTV (`torch.Tensor` of shape `(B, T, V)`): Of the last positions asked for.
        hidden_BTF (`torch.Tensor` of shape `(B, T, F)`, *optional*):
            Tapped hidden states of the whole block; a draft head's own where it was given states.
    """

    logits_BTV: Tensor
    hidden_BTF: Tensor | None


@dataclass(slots=True)
class Usage:
    """Forwards of a model, the tokens that they read once more, and the host time they took."""

    num_forwards: int = 0
    num_reread_tokens: int = 0
    seconds: float = 0.0


def shift_right(values_BTX: Tensor, added_BT: np.ndarray) -> Tensor:
    """Moves the positions of each row to the right end of the block."""
    ends_BT = torch.from_numpy(right_ends(added_BT)).to(values_BTX.device)
    return values_BTX.take_along_dim(ends_BT[..., None], dim=1)


def attention_mask(model: PreTrainedModel, mask_BTL: Tensor) -> Tensor:
    """What a model's attention takes for what each position sees."""
    mask_B1TL = mask_BTL[:, None]
    if attention_name(model) == "sdpa":
        return mask_B1TL
    zeros = torch.zeros(mask_B1TL.shape, dtype=model.dtype, device=mask_B1TL.device)
    return zeros.masked_fill_(~mask_B1TL, torch.finfo(model.dtype).min)
