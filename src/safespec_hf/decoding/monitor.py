"""Reads the risk of rows with the safety head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..answer.pooling import pool_block, pool_next
from ..answer.rows import Row
from ..answer.segments import Place
from ..engine.token_tree import chain_parents, path_to
from ..heads.safety_head import SafetyHead


class RiskMonitor:
    """Turns hidden states of the target into risks of the tokens of rows.

    Args:
        head ([`SafetyHead`]): The head.

    Attributes:
        layers (`list[int]`): The hidden states that it reads.
        num_tapped (`int`): Numbers of them at a token; several ways of pooling make more features of these.
    """

    def __init__(self, head: SafetyHead):
        self.head = head
        self.layers = list(head.config.hidden_layers or [])
        self.num_tapped = head.config.hidden_size * len(self.layers)

    def pool(self, row: Row, new: Sequence[int], hidden_TF: Tensor, parents: Sequence[int] | None = None) -> Tensor:
        """Pooled states of the tokens of a row that wait for a risk, and of new ones after them.

        Args:
            row ([`Row`]): The row.
            new (`Sequence[int]`): Tokens that are not part of it yet.
            hidden_TF (`torch.Tensor` of shape `(T, F)`): Hidden states that end with theirs.
            parents (`Sequence[int]`, *optional*): Of a tree of new tokens. Default: each follows the one before.
        """
        config, num_waiting = self.head.config, row.num_unscored()
        paths = [path_to(index, chain_parents(len(new)) if parents is None else parents) for index in range(len(new))]
        if config.span == "answer":
            first = row.pooled.num_tokens
            counts = [*range(first, first + num_waiting), *(first + num_waiting + len(path) - 1 for path in paths)]
        elif parents is None:
            counts = row.segments.counts[row.num_settled :] + row.segments.counts_ahead(new)
        else:
            ends = [row.segments.counts_ahead([new[index] for index in path])[-1] for path in paths]
            counts = row.segments.counts[row.num_settled :] + ends
        previous = chain_parents(num_waiting) + [num_waiting + ([-1, *path])[-2] for path in paths]
        hidden_TF = hidden_TF[hidden_TF.shape[0] - len(counts) :]
        return pool_block(row.pooled.last(), hidden_TF, counts, config.pooling, config.ewma_decay, previous)

    def count_next(self, row: Row, num_before: int, token: int, after: Place | None) -> tuple[int, Place | None]:
        """How many tokens of its span come before a token, and where it leaves off, for the one after it.

        Args:
            row ([`Row`]): The row.
            num_before (`int`): Tokens between those of the row and this one.
            token (`int`): The token.
            after ([`Place`], *optional*): Where the last one of those left off; `None` where there is none.
        """
        if self.head.config.span == "answer":
            return row.pooled.num_tokens + row.num_unscored() + num_before, None
        return row.segments.step(token, after)

    def pool_next(self, before_KF: Tensor | None, hidden_KF: Tensor, counts: Sequence[int]) -> Tensor:
        """Pooled states after one more token of each of K texts, given those before them."""
        return pool_next(before_KF, hidden_KF, counts, self.head.config.pooling, self.head.config.ewma_decay)

    def risks(self, pooled: Sequence[Tensor]) -> Tensor:
        """Risks of several rows' pooled states in one pass of the head, one after the other."""
        return self.head.risk(torch.cat(list(pooled)))
