"""Drafts of a draft head, which reads the states that the target computed anyway.

Shapes: B rows, T positions of a block, F features of the target's tapped states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..answer.rows import Row
from ..engine.cache import BlockOutput, CachedModel
from ..heads.draft_head import DraftHead
from .draft_length import DraftLength
from .drafters import Proposal
from .model import ModelDrafter
from .state_window import StateWindow


class HeadDrafter(ModelDrafter):
    """Drafts with a [`DraftHead`]. A row has to wait until the target has read its prompt.

    Args:
        head ([`DraftHead`]): Bound to the target.
        num_rows, length, vocab_size, do_sample, num_others: As for [`ModelDrafter`].
    """

    def __init__(
        self,
        head: DraftHead,
        num_rows: int,
        length: DraftLength,
        vocab_size: int | None,
        do_sample: bool,
        num_others: int = 0,
    ):
        super().__init__(head, num_rows, length, vocab_size, do_sample, num_others)
        self.head = head
        self._windows = [StateWindow(head.config.num_features) for _ in range(num_rows)]

    @property
    def layers(self) -> list[int]:
        return list(self.head.config.hidden_layers or [])

    def observe(self, row: int, start: int, states_TF: Tensor) -> None:
        self._windows[row].write(start, states_TF)

    def sampler(self, index: int, row: Row, num_tokens: int) -> CachedModel | None:
        """None: without the target it has no states to read."""
        return None

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        proposal = super().draft(rows, num_tokens)
        for window, row, length in zip(self._windows, rows, self.cached.lengths, strict=True):
            # a later rollback goes back to what is final at the furthest
            window.forget_before(min(len(row.prompt) + row.num_final, length) - 1)
        return proposal

    def _unread(self, index: int, row: Row) -> list[int]:
        return super()._unread(index, row) if self._windows[index].end >= row.num_context - 1 else []

    def _begin(self, blocks: Sequence[list[int]]) -> BlockOutput:
        width = max(map(len, blocks))
        states = []
        for window, block, length in zip(self._windows, blocks, self.cached.lengths, strict=True):
            # the state of the position before each token
            states_TF = window.read(length - 1, length - 1 + len(block))
            states.append(torch.nn.functional.pad(states_TF, (0, 0, width - len(block), 0)))
        return self.cached.forward(blocks, 1, states_BTF=torch.stack(states))

    def _go_on(self, token_B: Tensor, before: BlockOutput) -> BlockOutput:
        assert before.hidden_BTF is not None
        return self.cached.forward(token_B[:, None], 1, states_BTF=before.hidden_BTF[:, -1:])

    def _end(self) -> None:
        # where the target has been, its own states replace the head's
        self.cached.keep(self._starts)

    def _scores(
        self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if not self.do_sample and not rows[0].processors:
            return logits_BV.float(), self.head.token_ids
        full_BV = logits_BV.new_full((len(rows), self.vocab_size or self.head.config.vocab_size), -torch.inf)
        return super()._scores(rows, tokens, full_BV.index_copy(1, self.head.token_ids, logits_BV))

    def keep(self, lengths: Sequence[int]) -> None:
        super().keep(lengths)
        for window, length in zip(self._windows, lengths, strict=True):
            window.keep(length)

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self._windows = [self._windows[row] for row in rows]
