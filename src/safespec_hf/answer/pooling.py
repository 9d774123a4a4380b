"""Risk of every generated token, from hidden states the target computed anyway.

Every pooling is a weighted mean over the scored span, so a block's pooled states are one small matrix product over
its hidden states and the pooled state before it. Each row keeps the pooled state after every token that can still be
rolled back: undoing tokens is dropping the end of that list.

Shapes: T tokens of a block, F features (hidden size times tapped layers), W kept states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def find_newline_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens whose text holds a newline: those that can end a segment."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return frozenset(token for token, text in enumerate(texts) if "\n" in text)


def segment_counts(
    num_open: int,
    is_newline: Sequence[bool],
    min_tokens: int,
    max_tokens: int,
    edges: Sequence[tuple[bool, bool]] | None = None,
) -> tuple[list[int], int]:
    """For each token of a block, how many tokens of its segment come before it.

    Args:
        num_open (`int`): Tokens already in the open segment.
        is_newline (`Sequence[bool]`): Whether each token holds a newline.
        min_tokens (`int`): A newline ends a segment of at least this many tokens, so that blank lines are none.
        max_tokens (`int`): A segment ends at this many tokens, or as soon after as no character is left unfinished.
        edges (`Sequence[tuple[bool, bool]]`, *optional*):
            Whether a character ends before each token, and after it. Default: always.

    Returns:
        `tuple[list[int], int]`: The counts, and the tokens in the segment that is open afterwards.

    Example:

        >>> segment_counts(1, [False, True, True], min_tokens=2, max_tokens=8)
        ([1, 2, 0], 1)
    """
    counts = []
    for index, has_newline in enumerate(is_newline):
        before, after = (True, True) if edges is None else edges[index]
        if before and num_open >= max_tokens:
            num_open = 0
        counts.append(num_open)
        num_open += 1
        if after and (num_open >= max_tokens or (has_newline and num_open >= min_tokens)):
            num_open = 0
    return counts, num_open


def own_weight(count: int, pooling: str, decay: float) -> float:
    """What a token's own hidden state weighs in its pooled state; the rest is that of the token before.

    Example:

        >>> own_weight(3, "mean", 0.9), own_weight(0, "ewma", 0.9)
        (0.25, 1.0)
    """
    return 1.0 if count == 0 or pooling == "last" else 1 / (count + 1) if pooling == "mean" else 1 - decay


def pooling_weights(
    counts: Sequence[int], pooling: str, decay: float, previous: Sequence[int] | None = None
) -> Tensor:
    """Weights that turn a block's hidden states into pooled ones.

    Args:
        counts (`Sequence[int]`): For each token, how many tokens of its span come before it.
        pooling (`str`): `"last"`, `"mean"` or `"ewma"`.
        decay (`float`): Weight of the past per token, for `"ewma"`.
        previous (`Sequence[int]`, *optional*):
            For each token, which one of the block it follows; -1 for the token before the block. Default: the one
            before it.

    Returns:
        `torch.FloatTensor` of shape `(T, 1 + T)`: Column 0 weighs the pooled state before the block, column `1 + j`
        the hidden state of token `j`. Rows sum to 1.

    Example:

        >>> pooling_weights([1, 2, 0], "mean", 0.9)
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.3333, 0.3333, 0.3333, 0.0000],
                [0.0000, 0.0000, 0.0000, 1.0000]])
    """
    rows: list[list[float]] = []
    for token, count in enumerate(counts):
        own = own_weight(count, pooling, decay)
        # a pooled state is a mix of the one before it and the token's own hidden state
        follows = token - 1 if previous is None else previous[token]
        before = rows[follows] if follows >= 0 else [1.0] + [0.0] * len(counts)
        rows.append([(1 - own) * weight for weight in before])
        rows[-1][1 + token] = own
    return torch.tensor(rows, dtype=torch.float32).view(len(counts), 1 + len(counts))


def pool(before_F: Tensor | None, hidden_TF: Tensor, weights: Tensor) -> Tensor:
    """Pooled states of a block, float32; `nan` where one that is not finite counts, and nowhere else.

    Args:
        before_F (`torch.Tensor` of shape `(F,)`, *optional*): Pooled state of the token before the block, if any.
        hidden_TF (`torch.Tensor` of shape `(..., T, F)`): The block's hidden states.
        weights (`torch.Tensor` of shape `(..., T, 1 + T)`): See [`pooling_weights`].

    Returns:
        `torch.Tensor` of shape `(..., T, F)`.
    """
    hidden_TF = hidden_TF.float()
    weights = weights.to(hidden_TF.device)
    pooled_TF = weights[..., 1:] @ hidden_TF
    pooled_TF = pooled_TF if before_F is None else pooled_TF + weights[..., :1] * before_F
    # what is finite is right; to look at it would make the host wait for an accelerator
    is_right = pooled_TF.device.type == "cpu" and bool(pooled_TF.sum().isfinite())
    return pooled_TF if is_right else _pool_apart(before_F, hidden_TF, weights)


def _pool_apart(before_F: Tensor | None, hidden_TF: Tensor, weights: Tensor) -> Tensor:
    """The same, where 0 * inf would be nan: a rejected draft's state must not reach the tokens before it."""
    is_bad_T = ~hidden_TF.sum(-1).isfinite()
    sound_TF = hidden_TF.masked_fill(is_bad_T[..., None], 0.0)
    counts_bad_T1 = (weights[..., 1:].ne(0) & is_bad_T[..., None, :]).any(-1, keepdim=True)
    pooled_TF = (weights[..., 1:] @ sound_TF).masked_fill(counts_bad_T1, torch.nan)
    return pooled_TF if before_F is None else pooled_TF + _share(weights[..., :1], before_F)


def pool_block(
    before_F: Tensor | None,
    hidden_TF: Tensor,
    counts: Sequence[int],
    pooling: str,
    decay: float,
    previous: Sequence[int] | None = None,
) -> Tensor:
    """Pooled states of a block in every way that `pooling` names, side by side.

    Args:
        before_F (`torch.Tensor` of shape `(F,)`, *optional*): All pooled states of the token before the block, if any.
        hidden_TF (`torch.Tensor` of shape `(T, H)`): The block's hidden states.
        counts, decay, previous: As for [`pooling_weights`].
        pooling (`str`): One way or several, such as `"mean+ewma"`.

    Returns:
        `torch.Tensor` of shape `(T, F)`, where F is H times the number of ways.

    Example:

        >>> import torch
        >>> pool_block(None, torch.tensor([[1.0], [3.0]]), [0, 1], "mean+last", 0.9)
        tensor([[1., 1.],
                [2., 3.]])
    """
    ways = pooling.split("+")
    befores = [None] * len(ways) if before_F is None else before_F.chunk(len(ways), dim=-1)
    weights = [pooling_weights(counts, way, decay, previous) for way in ways]
    pooled = [pool(before, hidden_TF, weight) for before, weight in zip(befores, weights, strict=True)]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


def pool_next(
    before_KF: Tensor | None, hidden_KF: Tensor, counts: Sequence[int], pooling: str, decay: float
) -> Tensor:
    """Pooled states after one more token of each of K texts, at the same cost however long they are.

    Args:
        before_KF (`torch.Tensor` of shape `(K, F)`, *optional*): Pooled states of the tokens before, if there are any.
        hidden_KF (`torch.Tensor` of shape `(K, H)`): Hidden states of the new tokens.
        counts (`Sequence[int]`): For each of them, how many tokens of its span come before it.
        pooling, decay: As for [`pool_block`].

    Example:

        >>> import torch
        >>> pool_next(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0]]), [1], "mean+last", 0.9)
        tensor([[2., 3.]])
    """
    ways = pooling.split("+")
    hidden_KF = hidden_KF.float()
    if before_KF is None:
        return torch.cat([hidden_KF] * len(ways), dim=-1)
    own = [[own_weight(count, way, decay) for way in ways] for count in counts]
    own_KW1 = torch.tensor(own, dtype=torch.float32).to(hidden_KF.device, non_blocking=True)[..., None]
    before_KWF = before_KF.view(len(own), len(ways), -1)
    return (_share(1 - own_KW1, before_KWF) + own_KW1 * hidden_KF[:, None]).flatten(1)


def _share(weight: Tensor, states: Tensor) -> Tensor:
    """A part of states; nothing of those that do not count, were they infinite."""
    return torch.where(weight == 0, 0.0, weight * states)


class PooledStates:
    """The pooled states after the last tokens of one answer, so that a rollback is an index.

    Example:

        >>> import torch
        >>> states = PooledStates()
        >>> states.append(torch.tensor([[1.0], [2.0], [3.0]]))
        >>> states.keep(2)
        >>> states.last()
        tensor([2.])
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._states_WF: Tensor | None = None

    def last(self) -> Tensor | None:
        """The pooled state after the last token, of shape `(F,)`; `None` before the first one."""
        assert self._states_WF is not None or self.num_tokens == 0, "rolled back past a final token"
        return None if self._states_WF is None or self.num_tokens == 0 else self._states_WF[-1]

    def append(self, pooled_TF: Tensor) -> None:
        """Adds the states of the next tokens."""
        self.num_tokens += pooled_TF.shape[0]
        states = self._states_WF
        self._states_WF = pooled_TF if states is None else torch.cat([states, pooled_TF])

    def keep(self, num_tokens: int) -> None:
        """Rolls back to `num_tokens`. If more are to follow, the state after the last of them must still be held."""
        if self._states_WF is not None and num_tokens < self.num_tokens:
            num_left = self._states_WF.shape[0] - (self.num_tokens - num_tokens)
            self._states_WF = self._states_WF[:num_left] if num_left > 0 else None
        self.num_tokens = num_tokens

    def forget_before(self, num_tokens: int) -> None:
        """Lets go of states that no rollback can need: all before the one after token number `num_tokens`."""
        if self._states_WF is None:
            return
        first = self.num_tokens - self._states_WF.shape[0]
        self._states_WF = self._states_WF[max(num_tokens - 1 - first, 0) :]
