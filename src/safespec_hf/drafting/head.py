"""Drafts of a draft head, which reads the states that the target computed anyway.

Shapes: B rows, T positions of a block, F features of the target's tapped states, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..answer.logits import are_of_scores_only
from ..answer.rows import Row
from ..engine.cache import BlockOutput, CachedModel
from ..engine.token_tree import is_chain
from ..heads.draft_head import DraftHead
from .draft_length import DraftLength
from .drafters import Found, Proposal
from .model import MAX_TREE, ModelDrafter
from .state_window import StateWindow
from .tree import DraftTree


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

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int], found: Found | None = None) -> Proposal:
        is_tree = self.num_others > 0 and len(rows) == 1 and bool(rows[0].tokens)
        is_tree = is_tree and are_of_scores_only(rows[0].processors)
        # an accelerator would have to wait for the host at every step
        is_tree = is_tree and self.head.fuse.weight.device.type == "cpu"
        proposal = self._draft_tree(rows, num_tokens, found) if is_tree else super().draft(rows, num_tokens)
        for window, row, length in zip(self._windows, rows, self.cached.lengths, strict=True):
            # a later rollback goes back to what is final at the furthest
            window.forget_before(min(len(row.prompt) + row.num_final, length) - 1)
        return proposal

    def _draft_tree(self, rows: Sequence[Row], num_tokens: Sequence[int], found: Found | None) -> Proposal:
        """A tree for the only row: where several guesses are likely, each of them is continued."""
        (block,), (most,) = self._divide(rows, num_tokens)
        if most <= 0:
            return Proposal([[]])
        tree = DraftTree(self.length, most, MAX_TREE)
        if found is not None and found.proposal.kinds is not None:
            tree.add_found(found.proposal.drafts[0], found.proposal.kinds[0], found.length)
        with self._fresh_after_errors(rows):
            output = self._begin([block])
            self._starts = list(self.cached.lengths)
            assert output.hidden_BTF is not None
            states = {-1: output.hidden_BTF[0, -1]}
            self._add(tree, [-1], rows, output)
            read: list[int] = []
            while chosen := tree.to_continue():
                read += chosen
                # all that was read so far again: the head is small, and a tree has to be the last of its cache
                parents = [tree.nodes[index].parent for index in read]
                output = self.cached.forward(
                    [[tree.nodes[index].token for index in read]],
                    len(chosen),
                    states_BTF=torch.stack([states[parent] for parent in parents])[None],
                    parents=[[read.index(parent) if parent >= 0 else -1 for parent in parents]],
                )
                self._end()
                assert output.hidden_BTF is not None
                states |= zip(chosen, output.hidden_BTF[0, -len(chosen) :], strict=True)
                self._add(tree, chosen, rows, output)
        drafts, kinds, parents = tree.best()
        return Proposal([drafts], kinds=[kinds], parents=None if is_chain(parents) else [parents])

    def _add(self, tree: DraftTree, parents: Sequence[int], rows: Sequence[Row], output: BlockOutput) -> None:
        guesses = self._guess(rows, [], output.logits_BTV[0])
        for parent, tokens, chances in zip(
            parents, guesses.tokens_BS.tolist(), guesses.chances_BS.tolist(), strict=True
        ):
            if not any(map(math.isnan, chances)):
                tree.add(parent, tokens, chances)

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
        if not self.do_sample and are_of_scores_only(rows[0].processors):
            scores_BV = rows[0].process(rows[0].visible_ids(), logits_BV.to(rows[0].device, torch.float32))
            return scores_BV, self.head.token_ids
        full_BV = logits_BV.new_full((len(rows), self.vocab_size or self.head.config.vocab_size), -torch.inf)
        return super()._scores(rows, tokens, full_BV.index_copy(1, self.head.token_ids, logits_BV))

    def keep(self, lengths: Sequence[int]) -> None:
        super().keep(lengths)
        for window, length in zip(self._windows, lengths, strict=True):
            window.keep(length)

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self._windows = [self._windows[row] for row in rows]
