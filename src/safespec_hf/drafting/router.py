"""Chooses, for each round and row, whose drafts the target gets: a model's, a draft head's or a lookup's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..answer.rows import Row
from ..engine.cache import CachedModel
from ..heads.draft_head import DraftHead
from .draft_length import DraftCosts, DraftLength, Pace
from .drafters import Drafter, Found, Proposal, fill_gaps
from .foreign import ForeignDrafter, SharedTokensDrafter
from .head import HeadDrafter
from .lookup import LookupDrafter
from .model import IsWhole, ModelDrafter
from .states import StatesDrafter
from .translation import TokenizerPair

NUM_OTHERS = 3
"""Guesses for a token that may be verified beside the draft's first one."""


MakeDrafter = Callable[[int, DraftLength], StatesDrafter]


class DraftRouter:
    """The drafters of a batch. Their states are kept across rounds, and rolled back with the target's.

    Args:
        assistant_model ([`~transformers.PreTrainedModel`] or [`DraftHead`], *optional*): The draft model.
        num_rows (`int`, defaults to 1): Rows of the batch.
        vocab_size (`int`, *optional*): The target's; drafts are limited to it. Default: the draft model's.
        max_matching_ngram_size (`int`, *optional*): Turns on prompt lookup, with n-grams of at most this size.
        do_sample (`bool`, defaults to `False`): Sample drafts from the processed distribution instead of its argmax.
        costs ([`DraftCosts`], *optional*): Turns on draft lengths that adapt to how often drafts are accepted.
        is_adaptive (`bool`, defaults to `True`): `False` leaves it to the caller of `write` to go by the costs.
        takes_trees (`bool`, defaults to `False`): Whether other guesses for a token may be drafted beside it.
        tokenizers ([`TokenizerPair`], *optional*): The target's and the draft's, if they are not the same.
        make_drafter (`Callable`, *optional*): Makes what drafts instead, for so many rows.
    """

    def __init__(
        self,
        assistant_model: PreTrainedModel | None = None,
        *,
        num_rows: int = 1,
        vocab_size: int | None = None,
        max_matching_ngram_size: int | None = None,
        do_sample: bool = False,
        costs: DraftCosts | None = None,
        is_adaptive: bool = True,
        takes_trees: bool = False,
        tokenizers: TokenizerPair | None = None,
        make_drafter: MakeDrafter | None = None,
    ):
        self.vocab_size = vocab_size
        self.num_plain_rounds = 0
        self.costs, is_adaptive = costs or DraftCosts(), is_adaptive and costs is not None
        self._pace = Pace(self.costs)
        length = DraftLength(self._pace, is_adaptive)
        num_others = NUM_OTHERS if takes_trees and is_adaptive else 0
        self.model: ModelDrafter | StatesDrafter | None = None
        if make_drafter is not None:
            self.model = make_drafter(num_rows, length)
        elif isinstance(assistant_model, DraftHead):
            # its likeliest guesses, several for a token, are what the target draws more often than one that it draws
            do_sample = do_sample and num_others == 0
            self.model = HeadDrafter(assistant_model, num_rows, length, vocab_size, do_sample, num_others)
        elif assistant_model is not None and tokenizers is not None:
            if do_sample and vocab_size is not None and tokenizers.shared.target:
                self.model = SharedTokensDrafter(assistant_model, num_rows, length, tokenizers, vocab_size)
            else:
                self.model = ForeignDrafter(assistant_model, num_rows, length, tokenizers)
        elif assistant_model is not None:
            # drafts that were sampled are accepted one after the other
            num_others = 0 if do_sample else num_others
            self.model = ModelDrafter(assistant_model, num_rows, length, vocab_size, do_sample, num_others)
        self.lookup: LookupDrafter | None = None
        if max_matching_ngram_size:
            lookup_length = DraftLength(self._pace, is_adaptive, is_free=True)
            self.lookup = LookupDrafter(max_matching_ngram_size, num_rows, lookup_length)
        self._drafters: list[Drafter] = [drafter for drafter in (self.model, self.lookup) if drafter is not None]
        self._last: Proposal = Proposal([])
        self.is_heuristic = False
        self._num_more = 0  # drafts that a round may have beside those of the first
        self._num_steps = 0  # forwards of the draft model for it

    def attach(self, target: CachedModel) -> None:
        """Takes note of the target with its cache, before it has read anything: some read what it keeps."""
        if isinstance(self.model, StatesDrafter):
            self.model.attach(target)

    @property
    def layers(self) -> list[int]:
        """The target's hidden states that the drafts are made from, for `observe`."""
        return [] if self.model is None else self.model.layers

    @property
    def models(self) -> list[PreTrainedModel]:
        """The draft model or head, to be run in [`evaluating`]: dropout would belie the distributions."""
        return [] if self.model is None else [self.model.network]

    @property
    def num_forwards(self) -> int:
        """Forwards of the draft model or head."""
        return 0 if self.model is None else self.model.num_forwards

    def sampler(self, index: int, row: Row, num_tokens: int) -> CachedModel | None:
        """A draft model that can write so many tokens after the context of a row by itself, if there is one.

        Args:
            index (`int`): Which row of the batch it is now.
            row ([`Row`]): The row.
            num_tokens (`int`): At most so many, >= 1.
        """
        return None if self.model is None else self.model.sampler(index, row, num_tokens)

    def write(self, rows: Sequence[Row], num_tokens: Sequence[int], is_whole: IsWhole) -> list[list[int]]:
        """What the draft model goes on with, at most `num_tokens[row]` tokens; see [`ModelDrafter`]."""
        assert isinstance(self.model, ModelDrafter)
        return self.model.write(rows, num_tokens, is_whole)

    def fork(self, index: int, row: Row, num_tokens: int, layers: Sequence[int]) -> CachedModel | None:
        """A copy of the draft model at a row's context, to read so many tokens after it; see [`ModelDrafter`]."""
        assert isinstance(self.model, ModelDrafter)
        return self.model.fork(index, row, num_tokens, layers)

    def most(self, num_tokens: int) -> int:
        """How many drafts the next round may have, where the first one might have `num_tokens`.

        By the heuristic of transformers there are two more after a round whose drafts were all accepted, and one less
        after others.
        """
        self._num_more = max(self._num_more, 1 - num_tokens)
        return num_tokens + self._num_more

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row, from whatever promises more: the lookup or the model."""
        nothing: Proposal = Proposal([[] for _ in rows])
        self._pace.costs, num_forwards = self.costs.of_rows(len(rows)), self.num_forwards
        found = nothing if self.lookup is None else self.lookup.draft(rows, num_tokens)
        uses_model = self.model is not None and max(num_tokens) > 0 and self._prefers_model(found, max(num_tokens))
        made = nothing
        if uses_model and self.model is not None:
            shown = None if self.lookup is None else Found(found, self.lookup.length)
            made = self.model.draft(rows, num_tokens, shown)
        proposal = fill_gaps(made, found)
        self._last, self._num_steps = proposal, self.num_forwards - num_forwards
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
        if self.is_heuristic and any(self._last.drafts):
            pairs = zip(self._last.drafts, paths, strict=False)
            self._num_more += 2 if all(len(path) == len(drafts) for drafts, path in pairs) else -1
        costs = self._pace.costs
        widest = max(map(len, self._last.drafts), default=0)
        num_tokens = 1 + sum(map(len, paths)) / max(len(paths), 1)
        self._pace.record(num_tokens, costs.block(1 + widest) + self._num_steps * costs.draft)
        for kinds, parents, path in zip(self._last.kinds or [], self._last.trees(), paths, strict=False):
            for drafter in self._drafters:
                drafter.length.record(kinds, path, parents)
        for row, path in enumerate(paths):
            num_first = sum(draft == index for index, draft in enumerate(path))
            if self.model is not None and num_first < len(path):
                self.model.reject_after(row, num_first)

    def observe(self, row: int, start: int, states_TF: Tensor) -> None:
        """Takes the target's states of `layers` of a row's context, from position `start` on."""
        if self.model is not None:
            self.model.observe(row, start, states_TF)

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""
        for drafter in self._drafters:
            drafter.keep(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows of the batch."""
        for drafter in self._drafters:
            drafter.select(rows)
