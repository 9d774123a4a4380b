"""The target's hidden states of the last positions of a row: what a draft head reads."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 64
"""Positions to spare whenever the buffer is made, and those it may waste before it is made anew."""


class StateWindow:
    """States of the positions from `start` to `end`, in a buffer: a round writes its own and copies no others.

    Args:
        num_features (`int`): Of a state. Positions whose state is not known read as zeros.
    """

    def __init__(self, num_features: int):
        self.start = self.end = 0
        self._first = 0  # position of the buffer's first state
        self._buffer_PF = torch.empty(0, num_features)

    def write(self, start: int, states_TF: Tensor) -> None:
        """Sets the states from position `start` on, and forgets what it had from there on."""
        self.keep(start)
        if start > self.end:
            self.start = self.end = start
        end = start + len(states_TF)
        if not 0 <= self.start - self._first <= ROOM or end - self._first > len(self._buffer_PF):
            kept_TF = self._buffer_PF[self.start - self._first : self.end - self._first].to(states_TF)
            self._buffer_PF = states_TF.new_empty(end - self.start + ROOM, states_TF.shape[1])
            self._buffer_PF[: len(kept_TF)] = kept_TF
            self._first = self.start
        self._buffer_PF[start - self._first : end - self._first] = states_TF
        self.end = end

    def keep(self, end: int) -> None:
        """Forgets the positions from `end` on."""
        self.end = min(self.end, end)
        self.start = min(self.start, self.end)

    def forget_before(self, position: int) -> None:
        """Lets go of what comes before `position`."""
        self.start = min(max(self.start, position), self.end)

    def read(self, start: int, end: int) -> Tensor:
        """The states of positions `[start, end)`, of shape `(end - start, F)`; `end` is the window's at most."""
        known_TF = self._buffer_PF[max(start, self.start) - self._first : max(end - self._first, 0)]
        return torch.nn.functional.pad(known_TF, (0, 0, end - start - len(known_TF), 0))
