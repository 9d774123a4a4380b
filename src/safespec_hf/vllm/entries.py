"""What is known of each request, and where its tensors lie. Pure.

Shapes: S slots, K drafts, N answer tokens, R rows of logits, H tapped features, F pooled features.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..answer.bans import NUM_LOOKED_AT, looping_tokens
from ..answer.logits import penalize
from ..answer.segments import Boundaries, Segments
from .spec import GuardOrder


class StepRow(NamedTuple):
    """What a forward read of one request.

    Attributes:
        request (`str`): The engine's id of it.
        start (`int`): Position of the first token that was read.
        num_tokens (`int`): Tokens that were read.
        num_drafts (`int`): How many of them, at the end, are drafts; after each, and before the first, there is a row
            of logits.
        token_ids (`np.ndarray`): All tokens of the request up to the last one that was read.
    """

    request: str
    start: int
    num_tokens: int
    num_drafts: int
    token_ids: npt.NDArray[np.int32]


class Edit(NamedTuple):
    """Logits that a candidate wants changed: a penalty off those of some tokens."""

    row: int
    token_ids: list[int]
    penalty: float


class Marks(NamedTuple):
    """What becomes of the logits of a step.

    Attributes:
        is_forced_R (`torch.BoolTensor`): Rows in which only the reserved token is left.
        edits (`list[Edit]`): Of other rows.
    """

    is_forced_R: Tensor
    edits: list[Edit]


@dataclass(slots=True)
class Entry:
    """What is known of one request.

    Attributes:
        order ([`GuardOrder`], *optional*): Its own; `None` where it has none that can be believed.
        slot (`int`): Where its tensors are; -1 when it has ended.
        base (`int`): The pooled state is that before this position.
        num_pending (`int`): Drafts from there on, whose hidden states are kept.
        num_read (`int`): Answer tokens that have been read, drafts included.
        failure (`str`, *optional*): Why it is stopped.
        copies (`OrderedDict`): Pooled states at the ends of blocks, by what was read up to there.
        segments ([`Segments`], *optional*): Where pooling starts anew.
        kept: Tokens and risks of a request that has ended.
        prompt_risk (`torch.Tensor`, *optional*): Of its prompt, a scalar.
    """

    order: GuardOrder | None
    slot: int
    base: int = -1
    num_pending: int = 0
    num_read: int = 0
    failure: str | None = None
    copies: OrderedDict[bytes, Tensor] = field(default_factory=OrderedDict)
    segments: Segments | None = None
    kept: tuple[npt.NDArray[np.int32], Tensor] | None = None
    prompt_risk: Tensor | None = None

    @property
    def told_prompt_risk(self) -> float | None:
        """What the controller is told of the prompt: `None` unless it asked, `nan` if that should be known."""
        if self.prompt_risk is not None:
            return float(self.prompt_risk)
        is_missing = self.order is not None and self.order.prompt_threshold is not None and self.failure is None
        return math.nan if is_missing else None


@dataclass(slots=True)
class Work:
    """Answer tokens that a step read of one request.

    Attributes:
        first, end (`int`): Their positions, `[first, end)`.
        offset (`int`): Where the hidden state of the first lies in the batch.
        num_folded (`int`): Drafts of the step before that stand.
        before (`torch.Tensor`, *optional*): The pooled state to begin with, if not that of the slot.
        place (`int`): Where its flags begin among those of the step.
    """

    entry: Entry
    order: GuardOrder
    row: StepRow
    first: int
    end: int
    offset: int
    num_folded: int = 0
    before: Tensor | None = None
    place: int = 0


class Slots:
    """Tensors of all running requests, side by side; there are never less places than requests.

    Attributes:
        states_SF (`torch.FloatTensor` of shape `(S, F)`): Pooled states.
        drafts_SKH (`torch.Tensor` of shape `(S, K, H)`): Hidden states of drafts.
        risks_SN (`torch.FloatTensor` of shape `(S, N)`): Risks of answer tokens, `nan` where there is none.
        tokens_SN (`np.ndarray` of shape `(S, N)`): Answer tokens that were read.
    """

    def __init__(self, num_features: int, num_tapped: int, num_drafts: int, dtype: torch.dtype, device: torch.device):
        self.states_SF = torch.zeros(0, num_features, device=device)
        self.drafts_SKH = torch.zeros(0, num_drafts, num_tapped, dtype=dtype, device=device)
        self.risks_SN = torch.full((0, 64), math.nan, device=device)
        self.tokens_SN: npt.NDArray[np.int32] = np.full((0, 64), -1, dtype=np.int32)
        self._free: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Of one request, without copies."""
        of_states = self.states_SF.shape[1] * 4 + self.drafts_SKH[0:1].numel() * self.drafts_SKH.itemsize
        return of_states + self.tokens_SN.shape[1] * 8

    def take(self) -> int:
        """A free place."""
        if not self._free:
            old = len(self.states_SF)
            num = max(8, old)
            self._free = list(range(old + num - 1, old - 1, -1))
            self.states_SF = _grown(self.states_SF, num)
            self.drafts_SKH = _grown(self.drafts_SKH, num)
            more = self.risks_SN.new_full((num, self.risks_SN.shape[1]), math.nan)
            self.risks_SN = torch.cat([self.risks_SN, more])
            self.tokens_SN = np.pad(self.tokens_SN, ((0, num), (0, 0)), constant_values=-1)
        slot = self._free.pop()
        self.tokens_SN[slot] = -1  # what another request read there would pass for read by this one
        return slot

    def free(self, slot: int) -> None:
        """A place is free again."""
        self._free.append(slot)

    def widen(self, num_tokens: int) -> None:
        """Makes room for answers of so many tokens."""
        width = self.tokens_SN.shape[1]
        if num_tokens > width:
            more = max(num_tokens, 2 * width) - width
            self.risks_SN = torch.nn.functional.pad(self.risks_SN, (0, more), value=math.nan)
            self.tokens_SN = np.pad(self.tokens_SN, ((0, 0), (0, more)), constant_values=-1)


def _grown(tensor: Tensor, num: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(num, *tensor.shape[1:])])


def digest_of(order: GuardOrder, token_ids: npt.NDArray[np.int32], position: int) -> bytes:
    """What the pooled state before a position depends on."""
    inserted = [(first, min(end, position)) for first, end in order.inserted if first < position]
    key = repr((order.start, position, inserted, order.segment_limits)).encode()
    return hashlib.blake2b(np.ascontiguousarray(token_ids[:position]).tobytes() + key, digest_size=16).digest()


def ends_candidate(order: GuardOrder, row: StepRow, position: int, boundaries: Boundaries) -> bool:
    """Whether a candidate ends with the token there; then it has been read, and so has a risk."""
    candidate = order.candidate
    if candidate is None or (num := position - candidate.first + 1) < 1:
        return False
    token = int(row.token_ids[position])
    ends_line = token in boundaries.newline_ids and num >= candidate.min_tokens
    return num >= candidate.max_tokens or ends_line or token in candidate.end_ids


def edits_of(order: GuardOrder, row: StepRow, position: int, place: int) -> list[Edit]:
    """What a candidate, or an answer that was recovered, wants of the logits after a token, in that place."""
    candidate, edits = order.candidate, list[Edit]()
    if candidate is None:
        last = row.token_ids[order.start : position + 1][-NUM_LOOKED_AT:].tolist() if order.breaks_loops else []
        found = [*looping_tokens(last), *(token for at, token in order.banned if at == position + 1)]
        return [Edit(place, found, math.inf)] if found else []
    num = position + 1 - candidate.first  # tokens that it has so far
    if num == 0 and candidate.steer_ids:
        edits.append(Edit(place, candidate.steer_ids, candidate.penalty))
    if num >= 0 and num + 1 < candidate.min_tokens and candidate.end_ids:
        # the fewer tokens, the lower the risk of the worst: an answer broken off at once would always be chosen
        edits.append(Edit(place, candidate.end_ids, math.inf))
    return edits


def close_logits(logits_RV: Tensor, marks: Marks, reserved_id: int) -> Tensor:
    """Leaves nothing but the reserved token where a token was flagged, and never that token anywhere else. In place.

    Example:

        >>> marks = Marks(torch.tensor([True, False]), [])
        >>> close_logits(torch.zeros(2, 3), marks, reserved_id=2)
        tensor([[-inf, -inf, 0.],
                [0., 0., -inf]])
    """
    for edit in marks.edits:
        logits_RV[edit.row] = penalize(logits_RV[edit.row, None], edit.token_ids, edit.penalty)[0]
    is_forced_R = marks.is_forced_R
    # on an accelerator, to ask would be to wait
    if is_forced_R.device.type != "cpu" or bool(is_forced_R.any()):
        logits_RV.masked_fill_(is_forced_R[:, None], -torch.inf)
    logits_RV[:, reserved_id] = torch.zeros_like(logits_RV[:, 0]).masked_fill(~is_forced_R, -torch.inf)
    return logits_RV
