"""Numbers that tell whether weights are still what they were."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_WIDTH, _NUM_ROWS = 1024, 256  # weights are read in rows, of which so many stay in a core's cache
_SHIFT = 29  # signs of two or four numbers in 64 bits get to bits that are no signs


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
    # as 64-bit numbers they are read as fast as memory can: from where such numbers may begin
    bits = bits.clone() if bits.storage_offset() % 4 else bits
    num_rows, num_rest = divmod(bits.numel(), 4 * _WIDTH)
    num_full = bits.numel() - num_rest
    rest = torch.nn.functional.pad(bits[num_full:], (0, 4 * _WIDTH - num_rest)).view(torch.int64)[None]
    rows = bits[:num_full].view(torch.int64).view(num_rows, _WIDTH)
    # A number counts as often as the multipliers of its row and its column say, together: whatever is swapped, the sum
    # changes. Sums over rows and columns need no product of 64-bit numbers, which is slow, for every one of them.
    # Odd multipliers lose no bit, and sums are taken modulo 2**64.
    column_W, row_R = _multipliers(_WIDTH), _multipliers(num_rows + 1)
    total = torch.zeros((), dtype=torch.int64)
    mixed = torch.empty(min(_NUM_ROWS, num_rows + 1), _WIDTH, dtype=torch.int64)
    for part, some_R in zip((*rows.split(_NUM_ROWS), rest), (*row_R[:-1].split(_NUM_ROWS), row_R[-1:]), strict=True):
        # Of the highest bits, which are signs, a sum would show only whether an odd number of them has changed,
        # whatever the multipliers are. So they change lower bits as well.
        torch.bitwise_right_shift(part, _SHIFT, out=mixed[: len(part)])
        words = mixed[: len(part)].bitwise_xor_(part)
        total += torch.dot(words.sum(dim=1), some_R)
        # the multipliers together are even where both are odd: those of columns are made even, so that none is lost
        total += torch.dot(words.sum(dim=0), column_W - 1)
    return int(total)


@functools.lru_cache(maxsize=256)
def _multipliers(num: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(-(2**62), 2**62, (num,), generator=generator, dtype=torch.int64).mul_(2).add_(1)
