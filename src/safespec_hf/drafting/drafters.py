"""What every drafter does, and what it gives: proposals, a row each.

Shapes: B rows, G drafts at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..answer.rows import Row
from ..engine.token_tree import chain_parents
from .draft_length import DraftLength


class Proposal(NamedTuple):
    """What is proposed to the target in one round.

    Attributes:
        drafts (`list[list[int]]`): Draft tokens of each row; rows may differ in length.
        probs_BGV (`torch.FloatTensor` of shape `(B, G, V)`, *optional*):
            The distributions they were sampled from, when they were sampled; right-aligned.
        kinds (`list[list[int]]`, *optional*): The evidence for each draft, see [`DraftLength`].
        parents (`list[list[int]]`, *optional*): Of each draft, where rows are trees; see `token_tree`.
    """

    drafts: list[list[int]]
    probs_BGV: Tensor | None = None
    kinds: list[list[int]] | None = None
    parents: list[list[int]] | None = None

    def trees(self) -> list[list[int]]:
        """The parents of each row's drafts, chains included."""
        return self.parents or [chain_parents(len(drafts)) for drafts in self.drafts]


def worthwhile(length: DraftLength, drafts: Sequence[list[int]], kinds: Sequence[list[int]]) -> Proposal:
    """Of chains of drafts, with the evidence for each, those that are worth verifying.

    Args:
        length ([`DraftLength`]): Decides how many.
        drafts, kinds (`Sequence[list[int]]`): Of each row, equally long.
    """
    num = length.num_worthwhile(*kinds)
    return Proposal([tokens[:num] for tokens in drafts], kinds=[row[:num] for row in kinds])


class Found(NamedTuple):
    """What a lookup drafted, and what knows the chances of that."""

    proposal: Proposal
    length: DraftLength


class Drafter(Protocol):
    """A way of drafting for a batch of rows. `length` learns how much of it pays."""

    length: DraftLength

    def draft(self, rows: Sequence[Row], num_tokens: Sequence[int]) -> Proposal:
        """At most `num_tokens[row]` drafts for each row."""

    def keep(self, lengths: Sequence[int]) -> None:
        """Rolls back to the first `lengths[row]` context tokens of each row."""

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows."""


def fill_gaps(made: Proposal, found: Proposal) -> Proposal:
    """For each row what a model made, or else what a lookup found.

    Example:

        >>> fill_gaps(Proposal([[7], []]), Proposal([[8], [9]])).drafts
        [[7], [9]]
    """
    from_model = [bool(drafts) for drafts in made.drafts]
    if not any(from_model) or not any(found.drafts):
        return made if any(from_model) else found
    drafts = _choose(from_model, made.drafts, found.drafts)
    nothing: list[list[int]] = [[] for _ in drafts]
    kinds = _choose(from_model, made.kinds or nothing, found.kinds or nothing)
    parents, probs_BGV = None, None
    if made.parents is not None:
        parents = _choose(from_model, made.parents, [chain_parents(len(tokens)) for tokens in drafts])
    if made.probs_BGV is not None:
        most = max(map(len, drafts))
        probs_BGV = pad(made.probs_BGV, (0, 0, most - made.probs_BGV.shape[1], 0))
        for row, tokens in enumerate(drafts):
            if not from_model[row] and tokens:
                # a token that was looked up is certain
                probs_BGV[row, most - len(tokens) + torch.arange(len(tokens)), torch.tensor(tokens)] = 1.0
    return Proposal(drafts, probs_BGV, kinds, parents)


def _choose(from_model: list[bool], made: list[list[int]], found: list[list[int]]) -> list[list[int]]:
    return [one if is_made else other for is_made, one, other in zip(from_model, made, found, strict=True)]


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many of the same tokens two texts begin.

    Example:

        >>> num_common([7, 8, 9], [7, 8, 4, 9])
        2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def fit_vocabulary(logits_BV: Tensor, size: int | None, fill: float = -torch.inf) -> Tensor:
    """Cuts or fills a draft's logits to the target's vocabulary, where the two differ by padding rows.

    Example:

        >>> import torch
        >>> fit_vocabulary(torch.zeros(1, 2), 3)
        tensor([[0., 0., -inf]])
    """
    if size is None or logits_BV.shape[1] == size:
        return logits_BV
    return pad(logits_BV[:, :size], (0, max(size - logits_BV.shape[1], 0)), value=fill)
