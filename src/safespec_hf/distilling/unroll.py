"""Runs a draft head over whole texts as if it had drafted from every position of the answers at once.

Drafting goes on from its own states: the first draft token comes from the target's states, the second from the head's
own state of one step, and so on. Training must see the same, which EAGLE-3 calls training-time test
(https://arxiv.org/abs/2503.01840). Here a chain starts at each of the A answer positions; depth k of the chain that
starts at r stands at position r + k, and sees the target's states up to r and the chain's own after it.

Shapes: B texts, S positions, A answer positions, R chains that reach a depth (A - depth), D hidden size, H query
heads, K key heads, G query heads per key head, C channels of a head, N positions that count, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..heads.draft_head import DraftHead
from .states import Batch


class Figures(NamedTuple):
    """How well a draft head drafts known answers greedily.

    Attributes:
        loss (`float`): The weighted cross-entropy against the target.
        acceptance (`list[float]`): By depth: share of positions whose token was drafted, given the true tokens before.
        tokens_per_round (`float`): Tokens that a target forward gives when it checks a chain of that many drafts.
    """

    loss: float
    acceptance: list[float]
    tokens_per_round: float


class Counts(NamedTuple):
    """Sums over a batch, of which [`Figures`] are the ratios.

    Attributes:
        loss (`torch.Tensor`): A scalar to go down.
        num_hits, num_chains, num_all (`torch.Tensor` of shape `(num_depths,)`):
            Tokens that were drafted right; those where all before them in the chain were right too; all tokens.
    """

    loss: Tensor
    num_hits: Tensor
    num_chains: Tensor
    num_all: Tensor


def unroll(draft: DraftHead, batch: Batch, num_depths: int) -> list[Tensor]:
    """Hidden states of every chain at every depth.

    Args:
        draft ([`DraftHead`]): Bound to its target.
        batch ([`Batch`]): Texts.
        num_depths (`int`): Draft steps of a chain, >= 1. Depths that no chain reaches are left out.

    Returns:
        `list[torch.Tensor]`: For depth k one of shape `(B, A - k, D)`; entry r is about the token after answer
        position r + k. Give them to `draft.logits`.
    """
    start, num_answer = batch.num_prompt, batch.next_BA.shape[1]
    with torch.no_grad():  # the embeddings are the target's, and stay as they are
        embedded_BSD = draft.embed(batch.ids_BS)
    fused_BSD = draft.fuse(batch.states_BSF)
    query_BSHC, key_BKSC, value_BKSC = draft.project(embedded_BSD, fused_BSD, batch.position_ids_BS)
    bias_BAS = _chain_bias(batch)
    query_BRHC, state_BRD = query_BSHC[:, start:], fused_BSD[:, start:]
    own: list[tuple[Tensor, Tensor]] = []
    hidden: list[Tensor] = []
    for depth in range(min(num_depths, num_answer)):
        if depth > 0:
            columns = slice(start + depth, None)
            state_BRD = hidden[-1][:, :-1]
            query_BRHC, *pair = draft.project(embedded_BSD[:, columns], state_BRD, batch.position_ids_BS[:, columns])
            own.append((pair[0], pair[1]))
        mixed_BRX = _attend(query_BRHC, key_BKSC, value_BKSC, own, bias_BAS[:, : num_answer - depth])
        hidden.append(draft.finish(mixed_BRX, state_BRD))
    return hidden


def score_batch(draft: DraftHead, batch: Batch, num_depths: int, depth_decay: float) -> Counts:
    """The loss of a batch, and what was drafted right.

    The loss is the cross-entropy against the target's distribution over the draft vocabulary. Positions whose true
    token can't be drafted are left out of it: what the target thinks of the other tokens there does not matter.
    """
    index_of = torch.full((draft.config.vocab_size,), -1, device=draft.token_ids.device)
    index_of[draft.token_ids] = torch.arange(len(draft.token_ids), device=index_of.device)
    num_answer = batch.next_BA.shape[1]
    is_known_BA = batch.next_BA >= 0
    label_BA = torch.where(is_known_BA, index_of[batch.next_BA.clamp(min=0)], -1)
    is_answer_BA = batch.is_token_BS[:, batch.num_prompt :]
    # after an answer's last token comes one that is not written down, but the target's distribution is there
    is_used_BA = is_answer_BA & ((label_BA >= 0) | ~is_known_BA)
    with torch.no_grad():
        probs_NV = draft.output(batch.last_BAD[is_used_BA]).softmax(dim=-1)
    row_BA = is_used_BA.flatten().cumsum(0).view_as(is_used_BA) - 1
    losses, num_hits, num_chains, num_all = [], [], [], []
    is_right_BR = torch.ones_like(is_known_BA)
    for depth, hidden_BRD in enumerate(unroll(draft, batch, num_depths)):
        is_used_BR, known_BR = is_used_BA[:, depth:], is_known_BA[:, depth:]
        logits_NV = draft.logits(hidden_BRD[is_used_BR])
        # the mean over no position is nan, and would spread
        total = F.cross_entropy(logits_NV, probs_NV[row_BA[:, depth:][is_used_BR]], reduction="sum")
        losses.append(depth_decay**depth * total / is_used_BR.sum().clamp(min=1))
        hit_BR = torch.zeros_like(known_BR)
        hit_BR[is_used_BR] = logits_NV.argmax(dim=-1) == label_BA[:, depth:][is_used_BR]
        is_right_BR = is_right_BR[:, : num_answer - depth] & hit_BR
        num_hits.append(hit_BR.sum())
        num_chains.append(is_right_BR.sum())
        num_all.append(known_BR.sum())
    weight = sum(depth_decay**depth for depth in range(len(losses)))
    counts = [F.pad(torch.stack(part), (0, num_depths - len(part))) for part in (num_hits, num_chains, num_all)]
    return Counts(torch.stack(losses).sum() / weight, *counts)


def to_figures(parts: Sequence[Counts]) -> Figures:
    """Figures over several batches. `tokens_per_round` counts the token that the target adds."""
    hits, chains, everything = (torch.stack(part).sum(0).double() for part in list(zip(*parts, strict=True))[1:])
    weights = [float(part.num_all[0]) for part in parts]
    loss = sum(float(part.loss.detach()) * weight for part, weight in zip(parts, weights, strict=True)) / max(
        sum(weights), 1.0
    )
    everything = everything.clamp(min=1)
    return Figures(loss, (hits / everything).tolist(), 1 + float((chains / everything).sum()))


def _chain_bias(batch: Batch) -> Tensor:
    """Chain r sees the target's states up to column `num_prompt + r`, whatever its depth."""
    num_answer, width = batch.next_BA.shape[1], batch.ids_BS.shape[1]
    reach_AS = torch.ones(num_answer, width, dtype=torch.bool, device=batch.ids_BS.device).tril(batch.num_prompt)
    is_seen_BAS = reach_AS & batch.is_token_BS[:, None]
    return torch.zeros(is_seen_BAS.shape, device=is_seen_BAS.device).masked_fill(~is_seen_BAS, -torch.inf)


def _attend(
    query_BRHC: Tensor,
    key_BKSC: Tensor,
    value_BKSC: Tensor,
    own: list[tuple[Tensor, Tensor]],
    bias_BRS: Tensor,
) -> Tensor:
    num_keys, width = key_BKSC.shape[1:3]
    num_chains, head_dim = query_BRHC.shape[1], query_BRHC.shape[3]
    query_BKGRC = query_BRHC.unflatten(2, (num_keys, -1)).permute(0, 2, 3, 1, 4) * head_dim**-0.5
    groups = (query_BKGRC.shape[2], num_chains)
    scores = [(query_BKGRC.flatten(2, 3) @ key_BKSC.transpose(2, 3)).unflatten(2, groups) + bias_BRS[:, None, None]]
    # a chain meets its own keys one by one, so they need no matrix: R products of two vectors per depth
    scores += [(query_BKGRC * key[:, :, None, :num_chains]).sum(-1, keepdim=True) for key, _ in own]
    weights = torch.cat(scores, dim=-1).softmax(dim=-1)
    mixed_BKGRC = (weights[..., :width].flatten(2, 3) @ value_BKSC).unflatten(2, groups)
    for depth, (_, value) in enumerate(own):
        mixed_BKGRC = mixed_BKGRC + weights[..., width + depth, None] * value[:, :, None, :num_chains]
    return mixed_BKGRC.permute(0, 3, 1, 2, 4).flatten(2)
