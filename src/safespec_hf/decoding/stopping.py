"""The caller's stopping criteria: asked after every kept token, as plain decoding asks them, and about no other.

Speculation keeps several tokens at once, rows advance at different speeds, and rollbacks take tokens back. Criteria
must notice nothing of it. Those of transformers judge a row by itself and remember nothing, so they are asked about a
row as soon as it has a new token. Any other may compare rows or remember what it saw. It is asked once for each
length, about the whole batch at that length, when every row has come so far. When tokens are taken back, it gets the
state back that it began with and is asked again about what was kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, cast

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation.stopping_criteria import MaxLengthCriteria

from ..answer.rows import Row
from ..answer.transcript import INSERTED
from ..errors import UnsupportedRequestError

OWN = (MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
COPIED = (set, deque, bytearray, np.ndarray)


class RowCriterion(StoppingCriteria):
    """One of ours: it judges a row by itself, and remembers nothing."""


class Stopping:
    """Asks criteria about the rows of a batch.

    Args:
        criteria ([`~transformers.StoppingCriteriaList`]): All but end tokens and the length limit.
        rows (`Sequence[Row]`): The whole batch, in the caller's order.
        pad_token_id (`int`): What plain decoding gives to rows that have ended.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: Sequence[Row], pad_token_id: int):
        self.rows = rows
        self.pad_token_id = pad_token_id
        of_row = [isinstance(one, RowCriterion) or type(one) in OWN for one in criteria]
        self._of_row = StoppingCriteriaList(one for one, is_own in zip(criteria, of_row, strict=True) if is_own)
        self._of_batch = StoppingCriteriaList(one for one, is_own in zip(criteria, of_row, strict=True) if not is_own)
        self._first_states = [copy_state(getattr(one, "__dict__", {})) for one in self._of_batch]
        self._num_asked = [0] * len(rows)  # tokens of each row that its own criteria were asked about
        self._length = 0  # of the rows, when the batch's criteria were asked last

    def ask(self, num_ready: Sequence[int], is_open: Sequence[bool]) -> dict[int, int]:
        """Asks about all tokens that no criterion was asked about yet.

        Args:
            num_ready (`Sequence[int]`): Of each row of the batch, the visible tokens that may be asked about.
            is_open (`Sequence[bool]`): Which rows will get more tokens.

        Returns:
            `dict[int, int]`: For each row that a criterion ended, after how many visible tokens.
        """
        ends: dict[int, int] = {}
        if self._of_row:
            self._ask_rows(num_ready, is_open, ends)
        if self._of_batch:
            self._ask_batch(num_ready, is_open, ends)
        return ends

    def num_before_end(self, row: Row, tokens: Sequence[int]) -> int:
        """How many of the next tokens of a row there are up to where one of its own criteria would end the answer.

        Criteria of the batch are not asked: they may only hear of what is kept.
        """
        for length in range(1, len(tokens) + 1) if self._of_row else ():
            if bool(self._of_row(cast("LongTensor", row.visible_ids(tokens[:length])), None).all()):
                return length
        return len(tokens)

    def roll_back(self, row: Row) -> None:
        """Makes the criteria forget the tokens of a row that are gone."""
        kept = row.num_visible
        self._num_asked[row.index] = min(self._num_asked[row.index], kept)
        if not self._of_batch or self._length <= kept:
            return
        self._length = kept
        for criterion, first in zip(self._of_batch, self._first_states, strict=True):
            if first:
                restore_state(criterion, first)
                for length in range(1, kept + 1):
                    criterion(self._batch_ids(length, {}), None)

    def _ask_rows(self, num_ready: Sequence[int], is_open: Sequence[bool], ends: dict[int, int]) -> None:
        for row, ready, opened in zip(self.rows, num_ready, is_open, strict=True):
            for length in range(self._num_asked[row.index] + 1, ready + 1) if opened else ():
                self._num_asked[row.index] = length
                if may_end(row, length) and bool(
                    self._of_row(cast("LongTensor", row.visible_ids((), length)), None).all()
                ):
                    ends[row.index] = length
                    break

    def _ask_batch(self, num_ready: Sequence[int], is_open: Sequence[bool], ends: dict[int, int]) -> None:
        last = [ends.get(row.index, ready) for row, ready in zip(self.rows, num_ready, strict=True)]
        goes_on = [opened and row.index not in ends for row, opened in zip(self.rows, is_open, strict=True)]
        while self._length < min((end for end, more in zip(last, goes_on, strict=True) if more), default=max(last)):
            self._length += 1
            is_done = self._decide(self._batch_ids(self._length, ends))
            for index, row in enumerate(self.rows):
                if is_done[index] and self._length <= last[index] and may_end(row, self._length):
                    ends[index] = last[index] = self._length
                    goes_on[index] = False

    def _decide(self, ids_BL: LongTensor) -> list[bool]:
        """Which rows the batch's criteria end; all of them are asked."""
        decisions = [value_of_each(one, one(ids_BL, None), ids_BL) for one in self._of_batch]
        return cast("list[bool]", torch.stack(decisions).any(dim=0).tolist())

    def _batch_ids(self, length: int, ends: Mapping[int, int]) -> LongTensor:
        """What plain decoding shows when the answers have a length: those that ended before are padded."""
        ids = []
        for row in self.rows:
            end = min(length, ends.get(row.index, row.num_visible))
            ids.append(row.visible_ids([self.pad_token_id] * (length - end), end))
        return cast("LongTensor", torch.cat(ids) if len(ids) > 1 else ids[0])


def value_of_each(criterion: StoppingCriteria, value: Any, ids_BL: Tensor) -> Tensor:
    """What a criterion says, as one value for each row: it may give that, also as a column, or one for all of them.

    Raises:
        UnsupportedRequestError: If it gives anything else.
    """
    num_rows = len(ids_BL)
    found = value if isinstance(value, Tensor) else torch.tensor(value) if isinstance(value, (bool, int)) else None
    if isinstance(value, (np.ndarray, np.bool_)):
        found = torch.from_numpy(np.asarray(value))
    if found is None or tuple(found.shape) not in {(), (1,), (num_rows,), (num_rows, 1)}:
        said = f"{type(value).__name__}" if found is None else f"values of shape {tuple(found.shape)}"
        name = getattr(criterion, "__name__", type(criterion).__name__)
        raise UnsupportedRequestError(
            f"The stopping criterion {name} gave {said} for a batch of {num_rows} rows. It must give one value for "
            f"each row, of shape ({num_rows},), or one for all."
        )
    return found.to(ids_BL.device, torch.bool).flatten().expand(num_rows)


def may_end(row: Row, length: int) -> bool:
    """Whether an answer can be cut after so many visible tokens: never inside of text that was inserted."""
    if row.finish_reason == "safety_refusal":
        return False
    return not row.shows_reflections or row.origins[length - 1] not in INSERTED


def copy_state(value: Any) -> Any:
    """A copy of what containers, arrays and tensors hold; tokenizers, locks and the like are shared."""
    if isinstance(value, dict):
        return {name: copy_state(item) for name, item in value.items()}
    if isinstance(value, list):
        return [copy_state(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else copy(value) if isinstance(value, COPIED) else value


def restore_state(criterion: StoppingCriteria, state: dict[str, Any]) -> None:
    """Gives an object back what [`copy_state`] copied; lists stay the same lists, which a caller may look at."""
    held = vars(criterion)
    for name in [name for name in held if name not in state]:
        del held[name]
    for name, value in copy_state(state).items():
        if isinstance(value, list) and isinstance(held.get(name), list):
            held[name][:] = value
        else:
            held[name] = value
