"""One answer while it is being generated. Host-side bookkeeping only: no model, no cache.

A row puts three parts together, each of which rolls back by index: the tokens (`transcript`), their segments
(`segments`) and their risks, kept here. What is known about risks decides what can still be taken back.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..config import SafeSpecConfig
from ..outputs import Provenance, SafeSpecEvent
from .characters import Piece
from .pooling import PooledStates
from .recovery import rollback_point
from .segments import Segments
from .transcript import INSERTED, Transcript


class Row(Transcript):
    """State of one answer.

    Args:
        index (`int`): Which row of the caller's batch it is.
        prompt_ids (`torch.LongTensor` of shape `(prompt,)`): As the caller gave it, padding included.
        is_real (`torch.Tensor` of shape `(prompt,)`): False for padding.
        max_new_tokens (`int`): Visible tokens allowed after the prompt.
        policy ([`SafeSpecConfig`]): Segment lengths, rollback depth, and whether reflections are visible.
        newline_ids (`frozenset[int]`): Tokens that end a segment.
        pieces (`Mapping[int, Piece]`, *optional*): Tokens that are no whole characters, see [`find_pieces`].
        processors ([`~transformers.LogitsProcessorList`], *optional*): The caller's, for this row.

    Attributes:
        risks (`list[float]`): Of each answer token; `nan` where it is unknown or there is none.
        num_settled (`int`): Answer tokens whose risk is known to be safe, or that have none.
        num_final (`int`): Answer tokens that nothing can take back any more.
        closing (`str`, *optional*): Finish reason of an answer whose last token is still to be scored.
        banned (`dict[int, set[int]]`): Tokens that may not stand in a place again.
        placeholders (`frozenset[int]`): Tokens that stand for images and the like, which a draft need not know.
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
        pieces: Mapping[int, Piece] | None = None,
        processors: LogitsProcessorList | None = None,
    ):
        super().__init__(prompt_ids, is_real, policy.keep_reflection)
        self.index = index
        self.max_new_tokens = max_new_tokens
        self.policy = policy
        self.processors = processors if processors is not None else LogitsProcessorList()
        self.segments = Segments(policy, newline_ids, pieces)
        self.risks: list[float] = []
        self.pooled = PooledStates()
        self.num_settled = 0
        self.num_final = 0
        self.num_streamed = 0
        self.num_recoveries = 0
        self.flagged_first_tokens: dict[int, set[int]] = {}
        self.banned: dict[int, set[int]] = {}
        self.events: list[SafeSpecEvent] = []
        self.finish_reason: str | None = None
        self.closing: str | None = None
        self.placeholders: frozenset[int] = frozenset()

    @property
    def room(self) -> int:
        """Visible tokens that may still be added."""
        return self.max_new_tokens - self.num_visible

    @property
    def num_continuable(self) -> int:
        """Tokens of prompt and answer that were read, up to the first that the caller does not see."""
        hidden = (index for index in range(len(self.tokens)) if not self.is_visible(index))
        return min(len(self.prompt) + next(hidden, len(self.tokens)), self.num_context - 1)

    @property
    def has_hidden(self) -> bool:
        """Whether the model reads tokens that the caller does not see."""
        return len(self.tokens) > self.num_visible

    def process(self, ids_KL: Tensor, scores_KV: Tensor) -> Tensor:
        """The caller's logits processors, on any number of continuations of this row."""
        return self.processors(cast("torch.LongTensor", ids_KL), cast("torch.FloatTensor", scores_KV))

    def num_unscored(self) -> int:
        """Tokens at the end whose risk no forward has given yet."""
        return len(self.tokens) - self.num_settled

    def append(self, token: int, origin: Provenance) -> None:
        """Adds one token; its risk is unknown, or nobody's if it is inserted."""
        super().append(token, origin)
        self.risks.append(math.nan)
        if origin in INSERTED:
            self.segments.insert()
            self.num_settled = len(self.tokens)
        else:
            self.segments.append(token)

    def settle(self, risks: Sequence[float], pooled_TF: Tensor) -> None:
        """Records the safe risks and the pooled states of the oldest tokens that had none."""
        self.risks[self.num_settled : self.num_settled + len(risks)] = risks
        self.num_settled += len(risks)
        self.pooled.append(pooled_TF)

    def finalize(self) -> None:
        """Makes final what no later flag can take back, given that every settled token is safe."""
        # the next token to be flagged, if any, is the oldest one that waits for its risk
        starts = self.segments.starts
        first_revocable = bisect_right(starts, self.num_settled) - 1 - self.policy.rollback_segments
        if first_revocable >= 0:
            self.num_final = max(self.num_final, starts[first_revocable])
            self.pooled.forget_before(self.num_scored(starts[first_revocable]))
        if self.policy.policy == "observe":
            self.num_final = len(self.tokens)

    def roll_back(self, flagged: int) -> tuple[int, int]:
        """Takes back the segment of token `flagged` and the segments before it that the policy gives up.

        Returns:
            `tuple[int, int]`: Tokens kept, and generated tokens given up.
        """
        kept = rollback_point(self.segments.starts, flagged, self.policy.rollback_segments, self.num_final)
        num_discarded = self.num_scored() - self.num_scored(kept)
        first = next(index for index in range(kept, len(self.tokens)) if self.origins[index] not in INSERTED)
        self.flagged_first_tokens.setdefault(kept, set()).add(self.tokens[first])
        self.truncate(kept)
        return kept, num_discarded

    def truncate(self, kept: int) -> None:
        """Drops all tokens after the first `kept`, and all that is known of them."""
        super().truncate(kept)
        self.segments.truncate(kept)
        del self.risks[kept:]
        self.num_settled = min(self.num_settled, kept)
        self.pooled.keep(min(self.pooled.num_tokens, self.num_scored(kept)))
        self.flagged_first_tokens = {at: ids for at, ids in self.flagged_first_tokens.items() if at <= kept}
        self.banned = {at: ids for at, ids in self.banned.items() if at <= kept}


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
