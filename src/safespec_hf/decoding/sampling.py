"""Drawing tokens: those of an answer, and the K continuations that Safety Mode samples, all in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..answer.logits import penalize
from ..answer.rows import Row
from ..drafting.drafters import fit_vocabulary
from ..engine.cache import BlockOutput, CachedModel

MIN_TEMPERATURE = 1e-6
"""Below it scores overflow; at it the likeliest token is all but certain already."""
Judge = Callable[[Sequence[Sequence[int]], Sequence[bool], BlockOutput], list[bool]]


def sample_segments(
    sampler: CachedModel,
    row: Row,
    *,
    num_segments: int,
    max_tokens: int,
    end_ids: frozenset[int],
    steer: LogitsProcessor,
    generator: torch.Generator,
    temperature: float | None = None,
    vocab_size: int | None = None,
    judge: Judge | None = None,
    aside: Sequence[int] = (),
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
        temperature (`float`, *optional*): Of the draws, > 0. Default: the policy's for recoveries.
        vocab_size (`int`, *optional*): The target's, where the sampler's may be padded differently.
        judge (`Callable`, *optional*):
            Called after every forward with the segments, which of them are open, and the forward's output; says
            which stay open. With a judge the last tokens are read as well.
        aside (`Sequence[int]`): Tokens that are read after the context, and belong to no segment.

    Returns:
        `tuple`: K segments, and the cache that they were sampled with, a row for each. An empty segment is a failed
        one: at some point no token had a finite score, or one had none at all (`nan`).
    """
    policy = row.policy
    temperature = max(policy.recovery_temperature if temperature is None else temperature, MIN_TEMPERATURE)
    ids_1L = row.visible_ids()
    num_before = ids_1L.shape[1]
    all_KL = torch.nn.functional.pad(ids_1L, (0, max_tokens)).repeat(num_segments, 1)  # written in place
    ids_KL = all_KL[:, :num_before]
    segments: list[list[int]] = [[] for _ in range(num_segments)]
    is_open = [True] * num_segments
    output = _repeat(sampler.forward([[*row.context(sampler.lengths[0]), *aside]], 1), num_segments)
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
        scores_KV = steer(ids_KL, _process(row, ids_KL, logits_KV, is_open)) / temperature
        may_end = step + 1 >= policy.min_segment_tokens
        if end_ids and not may_end:
            # the fewer tokens, the lower the risk of the worst: an answer broken off at once would always be chosen
            scores_KV = penalize(scores_KV, sorted(end_ids))
        probs_KV = scores_KV.softmax(dim=-1)
        token_K1 = draw(probs_KV, generator)
        # softmax makes a row without any finite score, or with one that is not a number, all nan
        outcome_K2 = torch.cat([token_K1, probs_KV[:, :1].isnan().long()], dim=1)
        for k, (token, has_failed) in enumerate(outcome_K2.tolist()):
            if is_open[k] and has_failed:
                segments[k].clear()
                is_open[k] = False
            elif is_open[k]:
                segments[k].append(token)
                ends_line = token in row.segments.newline_ids and may_end
                is_open[k] = not ends_line and token not in end_ids
        if judge is None and not any(is_open):
            break
        ids_KL = all_KL[:, : num_before + step + 1]
        ids_KL[:, -1:] = token_K1
    return segments, sampler


def _process(row: Row, ids_KL: Tensor, logits_KV: Tensor, is_open: Sequence[bool]) -> Tensor:
    """The caller's processors, which are not asked how a segment goes on that has ended: a grammar may not know."""
    if all(is_open):
        return row.process(ids_KL, logits_KV)
    open_M = torch.tensor([k for k, goes_on in enumerate(is_open) if goes_on], device=logits_KV.device)
    return logits_KV.index_copy(0, open_M, row.process(ids_KL[open_M], logits_KV[open_M]))


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
        `torch.LongTensor` of shape `(K, 1)`: The tokens; never one of probability 0, where there is another. A row of
        `nan` gives some token of the vocabulary.

    Example:

        >>> import torch
        >>> draw(torch.tensor([[0.0, 1.0, 0.0]])).tolist()
        [[1]]
    """
    share_K1 = torch.rand(len(probs_KV), 1, dtype=torch.double, device=probs_KV.device, generator=generator)
    return token_at(probs_KV, share_K1)


def token_at(probs_KV: Tensor, share_K1: Tensor) -> Tensor:
    """The token of each row where a share of all probability is reached.

    Args:
        probs_KV (`torch.FloatTensor` of shape `(K, V)`): Probabilities; they need not sum to 1.
        share_K1 (`torch.DoubleTensor` of shape `(K, 1)`): In [0, 1).

    Returns:
        `torch.LongTensor` of shape `(K, 1)`: As [`draw`].

    Example:

        >>> import torch
        >>> token_at(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.7]]).double()).tolist()
        [[1]]
    """
    reached_KV = probs_KV.double().cumsum(dim=-1)  # in float32 rounding would move small probabilities
    # `right`: a share that is reached exactly belongs to the next token that has any probability
    token_K1 = torch.searchsorted(reached_KV, share_K1 * reached_KV[:, -1:], right=True)
    last_K1 = torch.searchsorted(reached_KV, reached_KV[:, -1:].contiguous()).clamp(max=probs_KV.shape[1] - 1)
    return torch.minimum(token_K1, last_K1)


class Shares:
    """A random share for every token that an answer will draw, so that what is drawn does not depend on the drafts.

    The share of a position is the same whichever draft it is tried after, and however many rounds it takes to get
    there. Two tokens of one answer never share one.

    Args:
        seed (`int`): Of the answer.

    Example:

        >>> shares = Shares(seed=0)
        >>> ahead = shares.ahead(3)
        >>> shares.use(1)
        >>> shares.ahead(2) == ahead[1:]
        True
    """

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._ahead: list[float] = []

    def ahead(self, num: int) -> list[float]:
        """The shares of the next `num` tokens, each in [0, 1)."""
        if (missing := num - len(self._ahead)) > 0:
            self._ahead += torch.rand(missing, dtype=torch.double, generator=self._generator).tolist()
        return self._ahead[:num]

    def use(self, num: int) -> None:
        """`num` tokens were drawn."""
        del self._ahead[:num]

    def forget(self) -> None:
        """Tokens that were drawn are taken back: what is drawn in their place must not be drawn alike."""
        self._ahead.clear()
