"""Where drafts come from: a smaller model, a head on the target's own states, or a lookup.

Shapes: B rows, T positions of a block, F features of the target's tapped states, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..answer.logits import process_rows
from ..answer.rows import Row
from ..engine.cache import BlockOutput, CachedModel
from ..engine.token_tree import chain_parents, is_chain
from ..heads.draft_head import DraftHead
from .draft_length import DraftLength, confidence_kind, match_kind, other_kind
from .lookup import NgramIndex

MAX_TREE = 32
"""Drafts of a row at most, other guesses included, where they are a tree."""


class Proposal(NamedTuple):
    """What is proposed to the target in one round.

    Attributes:
        drafts (`list[list[int]]`): Draft tokens of each row; rows may differ in length.
        probs_BGV (`torch.FloatTensor` of shape `(B, G, V)`, *optional*):
            The distributions they were sampled from, when they were sampled; right-aligned.
        kinds (`list[list[int]]`, *optional*): The evidence for each draft, see [`DraftLength`].
        parents (`list[list[int]]`, *optional*): Of each draft, where rows are trees; see `draft_tree`.
    """

    drafts: list[list[int]]
    probs_BGV: Tensor | None = None
    kinds: list[list[int]] | None = None
    parents: list[list[int]] | None = None


class Step(NamedTuple):
    """One forward of a draft model: its first guess for the next token, and S - 1 others.

    Attributes:
        tokens_BS, chances_BS (`torch.Tensor` of shape `(B, S)`): The guesses, and how sure the draft is of each.
        probs_BV (`torch.Tensor` of shape `(B, V)`, *optional*): What the one guess was sampled from.
    """

    tokens_BS: Tensor
    chances_BS: Tensor
    probs_BV: Tensor | None


class LookupDrafter:
    """Drafts what followed the same n-gram earlier in the row.

    Args:
        max_size (`int`): Longest n-gram, >= 1.
        num_rows (`int`): Rows of the batch.
        length ([`DraftLength`]): How many drafts pay.
    """

    def __init__(self, max_size: int, num_rows: int, length: DraftLength):
        self.length = length
        self._ngrams = [NgramIndex(max_size) for _ in range(num_rows)]

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row."""
        drafts, kinds = [], []
        for row, ngrams, most in zip(rows, self._ngrams, num_tokens, strict=True):
            tokens, size = ngrams.continuation(row.prompt, row.tokens, most)
            # tokens that go on with a match match ever more
            evidence = [match_kind(size + index) for index in range(len(tokens))]
            num = self.length.num_worthwhile(evidence)
            drafts.append(tokens[:num])
            kinds.append(evidence[:num])
        return Proposal(drafts, kinds=kinds)

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""
        for ngrams, length in zip(self._ngrams, lengths, strict=True):
            ngrams.keep(length)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows."""
        self._ngrams = [self._ngrams[row] for row in rows]


class ModelDrafter:
    """Drafts with a causal language model of the target's tokenizer, whose cache is kept across rounds.

    Args:
        model ([`~transformers.PreTrainedModel`]): The draft model.
        num_rows (`int`): Rows of the batch.
        length ([`DraftLength`]): How many drafts pay.
        vocab_size (`int`, *optional*): The target's; drafts are limited to it. Default: the draft model's.
        do_sample (`bool`): Sample drafts from the processed distribution instead of taking its argmax.
        num_others (`int`, defaults to 0): Guesses for a token that may be verified beside the first one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        length: DraftLength,
        vocab_size: int | None,
        do_sample: bool,
        num_others: int = 0,
    ):
        self.cached = CachedModel(model, num_rows)
        self.length = length
        self.vocab_size = vocab_size
        self.do_sample = do_sample
        self.num_others = num_others
        self._starts: list[int] = []

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row, and other guesses beside them."""
        steps: list[Step] = []
        reach = [1.0] * len(rows)
        output, self._starts = self._begin(rows), list(self.cached.lengths)
        # on an accelerator, reading how sure the draft is would make the host wait for every token
        reads_early = self.length.is_adaptive and output.logits_BTV.device.type == "cpu"
        most = max(num_tokens) if reads_early else min(max(num_tokens), self.length.plan(max(num_tokens)))
        for number in range(most):
            steps.append(self._step(rows, [step.tokens_BS[:, 0] for step in steps], output.logits_BTV[:, -1]))
            if reads_early:
                chances = [self.length.chance(confidence_kind(value)) for value in steps[-1].chances_BS[:, 0].tolist()]
                reach = [before * chance for before, chance in zip(reach, chances, strict=True)]
            if number + 1 == most or (reads_early and not self.length.goes_on(max(reach))):
                break
            output = self._go_on(steps[-1].tokens_BS[:, 0], output)
        self._end(self._starts)
        # a tree's mask grows with the block, and the first one holds the whole prompt
        has_others = self.num_others > 0 and all(row.tokens for row in rows)
        return self._propose(steps, num_tokens, has_others)

    def reject_after(self, row: int, num_drafts: int) -> None:
        """Forgets all but a row's first `num_drafts` drafts: another guess was accepted in the place of the next."""
        lengths = list(self.cached.lengths)
        lengths[row] = min(lengths[row], self._starts[row] + num_drafts)
        self.cached.keep(lengths)

    def _begin(self, rows: Sequence[Row]) -> BlockOutput:
        blocks = [row.context(length) for row, length in zip(rows, self.cached.lengths, strict=True)]
        return self.cached.forward([known_ids(self.cached.model, block) for block in blocks], 1)

    def _go_on(self, token_B: Tensor, before: BlockOutput) -> BlockOutput:
        return self.cached.forward(token_B[:, None], 1)

    def _end(self, lengths: Sequence[int]) -> None:
        """A model's states of its own drafts hold if they are accepted; `keep` drops the others."""

    def _scores(
        self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Processed scores, and the tokens they are of, if not all of the vocabulary."""
        has_processors = bool(rows[0].processors)
        # reading the drafts so far makes the host wait, so only where a processor needs them
        extras = torch.stack(list(tokens), 1).tolist() if tokens and has_processors else [[] for _ in rows]
        return process_rows(rows, extras, fit_vocabulary(logits_BV, self.vocab_size)), None

    def _step(self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor) -> Step:
        scores_BV, to_token = self._scores(rows, tokens, logits_BV)
        if self.do_sample:
            probs_BV = scores_BV.softmax(dim=-1)
            return Step(torch.multinomial(probs_BV, 1), probs_BV.amax(dim=-1, keepdim=True), probs_BV)
        num = min(1 + self.num_others, scores_BV.shape[1])
        values_BS, tokens_BS = scores_BV.topk(num, dim=-1) if num > 1 else scores_BV.max(dim=-1, keepdim=True)
        chances_BS = (
            (values_BS - scores_BV.logsumexp(dim=-1, keepdim=True)).exp() if self.length.is_adaptive else values_BS
        )
        return Step(tokens_BS if to_token is None else to_token[tokens_BS], chances_BS, None)

    def _propose(self, steps: Sequence[Step], num_tokens: Sequence[int], has_others: bool) -> Proposal:
        tokens_BGS = torch.stack([step.tokens_BS for step in steps], 1).tolist()
        drafts = [[first for first, *_ in row[:num]] for row, num in zip(tokens_BGS, num_tokens, strict=True)]
        probs = [step.probs_BV for step in steps if step.probs_BV is not None]
        if not self.length.is_adaptive:
            return Proposal(drafts, _align_right(torch.stack(probs, 1), drafts) if probs else None)
        chances_BGS = torch.stack([step.chances_BS for step in steps], 1).tolist()
        kinds = [
            [confidence_kind(first) for first, *_ in row[: len(d)]] for row, d in zip(chances_BGS, drafts, strict=True)
        ]
        # What is dropped may depend on how sure the draft is, and on the tokens before, but never on the token
        # itself: what is left would no longer be distributed as its probabilities say.
        nums = [self.length.num_worthwhile(row) for row in kinds]
        drafts = [row[:num] for row, num in zip(drafts, nums, strict=True)]
        kinds = [row[:num] for row, num in zip(kinds, nums, strict=True)]
        parents = [chain_parents(num) for num in nums]
        for row in range(len(drafts)) if has_others else ():
            self._add_others(tokens_BGS[row], chances_BGS[row], num_tokens[row], drafts[row], kinds[row], parents[row])
        return Proposal(
            drafts,
            _align_right(torch.stack(probs, 1), drafts) if probs else None,
            kinds,
            None if all(map(is_chain, parents)) else parents,
        )

    def _add_others(
        self,
        tokens_GS: Sequence[Sequence[int]],
        chances_GS: Sequence[Sequence[float]],
        num_tokens: int,
        drafts: list[int],
        kinds: list[int],
        parents: list[int],
    ) -> None:
        """Adds the other guesses that are worth verifying, as leaves beside the chain."""
        reach, chain = 1.0, list(kinds)
        for place, (tokens, chances) in enumerate(zip(tokens_GS[:num_tokens], chances_GS, strict=False)):
            for token, chance in zip(tokens[1:], chances[1:], strict=True):
                kind = other_kind(chance)
                if len(drafts) < MAX_TREE and self.length.verifies(reach * self.length.chance(kind)):
                    drafts.append(token)
                    kinds.append(kind)
                    parents.append(place - 1)
            if place >= len(chain):
                return
            reach *= self.length.chance(chain[place])

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""
        self.cached.keep(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows."""
        self.cached.select(rows)


class HeadDrafter(ModelDrafter):
    """Drafts with a [`DraftHead`], which reads the states that the target computed anyway.

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

    def observe(self, row: int, start: int, states_TF: Tensor) -> None:
        """Takes the target's states of a row's context from position `start` on; later ones are forgotten."""
        self._windows[row].keep(start)
        self._windows[row].append(start, states_TF)

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row; none before the target has read the prompts."""
        has_states = all(window.end >= row.num_context - 1 for window, row in zip(self._windows, rows, strict=True))
        longest = max(row.num_context for row in rows) + max(num_tokens)
        if not has_states or longest > self.head.config.max_position_embeddings:
            return Proposal([[] for _ in rows])
        proposal = super().draft(rows, num_tokens)
        for window, row, length in zip(self._windows, rows, self.cached.lengths, strict=True):
            # a later rollback goes back to what is final at the furthest
            window.forget_before(min(len(row.prompt) + row.num_final, length) - 1)
        return proposal

    def _begin(self, rows: Sequence[Row]) -> BlockOutput:
        blocks = [row.context(length) for row, length in zip(rows, self.cached.lengths, strict=True)]
        width = max(len(block) for block in blocks)
        states = []
        for row, window, block in zip(rows, self._windows, blocks, strict=True):
            # the state of the position before each token
            states_TF = window.read(row.num_context - len(block) - 1, row.num_context - 1)
            states.append(torch.nn.functional.pad(states_TF, (0, 0, width - len(block), 0)))
        return self.cached.forward(blocks, 1, states_BTF=torch.stack(states))

    def _go_on(self, token_B: Tensor, before: BlockOutput) -> BlockOutput:
        assert before.hidden_BTF is not None
        return self.cached.forward(token_B[:, None], 1, states_BTF=before.hidden_BTF[:, -1:])

    def _end(self, lengths: Sequence[int]) -> None:
        # where the target has been, its own states replace the head's
        self.cached.keep(lengths)

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


class StateWindow:
    """The target's states of the last positions of one row, in the pieces that the forwards gave.

    Args:
        num_features (`int`): Of a state. Positions whose state is not known read as zeros.
    """

    def __init__(self, num_features: int):
        self.num_features = num_features
        self.end = 0
        self._pieces: list[tuple[int, Tensor]] = []

    def append(self, start: int, states_TF: Tensor) -> None:
        """Adds the states of the positions from `start` on, which is where the last piece ended, or later."""
        self._pieces.append((start, states_TF))
        self.end = start + states_TF.shape[0]

    def keep(self, end: int) -> None:
        """Forgets the positions from `end` on."""
        while self._pieces and self._pieces[-1][0] >= end:
            self._pieces.pop()
        if self._pieces:
            start, states_TF = self._pieces[-1]
            self._pieces[-1] = (start, states_TF[: end - start])
        self.end = min(self.end, end)

    def forget_before(self, position: int) -> None:
        """Lets go of the pieces that end before `position`, and of the memory of what is cut."""
        while self._pieces and self._pieces[0][0] + self._pieces[0][1].shape[0] <= position:
            self._pieces.pop(0)
        if self._pieces and self._pieces[0][0] + 64 < position:
            start, states_TF = self._pieces[0]
            self._pieces[0] = (position, states_TF[position - start :].clone())

    def read(self, start: int, end: int) -> Tensor:
        """The states of positions `[start, end)`, of shape `(end - start, F)`."""
        found = [(first, s[max(start - first, 0) : max(end - first, 0)]) for first, s in self._pieces]
        found = [(max(first, start), states_TF) for first, states_TF in found if states_TF.shape[0]]
        like = self._pieces[0][1] if self._pieces else torch.empty(0)
        states_TF = like.new_zeros((end - start, self.num_features))
        for first, piece_TF in found:
            states_TF[first - start : first - start + piece_TF.shape[0]] = piece_TF
        return states_TF


def known_ids(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    """Tokens as a draft can read them: one that was added to the target only reads as the draft's last one."""
    last = model.config.get_text_config().vocab_size - 1
    return tokens if max(tokens) <= last else [min(token, last) for token in tokens]


def fit_vocabulary(logits_BV: Tensor, size: int | None) -> Tensor:
    """Cuts or fills a draft's logits to the target's vocabulary, where the two differ by padding rows.

    Example:

        >>> import torch
        >>> fit_vocabulary(torch.zeros(1, 2), 3)
        tensor([[0., 0., -inf]])
    """
    if size is None or logits_BV.shape[1] == size:
        return logits_BV
    return torch.nn.functional.pad(logits_BV[:, :size], (0, max(size - logits_BV.shape[1], 0)), value=-torch.inf)


def _align_right(probs_BGV: Tensor, drafts: list[list[int]]) -> Tensor:
    most = max(len(tokens) for tokens in drafts)
    return torch.stack(
        [
            torch.nn.functional.pad(probs[: len(tokens)], (0, 0, most - len(tokens), 0))
            for probs, tokens in zip(probs_BGV, drafts, strict=True)
        ]
    )
