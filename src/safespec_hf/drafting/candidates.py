"""Proposes tokens: drafts of one continuation in General Mode, K sampled segments in Safety Mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from ..answer.logits import penalize
from ..answer.rows import Row
from ..config import SafeSpecConfig
from ..engine.cache import BlockOutput, CachedModel
from ..engine.token_tree import chain_parents
from ..heads.draft_head import DraftHead
from .draft_length import DraftCosts, DraftLength
from .drafters import HeadDrafter, LookupDrafter, ModelDrafter, Proposal, fit_vocabulary, known_ids

Judge = Callable[[Sequence[Sequence[int]], Sequence[bool], BlockOutput], list[bool]]
NUM_OTHERS = 3
"""Guesses for a token that may be verified beside the draft's first one."""


class SafeSpecCandidateGenerator(CandidateGenerator):
    """Drafts with a smaller model of the same tokenizer, with a draft head, with prompt lookup, or not at all.

    The draft model's cache is kept across rounds and rolled back with the target's. Also usable wherever transformers
    takes a `CandidateGenerator`, through `get_candidates`.

    Args:
        assistant_model ([`~transformers.PreTrainedModel`] or [`DraftHead`], *optional*): The draft model.
        num_rows (`int`, defaults to 1): Rows of the batch.
        num_draft_tokens (`int`, defaults to 5): Drafts per round, >= 0.
        vocab_size (`int`, *optional*): The target's; drafts are limited to it. Default: the draft model's.
        max_matching_ngram_size (`int`, *optional*): Turns on prompt lookup, with n-grams of at most this size.
        logits_processor ([`~transformers.LogitsProcessorList`], *optional*): For `get_candidates` only.
        do_sample (`bool`, defaults to `False`): Sample drafts from the processed distribution instead of its argmax.
        costs ([`DraftCosts`], *optional*): Turns on draft lengths that adapt to how often drafts are accepted.
        takes_trees (`bool`, defaults to `False`): Whether other guesses for a token may be drafted beside it.

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
        costs: DraftCosts | None = None,
        takes_trees: bool = False,
    ):
        self.num_draft_tokens = num_draft_tokens
        self.vocab_size = vocab_size
        self.logits_processor = logits_processor
        self.do_sample = do_sample
        self.num_plain_rounds = 0
        costs, is_adaptive = costs or DraftCosts(), costs is not None
        length = DraftLength(costs, is_adaptive)
        self.model: ModelDrafter | None = None
        if assistant_model is not None:
            drafter = HeadDrafter if isinstance(assistant_model, DraftHead) else ModelDrafter
            # to be lossless, sampling takes its drafts one after the other
            num_others = NUM_OTHERS if takes_trees and is_adaptive and not do_sample else 0
            how = (num_rows, length, vocab_size, do_sample, num_others)
            self.model = drafter(assistant_model, *how)  # type: ignore[arg-type]
        self.lookup: LookupDrafter | None = None
        if max_matching_ngram_size:
            lookup_length = DraftLength(DraftCosts(verify=costs.verify), is_adaptive)
            self.lookup = LookupDrafter(max_matching_ngram_size, num_rows, lookup_length)
        self._drafters = [drafter for drafter in (self.model, self.lookup) if drafter is not None]
        self._from_model: list[bool] = []
        self._last: Proposal = Proposal([])
        self._rows: list[Row] = []

    @property
    def layers(self) -> list[int]:
        """The target's hidden states that the drafts are made from, for `observe`."""
        return list(self.model.head.config.hidden_layers or []) if isinstance(self.model, HeadDrafter) else []

    @property
    def sampler(self) -> CachedModel | None:
        """A draft model that can sample whole segments by itself, if there is one."""
        return None if self.model is None or isinstance(self.model, HeadDrafter) else self.model.cached

    @property
    def num_forwards(self) -> int:
        """Forwards of the draft model or head."""
        return 0 if self.model is None else self.model.cached.usage.num_forwards

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row, from whatever promises more: the lookup or the model."""
        nothing: Proposal = Proposal([[] for _ in rows])
        found = nothing if self.lookup is None else self.lookup.draft(rows, num_tokens)
        uses_model = self.model is not None and max(num_tokens) > 0 and self._prefers_model(found, max(num_tokens))
        made = self.model.draft(rows, num_tokens) if uses_model and self.model is not None else nothing
        proposal, self._from_model = _merge(found, made)
        self._last = proposal
        self.num_plain_rounds += bool(self._drafters) and not any(proposal.drafts)
        return proposal

    def _prefers_model(self, found: Proposal, most: int) -> bool:
        assert self.model is not None
        if any(found.drafts) and self.lookup is not None:
            gains = [self.lookup.length.gain(kinds) for kinds in found.kinds or []]
            if min(gains) >= self.model.length.gain(most=most):
                return False
        return self.model.length.starts()

    def record(self, paths: Sequence[Sequence[int]]) -> None:
        """Learns which of each row's drafts the target accepted."""
        no_trees: list[Sequence[int] | None] = [None for _ in paths]
        rows = zip(self._from_model, self._last.kinds or [], self._last.parents or no_trees, paths, strict=False)
        for from_model, kinds, parents, path in rows:
            drafter = self.model if from_model else self.lookup
            if drafter is not None and kinds:
                drafter.length.record(kinds, path, parents)
        for row, path in enumerate(paths):
            num_first = sum(draft == index for index, draft in enumerate(path))
            if self.model is not None and num_first < len(path):
                self.model.reject_after(row, num_first)

    def observe(self, row: int, start: int, states_TF: Tensor) -> None:
        """Takes the target's states of `layers` of a row's context, from position `start` on."""
        if isinstance(self.model, HeadDrafter):
            self.model.observe(row, start, states_TF)

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""
        for drafter in self._drafters:
            drafter.keep(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows of the batch."""
        for drafter in self._drafters:
            drafter.select(rows)

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
        """transformers' `CandidateGenerator` contract. Learns from what was accepted."""
        self.record([range(num_matches)])


def sample_segments(
    sampler: CachedModel,
    row: Row,
    *,
    num_segments: int,
    max_tokens: int,
    end_ids: frozenset[int],
    steer: LogitsProcessor,
    generator: torch.Generator,
    vocab_size: int | None = None,
    judge: Judge | None = None,
) -> tuple[list[list[int]], CachedModel]:
    """Samples segments that all continue the same context, which is read once.

    Args:
        sampler ([`CachedModel`]): A copy of the row's cache, in the draft or in the target.
        row ([`Row`]): The row.
        num_segments (`int`): K.
        max_tokens (`int`): Longest segment, >= 1.
        end_ids (`frozenset[int]`): Tokens that end an answer.
        steer ([`~transformers.LogitsProcessor`]): Of Safety Mode, after the row's own.
        generator (`torch.Generator`): Of the row's device.
        vocab_size (`int`, *optional*): The target's, where the sampler's may be padded differently.
        judge (`Callable`, *optional*):
            Called after every forward with the segments, which of them are open, and the forward's output; says
            which stay open. With a judge the last tokens are read as well.

    Returns:
        `tuple`: K segments, none of them empty, and the cache that they were sampled with, a row for each.
    """
    policy = row.policy
    ids_KL = row.visible_ids().expand(num_segments, -1)
    segments: list[list[int]] = [[] for _ in range(num_segments)]
    is_open = [True] * num_segments
    output = _repeat(sampler.forward([known_ids(sampler.model, row.context(sampler.lengths[0]))], 1), num_segments)
    sampler = sampler.fork(0, num_segments)
    for step in range(max_tokens if judge is None else max_tokens + 1):
        if step > 0:
            output = sampler.forward(ids_KL[:, -1:], 1)
        if judge is not None:
            is_open = judge(segments, is_open, output)
            if step == max_tokens or not any(is_open):
                break
        logits_KV = fit_vocabulary(output.logits_BTV[:, -1], vocab_size)
        logits_KV = logits_KV.to(row.device, torch.float32)
        scores_KV = steer(ids_KL, row.process(ids_KL, logits_KV)) / policy.recovery_temperature
        may_end = step + 1 >= policy.min_segment_tokens
        if end_ids and not may_end:
            # the fewer tokens, the lower the risk of the worst: an answer broken off at once would always be chosen
            scores_KV = penalize(scores_KV, sorted(end_ids))
        token_K1 = draw(scores_KV.softmax(dim=-1), generator)
        for k, token in enumerate(token_K1[:, 0].tolist()):
            if is_open[k]:
                segments[k].append(token)
                ends_line = token in row.newline_ids and may_end
                is_open[k] = not ends_line and token not in end_ids
        if judge is None and not any(is_open):
            break
        ids_KL = torch.cat([ids_KL, token_K1], dim=1)
    return segments, sampler


def _repeat(output: BlockOutput, num: int) -> BlockOutput:
    """One row's output as that of many."""
    logits_BTV, hidden_BTF = (None if part is None else part.expand(num, -1, -1) for part in output)
    assert logits_BTV is not None
    return BlockOutput(logits_BTV, hidden_BTF)


def draw(probs_KV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token per row: where a random share of all probability is reached.

    `torch.multinomial` draws a number for each token of the vocabulary, which takes a fifth of a forward on a CPU.

    Args:
        probs_KV (`torch.FloatTensor` of shape `(K, V)`): Probabilities; they need not sum to 1.
        generator (`torch.Generator`, *optional*): Of their device.

    Returns:
        `torch.LongTensor` of shape `(K, 1)`: The tokens; never one of probability 0.

    Example:

        >>> import torch
        >>> draw(torch.tensor([[0.0, 1.0, 0.0]])).tolist()
        [[1]]
    """
    reached_KV = probs_KV.double().cumsum(dim=-1)  # in float32 rounding would move small probabilities
    share_K1 = torch.rand(len(probs_KV), 1, dtype=torch.double, device=probs_KV.device, generator=generator)
    # `right`: a share that is reached exactly belongs to the next token that has any probability
    token_K1 = torch.searchsorted(reached_KV, share_K1 * reached_KV[:, -1:], right=True)
    return torch.minimum(token_K1, torch.searchsorted(reached_KV, reached_KV[:, -1:].contiguous()))


def _merge(found: Proposal, made: Proposal) -> tuple[Proposal, list[bool]]:
    """For each row what the model drafted, or else what the lookup found; and which of them it was."""
    from_model = [bool(drafts) for drafts in made.drafts]
    if not any(from_model) or not any(found.drafts):
        return (made if any(from_model) else found), from_model
    chosen = [model if model else lookup for model, lookup in zip(made.drafts, found.drafts, strict=True)]
    no_kinds: list[list[int]] = [[] for _ in chosen]
    triples = zip(from_model, made.kinds or no_kinds, found.kinds or no_kinds, strict=True)
    kinds = [model if is_model else lookup for is_model, model, lookup in triples]
    probs_BGV = None
    if made.probs_BGV is not None:
        most = max(len(tokens) for tokens in chosen)
        probs_BGV = torch.nn.functional.pad(made.probs_BGV, (0, 0, most - made.probs_BGV.shape[1], 0))
        for row, (is_model, tokens) in enumerate(zip(from_model, chosen, strict=True)):
            if not is_model and tokens:
                # a token that was looked up is certain
                probs_BGV[row, most - len(tokens) + torch.arange(len(tokens)), torch.tensor(tokens)] = 1.0
    if made.parents is not None:
        pairs = zip(from_model, made.parents, chosen, strict=True)
        parents = [tree if is_model else chain_parents(len(tokens)) for is_model, tree, tokens in pairs]
        return Proposal(chosen, probs_BGV, kinds, parents), from_model
    return Proposal(chosen, probs_BGV, kinds), from_model


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
