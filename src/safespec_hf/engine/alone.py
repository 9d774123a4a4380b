"""Rows that are read one by one, each with a cache of its own, so that what is kept of a row may be anything.

For layers whose state nobody here knows how to take back, and for models that would see padding or holes in a row. To
go back, a row's whole cache is put back from a copy, or made again by reading what is kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..errors import UnsupportedRequestError
from .blocks import BlockOutput, Usage
from .cache import CachedModel
from .cached_rows import CachedRows
from .growing import column_states
from .prompt import Prompt
from .tap import read_tap
from .traits import STATE_NAME, reads_alone

MOST_BEHIND = 8
"""Tokens that a row may have read since its last copy, for another one to be worth its time."""
MOST_REREAD = 32
"""Tokens that are read again in front of drafts at most; more get a forward of their own, and a copy after it."""


class State(NamedTuple):
    """A row's cache after its first `length` tokens; `None` for a state that a model's first forward makes."""

    length: int
    cache: Any

    def copied(self) -> State:
        """One that shares nothing with it."""
        return State(self.length, copy.deepcopy(self.cache))


def cached_model(
    model: PreTrainedModel,
    num_rows: int,
    layers: Sequence[int] = (),
    usage: Usage | None = None,
    is_alone: bool | None = None,
) -> CachedModel:
    """A model with a cache of empty rows, read together where it allows that.

    Args:
        model ([`~transformers.PreTrainedModel`]): Target or draft.
        num_rows (`int`): Rows of the batch, all empty.
        layers (`Sequence[int]`): Hidden states to return with every forward.
        usage ([`Usage`], *optional*): Counts to add to.
        is_alone (`bool`, *optional*): Whether rows are read one by one. Default: what is known of the model.
    """
    is_alone = reads_alone(model) if is_alone is None else is_alone
    return (RowsAlone if is_alone else CachedModel)(model, num_rows, layers, usage)


class RowsAlone(CachedModel):
    """A [`CachedModel`] whose rows are read one after the other, without padding: a forward for each.

    Before tokens that may be rejected a row's cache is copied, all of it. If some are rejected, the row goes back to
    that copy, and what was accepted is read again with the next block. Further back, it is read from its beginning.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, layers: Sequence[int] = (), usage: Usage | None = None):
        self._prepare(model, layers, usage)
        self.recurrent = self.windows = self.ropes = self._after = None
        self._states: list[State] = [self._empty() for _ in range(num_rows)]
        self._copies: list[State | None] = [None] * num_rows
        # those that were read and stand, also where the cache does not hold them any more
        self._tokens: list[list[int]] = [[] for _ in range(num_rows)]

    def _empty(self) -> State:
        return State(0, None if self._cache_name == STATE_NAME else DynamicCache(config=self.model.config))

    @property
    def lengths(self) -> list[int]:
        return [state.length for state in self._states]

    def forward(
        self,
        blocks: Sequence[Sequence[int]] | Tensor,
        num_logits: int,
        states_BTF: Tensor | None = None,
        parents: Sequence[Sequence[int]] | None = None,
        num_drafts: Sequence[int] | None = None,
    ) -> BlockOutput:
        assert states_BTF is None, "a draft head's rows are read together"
        assert parents is None, "a tree can't be read in a row"
        start = time.perf_counter()
        blocks = blocks.tolist() if isinstance(blocks, Tensor) else blocks
        rows = zip(blocks, num_drafts or [0] * len(blocks), strict=True)
        parts = [self._read_row(row, block, num, num_logits) for row, (block, num) in enumerate(rows)]
        width = max(map(len, blocks))
        logits_BTV = _stack([part.logits_BTV[:, -num_logits:] for part in parts], min(num_logits, width))
        hidden = [part.hidden_BTF for part in parts if part.hidden_BTF is not None]
        self.usage.seconds += time.perf_counter() - start
        return BlockOutput(logits_BTV, _stack(hidden, width) if hidden else None)

    def _read_row(self, row: int, block: Sequence[int], num_drafts: int, num_logits: int) -> BlockOutput:
        length = self._states[row].length
        num_known = min(len(self._tokens[row]), length + len(block)) - length
        self.usage.num_reread_tokens += num_known
        self._tokens[row][length : length + len(block)] = block
        num_certain = min(len(block) - num_drafts, len(block) - 1)
        if num_drafts and min(num_known, num_certain) > MOST_REREAD:
            # or else, as long as drafts are rejected, more and more would be read again
            before = self._read_on(row, block[:num_certain], max(num_logits - len(block) + num_certain, 1))
            parts = [before, self._read_tail(row, block[num_certain:], num_logits)]
            hidden = [part.hidden_BTF for part in parts if part.hidden_BTF is not None]
            logits_BTV = torch.cat([part.logits_BTV for part in parts], dim=1)
            return BlockOutput(logits_BTV, torch.cat(hidden, dim=1) if hidden else None)
        return self._read_tail(row, block, num_logits) if num_drafts else self._read_on(row, block, num_logits)

    def _read_tail(self, row: int, block: Sequence[int], num_logits: int) -> BlockOutput:
        """Reads what may be rejected."""
        state, before = self._states[row], self._copies[row]
        if state.length > (0 if before is None else before.length + MOST_BEHIND):
            self._copies[row] = state.copied()
        return self._read_on(row, block, num_logits)

    def _read_on(self, row: int, block: Sequence[int], num_logits: int) -> BlockOutput:
        length, cache = self._states[row]
        arguments: dict[str, Any] = {"input_ids": torch.tensor([list(block)], device=self._device), **self._fixed}
        arguments[self._cache_name] = cache
        if self._keeps_logits:
            arguments["logits_to_keep"] = min(num_logits, len(block))
        if self._takes_positions:
            arguments["position_ids"] = torch.arange(length, length + len(block), device=self._device)[None]
        self._states[row] = self._empty()  # if it fails midway, nothing of it is trusted
        outputs = self.model(**arguments)
        if self._cache_name == STATE_NAME:
            cache = outputs[STATE_NAME]
        self._states[row] = State(length + len(block), cache)
        self.usage.num_forwards += 1
        hidden = read_tap(self.model, outputs, self.layers, len(block)) if self.layers else None
        return BlockOutput(outputs.logits, hidden)

    def prefill(self, prompt: Prompt) -> BlockOutput:
        raise UnsupportedRequestError(
            f"{type(self.model).__name__} reads rows one by one here, from tokens, and takes no other prompt."
        )

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls every row back to its first `lengths[row]` tokens, or further: [`lengths`] says how far."""
        for row, want in enumerate(lengths):
            del self._tokens[row][want:]
            before = self._copies[row]
            if before is not None and before.length > want:
                before = self._copies[row] = None
            if self._states[row].length > want:
                # the copy is what the row goes on from; before what may be rejected it is copied again
                self._states[row], self._copies[row] = self._empty() if before is None else before, None

    def select(self, rows: Sequence[int]) -> None:
        states, copies, tokens = self._states, self._copies, self._tokens
        is_new = [row not in rows[:at] for at, row in enumerate(rows)]
        self._states = [states[row] if new else states[row].copied() for row, new in zip(rows, is_new, strict=True)]
        self._copies = [copies[row] if new else None for row, new in zip(rows, is_new, strict=True)]
        self._tokens = [list(tokens[row]) for row in rows]

    def fork(self, row: int, num_copies: int, layers: Sequence[int] | None = None) -> CachedModel:
        """A new batch of `num_copies` rows that all continue row `row`. `layers`: hidden states to return instead."""
        missing = self._tokens[row][self._states[row].length :]
        if num_copies > 1 and missing:  # read again once, and not in every copy
            self.usage.num_reread_tokens += len(missing)
            self._read_on(row, missing, 1)
        fork = RowsAlone(self.model, num_copies, self.layers if layers is None else layers, self.usage)
        fork._states = [self._states[row].copied() for _ in range(num_copies)]
        fork._tokens = [list(self._tokens[row]) for _ in range(num_copies)]
        return fork

    def replace(self, row: int, other: CachedRows, other_row: int) -> None:
        assert isinstance(other, RowsAlone)
        self._states[row], self._copies[row] = other._states[other_row].copied(), None
        self._tokens[row] = list(other._tokens[other_row])

    def states_of(self, row: int, layer: int) -> list[Tensor]:
        cache = self._states[row].cache
        return [] if cache is None or self._cache_name == STATE_NAME else column_states(cache.layers[layer])

    def keep_all(self) -> None:
        """Nothing of a row is dropped here."""

    def pretend(self, length: int) -> None:
        """Rows stay as short as they are: what a long one keeps is not known."""

    def take_cache(self, cache: DynamicCache) -> None:
        raise UnsupportedRequestError(f"A cache of {type(self.model).__name__} can't be passed in.")

    def begin_with(self, states: Sequence[Sequence[Tensor]], used_BL: np.ndarray) -> None:
        raise UnsupportedRequestError(f"A cache of {type(self.model).__name__} can't be passed in.")

    def trim_cache(self, length: int) -> None:
        self.keep([max(length, 0)])

    def give_cache(self) -> Any:
        return None if self._cache_name == STATE_NAME else self._states[0].cache


def _stack(parts: Sequence[Tensor], width: int) -> Tensor:
    """Rows that end at the same place, with zeros before those that are shorter."""
    joined = parts[0].new_zeros(len(parts), width, parts[0].shape[-1])
    for row, part in zip(joined, parts, strict=True):
        row[width - part.shape[1] :] = part[0]
    return joined
