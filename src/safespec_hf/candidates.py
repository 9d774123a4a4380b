"""Proposes tokens: drafts of one continuation in General Mode, K sampled segments in Safety Mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from .cache import CachedModel
from .config import SafeSpecConfig
from .logits import process_rows
from .rows import Row


class Proposal(NamedTuple):
    """What is proposed to the target in one round.

    Attributes:
        drafts (`list[list[int]]`): Draft tokens of each row; rows may differ in length.
        probs_BGV (`torch.FloatTensor` of shape `(B, G, V)`, *optional*):
            The distributions they were sampled from, when they were sampled.
    """

    drafts: list[list[int]]
    probs_BGV: Tensor | None = None


class SafeSpecCandidateGenerator(CandidateGenerator):
    """Drafts with a smaller model of the same tokenizer, with prompt lookup, or not at all.

    The draft model's cache is kept across rounds and rolled back with the target's. Also usable wherever transformers
    takes a `CandidateGenerator`, through `get_candidates`.

    Args:
        assistant_model ([`~transformers.PreTrainedModel`], *optional*): The draft model.
        num_rows (`int`, defaults to 1): Rows of the batch.
        num_draft_tokens (`int`, defaults to 5): Drafts per round, >= 0.
        vocab_size (`int`, *optional*): The target's; drafts are limited to it. Default: the draft model's.
        max_matching_ngram_size (`int`, *optional*): Turns on prompt lookup, with n-grams of at most this size.
        logits_processor ([`~transformers.LogitsProcessorList`], *optional*): For `get_candidates` only.
        do_sample (`bool`, defaults to `False`): Sample drafts from the processed distribution instead of its argmax.

    Example:

        >>> import torch
        >>> from safespec_hf import SafeSpecCandidateGenerator
        >>> lookup = SafeSpecCandidateGenerator(max_matching_ngram_size=2, num_draft_tokens=2)
        >>> lookup.get_candidates(torch.tensor([[7, 8, 9, 4, 7, 8]]))[0]
        tensor([[7, 8, 9, 4, 7, 8, 9, 4]])
    """

    def __init__(
        self,
        assistant_model: PreTrainedModel | None = None,
        *,
        num_rows: int = 1,
        num_draft_tokens: int = 5,
        vocab_size: int | None = None,
        max_matching_ngram_size: int | None = None,
        logits_processor: LogitsProcessorList | None = None,
        do_sample: bool = False,
    ):
        self.assistant = None if assistant_model is None else CachedModel(assistant_model, num_rows)
        self.num_draft_tokens = num_draft_tokens
        self.vocab_size = vocab_size
        self.logits_processor = logits_processor
        self.do_sample = do_sample
        self._ngrams = (
            [NgramIndex(max_matching_ngram_size) for _ in range(num_rows)] if max_matching_ngram_size else []
        )
        self._rows: list[Row] = []

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row."""
        if self.assistant is not None and max(num_tokens) > 0:
            return self._draft_with_model(rows, num_tokens)
        if self._ngrams:
            pairs = zip(rows, self._ngrams, num_tokens, strict=True)
            return Proposal([ngrams.continuation(row.prompt, row.tokens, num) for row, ngrams, num in pairs])
        return Proposal([[] for _ in rows])

    def _draft_with_model(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        assert self.assistant is not None
        blocks: Sequence[Sequence[int]] | Tensor
        blocks = [row.context(length) for row, length in zip(rows, self.assistant.lengths, strict=True)]
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        has_processors = bool(rows[0].processors)
        for _ in range(max(num_tokens)):
            logits_BV = fit_vocabulary(self.assistant.forward(blocks, 1).logits_BTV[:, -1], self.vocab_size)
            # reading the drafts so far makes the host wait, so only where a processor needs them
            extras = torch.stack(tokens, 1).tolist() if tokens and has_processors else [[] for _ in rows]
            token_B, probs_BV = self._pick(process_rows(rows, extras, logits_BV))
            tokens.append(token_B)
            probs.append(probs_BV)
            blocks = token_B[:, None]
        drafts = [row[:num] for row, num in zip(torch.stack(tokens, 1).tolist(), num_tokens, strict=True)]
        return Proposal(drafts, self._align_right(torch.stack(probs, 1), drafts) if self.do_sample else None)

    def _pick(self, scores_BV: Tensor) -> tuple[Tensor, Tensor]:
        if not self.do_sample:
            return scores_BV.argmax(dim=-1), scores_BV
        probs_BV = scores_BV.softmax(dim=-1)
        return torch.multinomial(probs_BV, 1)[:, 0], probs_BV

    @staticmethod
    def _align_right(probs_BGV: Tensor, drafts: list[list[int]]) -> Tensor:
        most = max(len(tokens) for tokens in drafts)
        return torch.stack(
            [
                torch.nn.functional.pad(probs[: len(tokens)], (0, 0, most - len(tokens), 0))
                for probs, tokens in zip(probs_BGV, drafts, strict=True)
            ]
        )

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""
        if self.assistant is not None:
            self.assistant.keep(lengths)
        for ngrams, length in zip(self._ngrams, lengths, strict=False):
            ngrams.keep(length)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows of the batch."""
        if self.assistant is not None:
            self.assistant.select(rows)
        self._ngrams = [self._ngrams[row] for row in rows] if self._ngrams else []

    def get_candidates(self, input_ids: LongTensor, **kwargs: object) -> tuple[LongTensor, Any]:
        """transformers' `CandidateGenerator` contract.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Everything generated so far.

        Returns:
            `tuple`: Token ids of shape `(batch_size, sequence_length + num_drafts)`, and the log-probabilities
            that the drafts came from, of shape `(batch_size, num_drafts, vocab_size)`, or `None` if they were not.
        """
        rows = [self._as_row(index, ids) for index, ids in enumerate(input_ids)]
        if self._rows:
            pairs = zip(self._rows, rows, strict=True)
            self.keep([min(_common_prefix(old.prompt, new.prompt), len(new.prompt) - 1) for old, new in pairs])
        proposal = self.draft(rows, [self.num_draft_tokens] * len(rows))
        drafts = input_ids.new_tensor([tokens[: min(map(len, proposal.drafts))] for tokens in proposal.drafts]).long()
        candidates = cast("LongTensor", torch.cat([input_ids, drafts], dim=1))
        self._rows = [self._as_row(index, ids) for index, ids in enumerate(candidates)]
        return candidates, None if proposal.probs_BGV is None else proposal.probs_BGV.log()

    def _as_row(self, index: int, ids: Tensor) -> Row:
        is_real = torch.ones_like(ids, dtype=torch.bool)
        return Row(index, ids, is_real, max_new_tokens=0, policy=SafeSpecConfig(), processors=self.logits_processor)

    def update_candidate_strategy(self, input_ids: LongTensor, scores: Tensor, num_matches: int) -> None:
        """transformers' `CandidateGenerator` contract. The number of drafts is constant: nothing to adapt."""


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


class NgramIndex:
    """Where each n-gram of a growing context occurred, so that a lookup does not read the context again."""

    def __init__(self, max_size: int):
        self.max_size = max_size
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._ngrams_at: list[list[tuple[int, ...]]] = [[]]  # by where they end, to take them back

    def keep(self, length: int) -> None:
        """Forgets what reaches beyond the first `length` context tokens."""
        while len(self._ngrams_at) > length + 1:
            for ngram in self._ngrams_at.pop():
                self._ends[ngram].pop()

    def continuation(self, prompt: Sequence[int], tokens: Sequence[int], num_tokens: int) -> list[int]:
        """What followed the last earlier occurrence of the longest n-gram that the context ends with."""
        total, split = len(prompt) + len(tokens), len(prompt)

        def part(start: int, end: int) -> list[int]:
            return [*prompt[start : min(end, split)], *tokens[max(start - split, 0) : max(end - split, 0)]]

        # an n-gram that ends with the context has no continuation yet, so the last token is not indexed
        for end in range(len(self._ngrams_at), total):
            self._ngrams_at.append([tuple(part(end - size, end)) for size in range(1, min(self.max_size, end) + 1)])
            for ngram in self._ngrams_at[-1]:
                self._ends.setdefault(ngram, []).append(end)
        for size in range(min(self.max_size, total - 1), 0, -1):
            if ends := self._ends.get(tuple(part(total - size, total))):
                return part(ends[-1], ends[-1] + num_tokens)
        return []


def sample_segments(
    sampler: CachedModel,
    row: Row,
    *,
    max_tokens: int,
    end_ids: frozenset[int],
    steer: LogitsProcessor,
    generator: torch.Generator,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Samples one segment for every row of `sampler`, all of which continue the same context.

    Args:
        sampler ([`CachedModel`]): K copies of the row's cache, in the draft or in the target.
        row ([`Row`]): The row.
        max_tokens (`int`): Longest segment, >= 1.
        end_ids (`frozenset[int]`): Tokens that end an answer.
        steer ([`~transformers.LogitsProcessor`]): Of Safety Mode, after the row's own.
        generator (`torch.Generator`): Of the row's device.
        vocab_size (`int`, *optional*): The target's, where the sampler's may be padded differently.

    Returns:
        `list[list[int]]`: K segments, none of them empty.
    """
    num = len(sampler.lengths)
    blocks: Sequence[Sequence[int]] | Tensor = [row.context(length) for length in sampler.lengths]
    policy = row.policy
    ids_KL = row.visible_ids().expand(num, -1)
    segments: list[list[int]] = [[] for _ in range(num)]
    is_open = [True] * num
    for step in range(max_tokens):
        logits_KV = fit_vocabulary(sampler.forward(blocks, 1).logits_BTV[:, -1], vocab_size)
        logits_KV = logits_KV.to(row.device, torch.float32)
        scores_KV = steer(ids_KL, row.process(ids_KL, logits_KV)) / policy.recovery_temperature
        token_K1 = torch.multinomial(scores_KV.softmax(dim=-1), 1, generator=generator)
        for k, token in enumerate(token_K1[:, 0].tolist()):
            if is_open[k]:
                segments[k].append(token)
                ends_line = token in row.newline_ids and step + 1 >= policy.min_segment_tokens
                is_open[k] = not ends_line and token not in end_ids
        if not any(is_open):
            break
        ids_KL, blocks = torch.cat([ids_KL, token_K1], dim=1), token_K1
    return segments


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
