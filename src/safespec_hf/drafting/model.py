"""Drafts of a smaller model, or of anything else that writes token after token with a cache of its own.

A drafter may fall short of the target: it may have fewer positions, not know a token, or compute nonsense. Then a row
gets fewer drafts or none, and the others go on.

Shapes: B rows, G drafts at most, S guesses for a token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..answer.logits import process_guesses, split_processors
from ..answer.rows import Row
from ..engine.alone import cached_model
from ..engine.cache import BlockOutput, CachedModel
from ..engine.ropes import most_tokens
from ..engine.token_tree import chain_parents, is_chain
from ..engine.transfer import to_host
from .draft_length import DraftLength, confidence_kind, other_kind
from .drafters import Found, Proposal, fit_vocabulary

MAX_TREE = 32
"""Drafts of a row at most, other guesses included, where they are a tree."""
Value = TypeVar("Value")
IsWhole = Callable[[int, list[int]], bool]
"""Whether the tokens that were written for a row, which is named by its place, are enough."""
FILLER = 0  # read by rows that sit a round out, and forgotten again


class Guesses(NamedTuple):
    """What one forward gives for each row's next token: a first guess, and S - 1 others.

    Attributes:
        tokens_BS, chances_BS (`torch.Tensor` of shape `(B, S)`):
            The guesses, and how sure the draft is of each; `nan` where its scores make no distribution.
        probs_BV (`torch.Tensor` of shape `(B, V)`, *optional*): What the one guess was sampled from.
    """

    tokens_BS: Tensor
    chances_BS: Tensor
    probs_BV: Tensor | None


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
        self.cached = cached_model(model, num_rows)
        self.length = length
        self.vocab_size = vocab_size
        self.do_sample = do_sample
        self.num_others = num_others
        text = model.config.get_text_config()
        self.num_positions = most_tokens(model)
        self.num_known: int = text.vocab_size  # tokens it has an embedding of
        self._unknown_at: list[int | None] = [None] * num_rows  # where a row's first other token is
        self._starts: list[int] = []

    @property
    def network(self) -> PreTrainedModel:
        """What drafts."""
        return self.cached.model

    @property
    def num_forwards(self) -> int:
        """Its forwards so far."""
        return self.cached.usage.num_forwards

    @property
    def layers(self) -> list[int]:
        """The target's hidden states that `observe` needs."""
        return []

    def observe(self, row: int, start: int, states_TF: Tensor) -> None:
        """Takes the target's states of `layers` of a row's context, from position `start` on."""

    def sampler(self, index: int, row: Row, num_tokens: int) -> CachedModel | None:
        """The model with its cache, if it can write so many tokens after a row's context."""
        is_long = row.num_context + num_tokens - 1 > self.num_positions
        return None if is_long or not self._unread(index, row) else self.cached

    def fork(self, index: int, row: Row, num_tokens: int, layers: Sequence[int]) -> CachedModel | None:
        """A copy of a row's cache before the last token of its context, whatever was written since then.

        Args:
            num_tokens (`int`): So many tokens are to be read after the context. `None` if it can't read them.
            layers (`Sequence[int]`): Hidden states that it returns.
        """
        end = row.num_context + num_tokens
        if end > self.num_positions:
            return None
        fork = self.cached.fork(index, 1, layers)
        fork.keep([row.num_context - 1])
        fork.reach(0, end)
        return fork if max(row.context(fork.lengths[0])) < self.num_known else None

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int], found: Found | None = None) -> Proposal:
        """At most `num_tokens[row]` drafts for each row, and other guesses beside them.

        Args:
            found ([`Found`], *optional*): What a lookup has for the rows, to be taken in where it fits in.
        """
        blocks, nums = self._divide(rows, num_tokens)
        if max(nums) <= 0:
            return Proposal([[] for _ in rows])
        with self._fresh_after_errors(rows):
            guesses = self._write(rows, blocks, max(nums))
        # a tree's mask grows with the block, and the first one holds the whole prompt
        has_others = self.num_others > 0 and all(row.tokens for row in rows)
        return self._propose(rows, guesses, nums, has_others)

    def write(self, rows: Sequence[Row], num_tokens: Sequence[int], is_whole: IsWhole) -> list[list[int]]:
        """Goes on with each row until that is enough, or has `num_tokens[row]` tokens; whatever it costs.

        A row that the draft can't go on with, now or after some tokens, gets none or fewer.

        Args:
            is_whole (`Callable`): Is told a row's place and the tokens for it so far.
        """
        texts: list[list[int]] = [[] for _ in rows]
        blocks, nums = self._divide(rows, num_tokens)
        if max(nums) <= 0:
            return texts
        is_open, columns = [num > 0 for num in nums], list[Tensor]()
        with self._fresh_after_errors(rows):
            self._forget_idle(blocks)
            output = self._begin([block or [FILLER] for block in blocks])
            starts = list(self.cached.lengths)
            while True:
                guess = self._guess(rows, columns, output.logits_BTV[:, -1])
                columns.append(guess.tokens_BS[:, 0])
                written, chances = (part.tolist() for part in to_host([columns[-1], guess.chances_BS[:, 0]]))
                for index, (token, chance) in enumerate(zip(written, chances, strict=True)):
                    # nobody verifies these, so none may be a token that has no score
                    is_open[index] &= chance > -math.inf
                    if is_open[index]:
                        texts[index].append(token)
                        is_open[index] = len(texts[index]) < nums[index] and not is_whole(index, texts[index])
                if not any(is_open):
                    break
                output = self._go_on(columns[-1], output)
            # a row that was done went on with the others
            kept = [start + len(tokens) for start, tokens in zip(starts, texts, strict=True)]
            self.cached.keep([length if block else 0 for length, block in zip(kept, blocks, strict=True)])
        return texts

    @contextmanager
    def _fresh_after_errors(self, rows: Sequence[Row]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # whatever broke it off, the cache may hold half of a forward
            self.cached = cached_model(self.cached.model, len(rows), usage=self.cached.usage)
            raise

    def _divide(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """What each row has to read first, nothing if it sits this round out, and how many drafts it gets."""
        lengths = [self._num_context(index, row) for index, row in enumerate(rows)]
        for index, length in enumerate(lengths):
            self.cached.reach(index, length)
        rooms = [self.num_positions + 1 - length for length in lengths]
        blocks = [self._unread(index, row) if rooms[index] > 0 else [] for index, row in enumerate(rows)]
        triples = zip(blocks, rooms, num_tokens, strict=True)
        nums = [min(room, num) if block else 0 for block, room, num in triples]
        # all rows take as many steps, and in uneven batches a row can have columns that hold no token of it
        while sum(map(bool, blocks)) > 1 and self._num_columns(blocks) + max(nums) - 1 > self.num_positions:
            longest = max((index for index, block in enumerate(blocks) if block), key=lengths.__getitem__)
            blocks[longest], nums[longest] = [], 0
        return blocks, nums

    def _num_context(self, index: int, row: Row) -> int:
        """How many tokens a row's context has for it."""
        return row.num_context

    def _unread(self, index: int, row: Row) -> list[int]:
        """The context tokens that it has not read yet; none if it does not know one of them."""
        if self._unknown_at[index] is not None:
            return []
        start = self.cached.lengths[index]
        block = row.context(start)
        if not block:  # of embeddings no token is known
            return []
        if row.placeholders:  # the draft sees no image anyway
            unknown = {token for token in row.placeholders if token >= self.num_known}
            block = [FILLER if token in unknown else token for token in block]
        if max(block) < self.num_known:
            return block
        self._unknown_at[index] = start + next(at for at, token in enumerate(block) if token >= self.num_known)
        return []

    def _num_columns(self, blocks: Sequence[Sequence[int]]) -> int:
        """Of the cache, once these blocks have been read."""
        lengths = [length for length, block in zip(self.cached.lengths, blocks, strict=True) if block]
        return max(lengths) + max(map(len, blocks))

    def _write(self, rows: Sequence[Row], blocks: Sequence[list[int]], most: int) -> list[Guesses]:
        """Guesses for at most so many tokens, one forward for each."""
        self._forget_idle(blocks)
        output = self._begin([block or [FILLER] for block in blocks])
        self._starts = list(self.cached.lengths)
        guesses: list[Guesses] = []
        reach = [1.0] * len(rows)
        # on an accelerator, reading how sure the draft is would make the host wait for every token
        reads_early = self.length.is_adaptive and output.logits_BTV.device.type == "cpu"
        most = most if reads_early else min(most, self.length.plan(most))
        for number in range(most):
            guesses.append(self._guess(rows, [guess.tokens_BS[:, 0] for guess in guesses], output.logits_BTV[:, -1]))
            if reads_early:
                firsts = guesses[-1].chances_BS[:, 0].tolist()
                reach = [
                    before * self.length.chance(confidence_kind(first))
                    for before, first in zip(reach, firsts, strict=True)
                ]
            if number + 1 == most or (
                reads_early and not self.length.drafts_more(sum(reach) / len(reach), number + 1)
            ):
                break
            output = self._go_on(guesses[-1].tokens_BS[:, 0], output)
        self._end()
        self._forget_idle(blocks)
        return guesses

    def _forget_idle(self, blocks: Sequence[list[int]]) -> None:
        """Rows that sit out leave their columns to the others."""
        if not all(blocks):
            pairs = zip(self.cached.lengths, blocks, strict=True)
            self.cached.keep([length if block else 0 for length, block in pairs])

    def _begin(self, blocks: Sequence[list[int]]) -> BlockOutput:
        return self.cached.forward(blocks, 1)

    def _go_on(self, token_B: Tensor, before: BlockOutput) -> BlockOutput:
        return self.cached.forward(token_B[:, None], 1, num_drafts=[1] * len(token_B))

    def _end(self) -> None:
        """A model's states of its own drafts hold if they are accepted; `keep` drops the others."""

    def _scores(
        self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Processed scores, and the tokens they are of, if not the first ones of the vocabulary."""
        scores_BV = self._processed(rows, tokens, fit_vocabulary(logits_BV, self.vocab_size))
        return scores_BV[:, : self.num_known], None  # a processor may have left only tokens that it can't read

    def _processed(self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor) -> Tensor:
        """What the caller's processors make of logits over the target's vocabulary."""
        scores_BV = logits_BV.to(rows[0].device, torch.float32)
        of_context, of_scores = split_processors(rows[0].processors)
        if of_context:
            # the drafts so far stay where they are: to read them would make the host wait
            drafts_BG = torch.stack(list(tokens), 1) if tokens else [() for _ in rows]
            ids = [row.visible_ids(drafts_G) for row, drafts_G in zip(rows, drafts_BG, strict=True)]
            scores_BV = process_guesses(rows, ids, scores_BV)
        if of_scores:
            ids_1L = cast("torch.LongTensor", rows[0].visible_ids())
            scores_BV = of_scores(ids_1L, cast("torch.FloatTensor", scores_BV))
        return scores_BV

    def _guess(self, rows: Sequence[Row], tokens: Sequence[Tensor], logits_BV: Tensor) -> Guesses:
        scores_BV, to_token = self._scores(rows, tokens, logits_BV)
        if self.do_sample:
            probs_BV = scores_BV.softmax(dim=-1)
            chances_B1 = probs_BV.amax(dim=-1, keepdim=True)
            # nan is all or nothing of a row: its drafts will be dropped, but sampling would fail for the others too
            tokens_B1 = torch.multinomial(probs_BV.nan_to_num_(nan=1.0), 1)
            return Guesses(tokens_B1, chances_B1, fit_vocabulary(probs_BV, self.vocab_size, fill=0.0))
        num = min(1 + self.num_others, scores_BV.shape[1])
        values_BS, tokens_BS = scores_BV.topk(num, dim=-1) if num > 1 else scores_BV.max(dim=-1, keepdim=True)
        chances_BS = (
            (values_BS - scores_BV.logsumexp(dim=-1, keepdim=True)).exp() if self.length.is_adaptive else values_BS
        )
        return Guesses(tokens_BS if to_token is None else to_token[tokens_BS], chances_BS, None)

    def _propose(
        self, rows: Sequence[Row], guesses: Sequence[Guesses], nums: Sequence[int], has_others: bool
    ) -> Proposal:
        # all that the host has to know of the drafts, in one go
        parts = zip(*((guess.tokens_BS, guess.chances_BS) for guess in guesses), strict=True)
        tokens_BGS, chances_BGS = (part.tolist() for part in to_host([torch.stack(part, 1) for part in parts]))
        if not self.length.is_adaptive and not self.do_sample:
            return Proposal(_firsts(tokens_BGS, nums))
        nums = [_num_sound(row[:num]) for row, num in zip(chances_BGS, nums, strict=True)]
        kinds = [[confidence_kind(chance) for chance in chances] for chances in _firsts(chances_BGS, nums)]
        # What is dropped may depend on how sure the draft is, and on the tokens before, but never on the token
        # itself: what is left would no longer be distributed as its probabilities say.
        num = self.length.num_worthwhile(*kinds)
        kept = [min(num, len(row)) for row in kinds]
        for row in kinds:
            self.length.note(row)
        drafts = _firsts(tokens_BGS, kept)
        probs = [guess.probs_BV for guess in guesses if guess.probs_BV is not None]
        probs_BGV = _align_right(torch.stack(probs, 1), drafts) if probs and any(drafts) else None
        if not self.length.is_adaptive:
            return Proposal(drafts, probs_BGV)
        kinds = [row[:num] for row, num in zip(kinds, kept, strict=True)]
        parents = [chain_parents(num) for num in kept]
        for index in range(len(drafts)) if has_others else ():
            chances_GS = chances_BGS[index][: nums[index]]
            self._add_others(tokens_BGS[index], chances_GS, drafts[index], kinds[index], parents[index], max(kept))
        return Proposal(drafts, probs_BGV, kinds, None if all(map(is_chain, parents)) else parents)

    def _add_others(
        self,
        tokens_GS: Sequence[Sequence[int]],
        chances_GS: Sequence[Sequence[float]],
        drafts: list[int],
        kinds: list[int],
        parents: list[int],
        num_free: int,
    ) -> None:
        """Adds the other guesses that are worth verifying, as leaves beside the chain.

        Rows are read as wide as the widest: in the others so many drafts cost nothing more.
        """
        reach, chain = 1.0, list(kinds)
        for place, (tokens, chances) in enumerate(zip(tokens_GS, chances_GS, strict=False)):
            for token, chance in zip(tokens[1:], chances[1:], strict=True):
                kind = other_kind(chance)
                is_free = len(drafts) < num_free
                mean = reach * self.length.chance(kind) / len(self.cached.lengths)
                if len(drafts) < MAX_TREE and (is_free or self.length.verifies(mean, len(drafts))):
                    drafts.append(token)
                    kinds.append(kind)
                    parents.append(place - 1)
            if place >= len(chain):
                return
            reach *= self.length.chance(chain[place])

    def reject_after(self, row: int, num_drafts: int) -> None:
        """Forgets all but a row's first `num_drafts` drafts: another guess was accepted in the place of the next."""
        lengths = list(self.cached.lengths)
        lengths[row] = min(lengths[row], self._starts[row] + num_drafts)
        self.cached.keep(lengths)

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""
        self.cached.keep(lengths)
        pairs = zip(self._unknown_at, lengths, strict=True)
        self._unknown_at = [None if at is None or at >= length else at for at, length in pairs]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows."""
        self.cached.select(rows)
        self._unknown_at = [self._unknown_at[row] for row in rows]


def _firsts(values_BGS: Sequence[Sequence[Sequence[Value]]], nums: Sequence[int]) -> list[list[Value]]:
    """The first guess for each of a row's first `nums[row]` tokens."""
    return [[first for first, *_ in row[:num]] for row, num in zip(values_BGS, nums, strict=True)]


def _num_sound(chances_GS: Sequence[Sequence[float]]) -> int:
    """How many guesses come before the first whose scores make no distribution."""
    return next((index for index, (first, *_) in enumerate(chances_GS) if math.isnan(first)), len(chances_GS))


def _align_right(probs_BGV: Tensor, drafts: Sequence[list[int]]) -> Tensor:
    most = max(map(len, drafts))
    pairs = zip(probs_BGV, drafts, strict=True)
    return torch.stack(
        [torch.nn.functional.pad(probs[: len(tokens)], (0, 0, most - len(tokens), 0)) for probs, tokens in pairs]
    )
