"""A model with the KV cache of a batch of rows that grow at different speeds: its forwards.

[`CachedRows`] knows what they leave behind, and how rows go back.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import ragged
from .blocks import BlockOutput as BlockOutput
from .blocks import Usage as Usage
from .blocks import attention_mask, shift_right
from .cached_rows import UNLIMITED, CachedRows
from .columns import Columns, align_blocks
from .growing import empty_like, has_columns
from .private_names import keeps_logits
from .prompt import AfterPrompt, Prompt
from .recurrent import Block
from .tap import read_tap, tap_arguments
from .traits import CACHE_NAME as CACHE_NAME
from .traits import cache_argument as cache_argument
from .traits import check_prompt_columns, input_device, takes_positions
from .traits import takes_trees as takes_trees
from .windows import Windows, row_states, set_layer


class CachedModel(CachedRows):
    """A causal language model with the KV cache of a batch of rows: what reads them.

    Args:
        model ([`~transformers.PreTrainedModel`]): Target or draft.
        num_rows (`int`): Rows of the batch, all empty.
        layers (`Sequence[int]`): Hidden states to return with every forward.
        usage ([`Usage`], *optional*): Counts to add to.

    Raises:
        UnsupportedRequestError: If recurrent states of the model are not in its cache.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, layers: Sequence[int] = (), usage: Usage | None = None):
        super().__init__(model, num_rows)
        self._prepare(model, layers, usage)
        self._has_columns = has_columns(model)
        self._can_share = self._max_columns == UNLIMITED and takes_trees(model)
        self._may_divide = self._has_columns and ragged.can_be_divided(model, self.cache)
        # transformers asks the device whether a mask masks anything, and waits for the answer in every forward
        self._masks_itself = self._device.type != "cpu" and takes_trees(model)

    def _prepare(self, model: PreTrainedModel, layers: Sequence[int], usage: Usage | None) -> None:
        """What its forwards are asked with, however rows lie in the cache."""
        self.model = model
        self.layers = tuple(layers)
        self.usage = usage if usage is not None else Usage()
        self._device = input_device(model)
        self._fixed = {"use_cache": True, "return_dict": True, **tap_arguments(self.layers)}
        self._cache_name = cache_argument(model)
        self._keeps_logits = keeps_logits(model)
        self._takes_positions = takes_positions(model)

    def forward(
        self,
        blocks: Sequence[Sequence[int]] | Tensor,
        num_logits: int,
        states_BTF: Tensor | None = None,
        parents: Sequence[Sequence[int]] | None = None,
        num_drafts: Sequence[int] | None = None,
    ) -> BlockOutput:
        """Appends a block of tokens to every row.

        Args:
            blocks (`Sequence[Sequence[int]]` or `torch.LongTensor` of shape `(B, T)`):
                The tokens of each row, at least one; rows may differ in length.
            num_logits (`int`): Logits are returned for this many of the last positions.
            states_BTF (`torch.Tensor` of shape `(B, T, F)`, *optional*): For a [`DraftHead`], aligned to the right.
            parents (`Sequence[Sequence[int]]`, *optional*):
                For each row, the parents of its last tokens, which are a tree after the tokens before them. Only if
                [`takes_trees`].
            num_drafts (`Sequence[int]`, *optional*):
                For each row, how many of its last tokens may be rejected: recurrent states are copied before them.

        After [`prefill`] a row may have an empty block, which gives the logits after its prompt; see
        [`AfterPrompt.read_rest`].
        """
        if self._is_shared:
            return self._forward_shared(blocks, num_logits)
        is_first = self._may_divide and self.columns.num == 0 and parents is None
        if is_first and not isinstance(blocks, Tensor) and len(groups := ragged.divide(list(map(len, blocks)))) > 1:
            self._note_read(list(map(len, blocks)), num_drafts)
            output, states, used_BL = ragged.read_in_groups(self._part, blocks, groups, num_logits, states_BTF)
            self.begin_with(states, used_BL)
            return output
        if self._after is None or isinstance(blocks, Tensor) or not self._after.is_last_in(self.lengths):
            return self._forward(blocks, num_logits, num_drafts, states_BTF, parents)
        read = functools.partial(self._forward, states_BTF=states_BTF, parents=parents)
        return BlockOutput(*self._after.read_rest(self.lengths, blocks, num_logits, num_drafts, read))

    def _part(self, rows: Sequence[int]) -> CachedModel:
        """An empty batch of some of the rows."""
        part = CachedModel(self.model, len(rows), self.layers, self.usage)
        part.ropes = None if self.ropes is None else self.ropes.select(rows)
        return part

    def _forward(
        self,
        blocks: Sequence[Sequence[int]] | Tensor,
        num_logits: int,
        num_drafts: Sequence[int] | None,
        states_BTF: Tensor | None,
        parents: Sequence[Sequence[int]] | None,
    ) -> BlockOutput:
        start = time.perf_counter()
        # a hole inside of a sliding window would make it shorter, and a recurrent layer would take it for a token, so
        # there it must come after the row's tokens
        to_left = (self._has_windows or self.recurrent is not None) and self.columns.num > 0
        input_ids, added_BT = self._align(blocks, to_left)
        width = input_ids.shape[1]
        self._close_holes(width)
        is_shifted = to_left and not isinstance(added_BT, tuple)
        reading = self._reading(added_BT, num_drafts, to_left)
        if self.windows is not None:
            self.windows.begin(may_drop=not is_shifted)
        positions_BT = self.columns.extend(added_BT)
        arguments = self._arguments(input_ids, positions_BT, parents)
        if self._keeps_logits:
            arguments["logits_to_keep"] = width if is_shifted else num_logits
        if states_BTF is not None:
            arguments["states"] = states_BTF
        with reading, nullcontext() if self.ropes is None else self.ropes.reading(positions_BT):
            outputs = self.model(**arguments)
        self.usage.num_forwards += 1
        hidden = read_tap(self.model, outputs, self.layers, width) if self.layers else None
        if states_BTF is not None:
            hidden = outputs.hidden_states
        logits = outputs.logits
        if is_shifted:
            logits, hidden = (None if part is None else shift_right(part, added_BT) for part in (logits, hidden))
        self.usage.seconds += time.perf_counter() - start
        return BlockOutput(logits[:, -num_logits:], hidden)

    def prefill(self, prompt: Prompt) -> BlockOutput:
        """Reads prompts that are more than tokens, with which every row begins, or what is left of them.

        Returns:
            [`BlockOutput`]: Logits after the prompts, and the tapped states of all their places.

        Raises:
            UnsupportedRequestError: If a layer keeps something else of them than a column for each place.
        """
        self.keep_all()  # nothing of them can be read again
        start, width = time.perf_counter(), prompt.is_real_BL.shape[1]
        added_BT: Any = prompt.is_real_BL[:, self.columns.num :]  # before it is what a caller's cache holds
        added_BT = added_BT.shape if added_BT.all() else added_BT
        reading = self._reading(added_BT, None, False)
        self.columns.extend(added_BT)
        arguments = {**prompt.inputs, self._cache_name: self.cache, **self._fixed}
        if self._keeps_logits:
            arguments["logits_to_keep"] = 1
        with reading:
            outputs = self.model(**arguments)
        check_prompt_columns(self.model, self.cache, width)
        if self.recurrent is not None:
            self.recurrent.pin(self.columns.lengths)
        hidden_BTF = read_tap(self.model, outputs, self.layers, width) if self.layers else None
        self._after = AfterPrompt.of(prompt, outputs.logits[:, -1], hidden_BTF)
        self.usage.num_forwards += 1
        self.usage.seconds += time.perf_counter() - start
        return BlockOutput(outputs.logits[:, -1:], hidden_BTF)

    def _forward_shared(self, blocks: Sequence[Sequence[int]] | Tensor, num_logits: int) -> BlockOutput:
        """The same for rows that share a row of the cache, with all that they had in common."""
        start = time.perf_counter()
        input_ids, added_BT = self._align(blocks, to_left=False)
        (num_rows, width), (positions_BT, sees_NL) = input_ids.shape, self.columns.extend_apart(added_BT)
        arguments = {"input_ids": input_ids.reshape(1, -1), self._cache_name: self.cache, **self._fixed}
        arguments["attention_mask"] = attention_mask(self.model, self._to_device(sees_NL[None]))
        arguments["position_ids"] = self._to_device(positions_BT.reshape(1, -1))
        with nullcontext() if self.ropes is None else self.ropes.reading(positions_BT, in_one_row=True):
            outputs = self.model(**arguments)
        self.usage.num_forwards += 1
        parts = outputs.logits, read_tap(self.model, outputs, self.layers, num_rows * width) if self.layers else None
        logits_BTV, hidden_BTF = (None if part is None else part.view(num_rows, width, -1) for part in parts)
        assert logits_BTV is not None
        self.usage.seconds += time.perf_counter() - start
        return BlockOutput(logits_BTV[:, -num_logits:], hidden_BTF)

    def _reading(self, added_BT: Any, num_drafts: Sequence[int] | None, to_left: bool) -> AbstractContextManager[None]:
        """What a forward has to run in, given what it is about to read."""
        if not self._can_reread:
            return nullcontext()
        lengths, is_even = self.columns.lengths, isinstance(added_BT, tuple)
        sizes = [added_BT[1]] * len(lengths) if is_even else added_BT.sum(axis=1).tolist()
        self._note_read(sizes, num_drafts)
        if self.recurrent is None:
            return nullcontext()
        width, num_drafts = added_BT[1] if is_even else added_BT.shape[1], num_drafts or [0] * len(lengths)
        return self.recurrent.reading(Block(list(lengths), sizes, num_drafts, width, to_left))

    def _note_read(self, sizes: Sequence[int], num_drafts: Sequence[int] | None) -> None:
        """Takes note of how many tokens of each row are about to be read, and counts those that were read before."""
        lengths = self.columns.lengths
        if self.ropes is not None:
            self.ropes.begin(lengths, sizes, num_drafts)
        ends = [length + size for length, size in zip(lengths, sizes, strict=True)]
        known = zip(self._read, ends, lengths, strict=True)
        self.usage.num_reread_tokens += sum(min(read, end) - length for read, end, length in known)
        self._read = list(map(max, self._read, ends))

    def _align(self, blocks: Sequence[Sequence[int]] | Tensor, to_left: bool) -> tuple[Tensor, Any]:
        if isinstance(blocks, Tensor):
            return blocks.to(self._device), tuple(blocks.shape)
        ids_BT, added_BT = align_blocks(blocks, to_left)
        return self._to_device(ids_BT), added_BT

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _arguments(
        self, input_ids: Tensor, positions_BT: np.ndarray, parents: Sequence[Sequence[int]] | None
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": input_ids, self._cache_name: self.cache, **self._fixed}
        if parents is not None:
            self._tree_start = self.columns.num - len(parents[0])
            mask_BTL = self.columns.tree_mask(parents, positions_BT)
            arguments["attention_mask"] = attention_mask(self.model, self._to_device(mask_BTL))
        elif not self.columns.is_full and self._masks_itself and self.columns.num > input_ids.shape[1]:
            mask_BTL = self.columns.tree_mask([[] for _ in self.lengths], positions_BT)
            arguments["attention_mask"] = attention_mask(self.model, self._to_device(mask_BTL))
        elif not self.columns.is_full:
            used_BL = self.columns.used_BL
            # recurrent states are masked by what the block holds, and some models leave it to the caller to say so
            used_BL = used_BL if self._has_columns else used_BL[:, -input_ids.shape[1] :]
            arguments["attention_mask"] = self._to_device(used_BL).long()
        if self._takes_positions:
            arguments["position_ids"] = self._to_device(positions_BT)
        return arguments if self._after is None else self._after.continued(arguments, input_ids.shape[1])

    def fork(self, row: int, num_copies: int, layers: Sequence[int] | None = None) -> CachedModel:
        """A new batch of `num_copies` rows that all continue row `row`, sharing its states until the next forward.

        Where a mask can keep them apart, they share them for ever. `layers`: hidden states to return instead.
        """
        assert not self._is_shared, "rows that share a row of the cache can't be forked again"
        fork = copy.copy(self)
        fork.layers = self.layers if layers is None else tuple(layers)
        fork._is_shared = self._can_share and self._after is None and num_copies > 1 and self.lengths[row] > 0
        fork._fixed, fork._is_callers, fork._tree_start = self._fixed | tap_arguments(fork.layers), False, None
        fork.cache, lengths, columns = empty_like(self.cache), self.columns.lengths, self.columns.of(row)
        fork.columns, fork._read = Columns.filled(num_copies, lengths[row]), [self._read[row]] * num_copies
        fork._after = None if self._after is None else self._after.select([row] * num_copies)
        num = 1 if fork._is_shared else num_copies
        for index, layer in enumerate(self.cache.layers):
            states = [state.expand(num, -1, -1, -1) for state in row_states(layer, row, columns)]
            set_layer(fork.cache, index, states, columns.size)
        fork.ropes = None if self.ropes is None else self.ropes.select([row] * num_copies)
        if self.windows is not None:
            fork.windows = Windows.of(fork.cache, [self.windows.lost(self.columns)[row]] * num_copies)
        if self.recurrent is not None:
            fork.recurrent = self.recurrent.fork(row, num_copies, lengths, fork.cache)
        return fork
