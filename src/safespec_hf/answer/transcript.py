"""The tokens of one answer, where they came from, and which of them the caller sees."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from ..outputs import Provenance

INSERTED = (Provenance.REFLECTION, Provenance.REFUSAL)
NUM_SPARE = 256
"""Places for tokens that a buffer begins with; it doubles when it is full."""


class Transcript:
    """A prompt and what follows it. The model reads all of it; the caller does not see hidden reflections.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(prompt,)`): As the caller gave it, padding included.
        is_real (`torch.Tensor` of shape `(prompt,)`): False for padding.
        shows_reflections (`bool`): Whether the caller sees them.

    Attributes:
        prompt (`list[int]`): Without padding.
        tokens (`list[int]`): The answer, inserted text included.
        origins (`list[Provenance]`): Where each token came from.
        num_visible (`int`): Answer tokens that the caller sees.
    """

    def __init__(self, prompt_ids: Tensor, is_real: Tensor, shows_reflections: bool):
        self.prompt: list[int] = prompt_ids[is_real.bool()].tolist()
        self.tokens: list[int] = []
        self.origins: list[Provenance] = []
        self.num_visible = 0
        self.shows_reflections = shows_reflections
        self._inserted: list[int] = []
        self._num_prompt = prompt_ids.numel()
        # how long an answer may become says nothing about how long it will: the buffer grows with it
        self._visible = torch.cat([prompt_ids, prompt_ids.new_zeros(NUM_SPARE)])

    @property
    def device(self) -> torch.device:
        """Where the caller's processors and criteria work: the target's device."""
        return self._visible.device

    @property
    def num_context(self) -> int:
        """Tokens of prompt and answer, inserted text included."""
        return len(self.prompt) + len(self.tokens)

    def context(self, start: int) -> list[int]:
        """Context tokens from index `start` on."""
        num_prompt = len(self.prompt)
        return self.tokens[start - num_prompt :] if start >= num_prompt else self.prompt[start:] + self.tokens

    def visible_ids(self, extra: Sequence[int] | Tensor = (), num_visible: int | None = None) -> Tensor:
        """What the caller would see so far, as processors and stopping criteria expect it.

        Args:
            extra (`Sequence[int]` or `torch.LongTensor`): Tokens after those; a tensor that is not read by the host.
            num_visible (`int`, *optional*): Leave out all visible answer tokens after so many.

        Returns:
            `torch.LongTensor` of shape `(1, length)`: Padding, prompt and answer.
        """
        ids = self._visible[: self._num_prompt + (self.num_visible if num_visible is None else num_visible)]
        if not len(extra):
            return ids[None]
        tail = extra.to(ids) if isinstance(extra, Tensor) else ids.new_tensor(list(extra))
        return torch.cat([ids, tail])[None]

    def append(self, token: int, origin: Provenance) -> None:
        """Adds one token."""
        if origin in INSERTED:
            self._inserted.append(len(self.tokens))
        self.tokens.append(token)
        self.origins.append(origin)
        if self.is_visible(len(self.tokens) - 1):
            end = self._num_prompt + self.num_visible
            if end == self._visible.numel():
                self._visible = torch.cat([self._visible, torch.zeros_like(self._visible)])
            self._visible[end] = token
            self.num_visible += 1

    def truncate(self, kept: int) -> None:
        """Drops all tokens after the first `kept`."""
        if dropped := self.visible(kept):
            self.num_visible -= len(dropped)
            # processors and criteria may have kept what they were shown: other tokens go in the same places of a copy
            self._visible = self._visible.clone()
        del self.tokens[kept:], self.origins[kept:]
        del self._inserted[bisect_left(self._inserted, kept) :]

    def is_visible(self, index: int) -> bool:
        """Whether the caller sees answer token `index`."""
        return self.shows_reflections or self.origins[index] is not Provenance.REFLECTION

    def visible(self, start: int = 0, end: int | None = None) -> list[int]:
        """Indices of the visible answer tokens in `[start, end)`."""
        return [index for index in range(start, len(self.tokens) if end is None else end) if self.is_visible(index)]

    def num_scored(self, end: int | None = None) -> int:
        """How many of the first `end` answer tokens carry a risk: all but inserted text."""
        end = len(self.tokens) if end is None else end
        return end - bisect_left(self._inserted, end)
