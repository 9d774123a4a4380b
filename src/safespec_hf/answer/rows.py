"""One answer while it is being generated: its tokens, where they came from, their risks and its segments.

Host-side bookkeeping only: no model, no cache. The context of a row is its prompt followed by `tokens`, inserted
reflections included; the caller sees the visible ones of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..config import SafeSpecConfig
from ..outputs import Provenance, SafeSpecEvent
from .pooling import PooledStates, segment_counts
from .recovery import rollback_point

INSERTED = (Provenance.REFLECTION, Provenance.REFUSAL)


class Row:
    """State of one answer.

    Args:
        index (`int`): Which row of the caller's batch it is.
        prompt_ids (`torch.LongTensor` of shape `(prompt,)`): As the caller gave it, padding included.
        is_real (`torch.Tensor` of shape `(prompt,)`): False for padding.
        max_new_tokens (`int`): Visible tokens allowed after the prompt.
        policy ([`SafeSpecConfig`]): Segment lengths, rollback depth, and whether reflections are visible.
        newline_ids (`frozenset[int]`): Tokens that end a segment.
        processors ([`~transformers.LogitsProcessorList`]): The caller's logits processors, for this row.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Tensor,
        is_real: Tensor,
        *,
        max_new_tokens: int,
        policy: SafeSpecConfig,
        newline_ids: frozenset[int] = frozenset(),
        processors: LogitsProcessorList | None = None,
    ):
        self.index = index
        self.prompt: list[int] = prompt_ids[is_real.bool()].tolist()
        self.max_new_tokens = max_new_tokens
        self.policy = policy
        self.newline_ids = newline_ids
        self.processors = processors if processors is not None else LogitsProcessorList()
        self.tokens: list[int] = []
        self.origins: list[Provenance] = []
        self.risks: list[float] = []
        self.counts: list[int] = []  # scored tokens of its segment before each token
        self.segment_starts = [0]
        self.num_open = 0  # scored tokens in the open segment
        self.num_final = 0  # tokens that nothing can take back any more
        self.num_settled = 0  # tokens whose risk is known, or that have none
        self.num_streamed = 0
        self.num_recoveries = 0
        self.pooled = PooledStates()
        self.events: list[SafeSpecEvent] = []
        self.flagged_first_tokens: dict[int, set[int]] = {}
        self.finish_reason: str | None = None
        self.closing: str | None = None  # finish reason of an answer whose last token is still to be scored
        self._inserted: list[int] = []
        self._num_prompt = prompt_ids.numel()
        self._visible = prompt_ids.new_zeros(self._num_prompt + max_new_tokens)
        self._visible[: self._num_prompt] = prompt_ids
        self.num_visible = 0

    @property
    def num_context(self) -> int:
        """Tokens of prompt and answer, inserted text included."""
        return len(self.prompt) + len(self.tokens)

    @property
    def device(self) -> torch.device:
        """Where the caller's processors and criteria work: the target's device."""
        return self._visible.device

    @property
    def has_hidden(self) -> bool:
        """Whether the model reads tokens that the caller does not see."""
        return len(self.tokens) > self.num_visible

    @property
    def room(self) -> int:
        """Visible tokens that may still be added."""
        return self.max_new_tokens - self.num_visible

    def context(self, start: int) -> list[int]:
        """Context tokens from index `start` on."""
        num_prompt = len(self.prompt)
        return self.tokens[start - num_prompt :] if start >= num_prompt else self.prompt[start:] + self.tokens

    def visible_ids(self, extra: Sequence[int] = ()) -> Tensor:
        """What the caller would see so far, as processors and stopping criteria expect it: shape `(1, length)`."""
        ids = self._visible[: self._num_prompt + self.num_visible]
        return (torch.cat([ids, ids.new_tensor(list(extra))]) if extra else ids)[None]

    def process(self, ids_KL: Tensor, scores_KV: Tensor) -> Tensor:
        """The caller's logits processors, on any number of continuations of this row."""
        return self.processors(cast("torch.LongTensor", ids_KL), cast("torch.FloatTensor", scores_KV))

    def is_visible(self, index: int) -> bool:
        """Whether the caller sees answer token `index`."""
        return self.policy.keep_reflection or self.origins[index] is not Provenance.REFLECTION

    def num_unscored(self) -> int:
        """Tokens at the end whose risk no forward has given yet."""
        return len(self.tokens) - self.num_settled

    def segment_counts(self, tokens: Sequence[int]) -> list[int]:
        """For each of the next tokens, how many scored tokens of its segment come before it."""
        return self._segments(tokens)[0]

    def append(self, token: int, origin: Provenance) -> None:
        """Adds one token."""
        if origin in INSERTED:
            self._inserted.append(len(self.tokens))
        self.tokens.append(token)
        self.origins.append(origin)
        self.risks.append(math.nan)
        (count,), num_open = self._segments([token])
        self.counts.append(count)
        if self.is_visible(len(self.tokens) - 1):
            self._visible[self._num_prompt + self.num_visible] = token
            self.num_visible += 1
        if origin in INSERTED:
            self.num_settled = len(self.tokens)
            return
        self.num_open = num_open
        if self.num_open == 0:
            self.segment_starts.append(len(self.tokens))

    def _segments(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        policy = self.policy
        is_newline = [token in self.newline_ids for token in tokens]
        return segment_counts(self.num_open, is_newline, policy.min_segment_tokens, policy.max_segment_tokens)

    def settle(self, risks: Sequence[float], pooled_TF: Tensor) -> None:
        """Records the risks and pooled states of the oldest tokens that had none."""
        self.risks[self.num_settled : self.num_settled + len(risks)] = risks
        self.num_settled += len(risks)
        self.pooled.append(pooled_TF)

    def finalize(self) -> None:
        """Makes final what no later flag can take back, given that every settled token is safe."""
        # the next token to be flagged, if any, is the oldest one that waits for its risk
        first_revocable = bisect_right(self.segment_starts, self.num_settled) - 1 - self.policy.rollback_segments
        if first_revocable >= 0:
            self.num_final = max(self.num_final, self.segment_starts[first_revocable])
            self.pooled.forget_before(self.num_scored(self.num_final))

    def rollback(self, flagged: int) -> tuple[int, int]:
        """Takes back the segment of token `flagged` and the segments before it that the policy gives up.

        Returns:
            `tuple[int, int]`: Tokens kept, and generated tokens given up.
        """
        kept = rollback_point(self.segment_starts, flagged, self.policy.rollback_segments, self.num_final)
        num_discarded = self.num_scored() - self.num_scored(kept)
        first = next(index for index in range(kept, len(self.tokens)) if self.origins[index] not in INSERTED)
        self.flagged_first_tokens.setdefault(kept, set()).add(self.tokens[first])
        self.truncate(kept)
        return kept, num_discarded

    def truncate(self, kept: int) -> None:
        """Drops all tokens after the first `kept`."""
        self.num_visible -= sum(self.is_visible(index) for index in range(kept, len(self.tokens)))
        del self.tokens[kept:], self.origins[kept:], self.risks[kept:], self.counts[kept:]
        del self._inserted[bisect_left(self._inserted, kept) :]
        self.num_settled = min(self.num_settled, kept)
        self.flagged_first_tokens = {at: ids for at, ids in self.flagged_first_tokens.items() if at <= kept}
        self.pooled.keep(min(self.pooled.num_tokens, self.num_scored(kept)))
        self.segment_starts = [start for start in self.segment_starts if start <= kept]
        self.num_open = self.num_scored(kept) - self.num_scored(self.segment_starts[-1])

    def visible(self, start: int = 0, end: int | None = None) -> list[int]:
        """Indices of the visible answer tokens in `[start, end)`."""
        return [index for index in range(start, len(self.tokens) if end is None else end) if self.is_visible(index)]

    def num_scored(self, end: int | None = None) -> int:
        """How many of the first `end` answer tokens carry a risk: all but inserted text."""
        end = len(self.tokens) if end is None else end
        return end - bisect_left(self._inserted, end)


def pad_rows(rows: Sequence[Row], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What the caller sees of several answers, padded on the right.

    Returns:
        `tuple`: Tokens, risks (`nan` for padding) and provenance (-1 for padding), each `(rows, longest)`.
    """
    visible = [row.visible() for row in rows]
    width = max(len(indices) for indices in visible)

    def pad(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        pairs = zip(values, visible, strict=True)
        padded = [[row[index] for index in indices] + [fill] * (width - len(indices)) for row, indices in pairs]
        return torch.tensor(padded, dtype=dtype, device=device).view(len(rows), width)

    tokens = pad([row.tokens for row in rows], pad_token_id, torch.long)
    risks = pad([row.risks for row in rows], math.nan, torch.float32)
    return tokens, risks, pad([row.origins for row in rows], -1, torch.long)
