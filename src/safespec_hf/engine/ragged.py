"""Rows of very different lengths: read in groups of about the same length, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .blocks import BlockOutput
from .growing import GrowingLayer, column_states
from .traits import input_device

FORWARD_TOKENS = 64
"""What a forward costs besides its tokens, in tokens: about so many take twice as long as one, on a CPU."""


def divide(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups that are read fastest, one after the other.

    Args:
        lengths (`Sequence[int]`): Tokens to read of each row.

    Example:

        >>> divide([500, 30, 480, 25]), divide([40, 30, 60, 25])
        ([[3, 1], [2, 0]], [[3, 1, 0, 2]])
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # the best way to read the shortest rows, for each number of them: what it costs, and where its last group begins
    best: list[tuple[int, int]] = [(0, 0)]
    for end, row in enumerate(order, start=1):
        costs = [(best[start][0] + (end - start) * lengths[row] + FORWARD_TOKENS, start) for start in range(end)]
        best.append(min(costs))
    groups, end = [], len(order)
    while end > 0:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def can_be_divided(model: PreTrainedModel, cache: Any) -> bool:
    """Whether nothing is kept of a row but columns, all of them.

    Only on a CPU: whether padding takes longer on an accelerator than another forward has not been measured.
    """
    return input_device(model).type == "cpu" and all(type(layer) is GrowingLayer for layer in cache.layers)


def read_in_groups(
    make: Callable[[Sequence[int]], Any],
    blocks: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    num_logits: int,
    states_BTF: Tensor | None = None,
) -> tuple[BlockOutput, list[list[Tensor]], np.ndarray]:
    """Reads the first block of each row, a group of rows after the other.

    Args:
        make (`Callable`): Makes an empty [`CachedModel`] of some rows.
        blocks (`Sequence[Sequence[int]]`): The tokens of each row.
        groups (`Sequence[Sequence[int]]`): See [`divide`].
        num_logits, states_BTF: As [`CachedModel.forward`] takes them.

    Returns:
        `tuple`: What one forward over all rows would have given, with zeros for its padding; the states of each layer;
        and which of their columns hold tokens, of shape `(B, L)`.
    """
    parts: list[Any] = [make(rows) for rows in groups]
    lengths = list(map(len, blocks))
    outputs = []
    for part, rows in zip(parts, groups, strict=True):
        states = None if states_BTF is None else states_BTF[rows, -max(lengths[row] for row in rows) :]
        outputs.append(part.forward([blocks[row] for row in rows], num_logits, states))
    width = max(lengths)
    hidden = [output.hidden_BTF for output in outputs if output.hidden_BTF is not None]
    output = BlockOutput(
        _join(groups, [output.logits_BTV for output in outputs], 1, min(num_logits, width)),
        _join(groups, hidden, 1, width) if hidden else None,
    )
    layers = zip(*([column_states(layer) for layer in part.cache.layers] for part in parts), strict=True)
    cached = [[_join(groups, same, 2, width) for same in zip(*each, strict=True)] for each in layers]
    return output, cached, np.arange(width) >= width - np.array(lengths)[:, None]


def _join(groups: Sequence[Sequence[int]], parts: Sequence[Tensor], dim: int, width: int) -> Tensor:
    """Puts rows together that end at the same place of a dimension."""
    first = parts[0]
    shape = [sum(map(len, groups)), *first.shape[1:]]
    shape[dim] = width
    joined = first.new_zeros(shape)
    for rows, part in zip(groups, parts, strict=True):
        size = part.shape[dim]
        joined.narrow(dim, width - size, size).index_copy_(0, torch.tensor(rows, device=part.device), part)
    return joined
