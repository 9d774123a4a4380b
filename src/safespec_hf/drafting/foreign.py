"""Drafts of a model with another tokenizer: through text, or sampled from the tokens that both vocabularies have.

The idea is universal assisted decoding's, and that of "Lossless Speculative Decoding Algorithms for Heterogeneous
Vocabularies" (https://arxiv.org/abs/2502.05202).

Shapes: B rows, G drafts at most, V the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..answer.rows import Row
from ..engine.cache import BlockOutput, CachedModel
from .draft_length import DraftLength, confidence_kind
from .drafters import Found, Proposal, num_common, worthwhile
from .model import Guesses, ModelDrafter
from .translation import TokenizerPair, Translation


class ForeignDrafter(ModelDrafter):
    """Drafts in the tokens of another tokenizer, and says them in the target's.

    Args:
        model, num_rows, length: As for [`ModelDrafter`].
        pair ([`TokenizerPair`]): The target's tokenizer and the draft's.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, length: DraftLength, pair: TokenizerPair):
        super().__init__(model, num_rows, length, vocab_size=None, do_sample=False)
        self.pair = pair
        self._translations = [Translation(pair) for _ in range(num_rows)]
        self._contexts: list[list[int]] = [[] for _ in range(num_rows)]  # of this round, in the draft's tokens
        self._read: list[list[int]] = [[] for _ in range(num_rows)]  # what its cache holds

    def sampler(self, index: int, row: Row, num_tokens: int) -> CachedModel | None:
        """None: what it samples would have to be tokens of the target."""
        return None

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int], found: Found | None = None) -> Proposal:
        if max(num_tokens) <= 0:
            return Proposal([[] for _ in rows])
        pairs = zip(self._translations, rows, strict=True)
        self._contexts = [translation.of(row.context(0)) for translation, row in pairs]
        known = zip(self._read, self._contexts, strict=True)
        # the last token is read in any case: what follows it is the question
        self.cached.keep([min(num_common(read, context), len(context) - 1) for read, context in known])
        return super().draft(rows, num_tokens)

    def _num_context(self, index: int, row: Row) -> int:
        return len(self._contexts[index])

    def _unread(self, index: int, row: Row) -> list[int]:
        return self._contexts[index][self.cached.lengths[index] :]

    def _write(self, rows: Sequence[Row], blocks: Sequence[list[int]], most: int) -> list[Guesses]:
        guesses = super()._write(rows, blocks, most)
        new_BG = self._to_draft(torch.stack([guess.tokens_BS[:, 0] for guess in guesses], 1)).tolist()
        triples = zip(self._contexts, new_BG, self.cached.lengths, strict=True)
        self._read = [[*context, *new][:length] for context, new, length in triples]
        return guesses

    def _to_draft(self, tokens: Tensor) -> Tensor:
        """The draft's ids for those of its guesses."""
        return tokens

    def _scores(
        self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        # the caller's processors know the target's tokens only
        return logits_BV.float(), None

    def _propose(
        self, rows: Sequence[Row], guesses: Sequence[Guesses], nums: Sequence[int], has_others: bool
    ) -> Proposal:
        tokens_BG = torch.stack([guess.tokens_BS[:, 0] for guess in guesses], 1).tolist()
        chances_BG = torch.stack([guess.chances_BS[:, 0] for guess in guesses], 1).tolist()
        drafts: list[list[int]] = []
        kinds: list[list[int]] = []
        for row, context, new, chances, num in zip(rows, self._contexts, tokens_BG, chances_BG, nums, strict=True):
            tokens = self.pair.to_target(row.context(0), context, new[:num])[:num] if num else []
            drafts.append(tokens)
            # tokens of one tokenizer lie about where those of the other do
            num_made = min(num, len(chances))
            places = [index * num_made // len(tokens) for index in range(len(tokens))]
            kinds.append([confidence_kind(chances[place]) for place in places] if self.length.is_adaptive else [])
        if not self.length.is_adaptive:
            return Proposal(drafts)
        for row_kinds in kinds:
            self.length.note(row_kinds)
        return worthwhile(self.length, drafts, kinds)

    def keep(self, lengths: Sequence[int]) -> None:
        for translation, length in zip(self._translations, lengths, strict=True):
            translation.keep(length)

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self._translations = [self._translations[row] for row in rows]
        self._read = [self._read[row] for row in rows]


class SharedTokensDrafter(ForeignDrafter):
    """Samples from those of the draft's tokens that the target has as well, with the probabilities of that.

    Args:
        model, num_rows, length, pair: As for [`ForeignDrafter`]; the tokenizers share at least one token.
        vocab_size (`int`): The target's.
    """

    def __init__(
        self, model: PreTrainedModel, num_rows: int, length: DraftLength, pair: TokenizerPair, vocab_size: int
    ):
        super().__init__(model, num_rows, length, pair)
        self.do_sample, self.vocab_size = True, vocab_size
        usable = [
            (own, known)
            for own, known in zip(*pair.shared, strict=True)
            if own < self.num_known and known < vocab_size
        ]
        self._own, self._known = (torch.tensor(ids, dtype=torch.long) for ids in zip(*usable, strict=True))
        self._table = torch.zeros(vocab_size, dtype=torch.long).index_copy(0, self._known, self._own)

    def _to_draft(self, tokens: Tensor) -> Tensor:
        return self._table.to(tokens.device)[tokens]

    def _go_on(self, token_B: Tensor, before: BlockOutput) -> BlockOutput:
        return super()._go_on(self._to_draft(token_B), before)

    def _scores(
        self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        assert self.vocab_size is not None
        own, known = self._own.to(logits_BV.device), self._known.to(logits_BV.device)
        full_BV = logits_BV.new_full((len(rows), self.vocab_size), -torch.inf)
        full_BV = full_BV.index_copy(1, known, logits_BV[:, own])
        return self._processed(rows, tokens, full_BV), None

    def _propose(
        self, rows: Sequence[Row], guesses: Sequence[Guesses], nums: Sequence[int], has_others: bool
    ) -> Proposal:
        return ModelDrafter._propose(self, rows, guesses, nums, has_others)
