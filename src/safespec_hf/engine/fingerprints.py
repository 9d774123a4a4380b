"""Numbers that tell whether weights are still what they were."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_WIDTH, _NUM_ROWS = 1024, 256  # weights are read in rows, of which so many stay in a core's cache


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
