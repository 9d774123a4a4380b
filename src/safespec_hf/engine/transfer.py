"""One copy from the device to the host, however many tensors are wanted there.

Every copy makes the host wait for the device. Token ids and risks go in one: whole numbers as they are, and beside
them the bits of float32 numbers, so that neither loses a digit. (In float32 a token id above 2**24 would be another.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors to the host, with one wait for the device.

    Args:
        parts (`Sequence[torch.Tensor]`): Whole numbers or floating-point ones, of any shapes and devices.

    Returns:
        `list[torch.Tensor]`: The same on the host; whole numbers as int64, others as float32.

    Example:

        >>> to_host([torch.tensor([2**24 + 1]), torch.tensor([[0.5]])])
        [tensor([16777217]), tensor([[0.5000]])]
    """
    if all(part.device.type == "cpu" for part in parts):
        return [part.float() if part.is_floating_point() else part.long() for part in parts]
    return unpack(pack(parts).cpu(), parts)


def pack(parts: Sequence[Tensor]) -> Tensor:
    """All values in one int64 tensor, on the device of the first part."""
    bits = [part.float().view(torch.int32) if part.is_floating_point() else part for part in parts]
    return torch.cat([part.flatten().to(parts[0].device, torch.int64) for part in bits])


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undoes [`pack`].

    Args:
        packed (`torch.LongTensor`): What it gave.
        like (`Sequence[torch.Tensor]`): What it was given; only their shapes and types are read.
    """
    pieces = packed.split([part.numel() for part in like])
    return [
        (piece.int().view(torch.float32) if part.is_floating_point() else piece).view(part.shape)
        for piece, part in zip(pieces, like, strict=True)
    ]
