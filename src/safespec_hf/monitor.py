"""Reads the risk of rows with the safety head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .head import SafetyHead
from .rows import Row
from .scoring import pool, pooling_weights


class RiskMonitor:
    """Turns hidden states of the target into risks of the tokens of rows.

    Args:
        head ([`SafetyHead`]): The head.
    """

    def __init__(self, head: SafetyHead):
        self.head = head
        self.layers = list(head.config.hidden_layers or [])

    def pool(self, row: Row, new: Sequence[int], hidden_TF: Tensor) -> Tensor:
        """Pooled states of the tokens of a row that wait for a risk, and of new ones after them.

        Args:
            row ([`Row`]): The row.
            new (`Sequence[int]`): Tokens that are not part of it yet.
            hidden_TF (`torch.Tensor` of shape `(T, F)`): Hidden states that end with theirs.
        """
        config = self.head.config
        if config.span == "segment":
            counts = row.counts[row.num_settled :] + row.segment_counts(new)
        else:
            counts = list(range(row.pooled.num_tokens, row.pooled.num_tokens + row.num_unscored() + len(new)))
        weights = pooling_weights(counts, config.pooling, config.ewma_decay)
        return pool(row.pooled.last(), hidden_TF[hidden_TF.shape[0] - len(counts) :], weights)

    def risks(self, pooled: Sequence[Tensor]) -> Tensor:
        """Risks of several rows' pooled states in one pass of the head, one after the other."""
        return self.head.risk(torch.cat(list(pooled)))
