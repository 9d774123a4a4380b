"""A prompt that is more than tokens: how it is read, and what it leaves for the tokens after it.

Images, embeddings and positions of the caller's own are read in one forward, as the model prepares it. After that all
is tokens; but nothing of the prompt can be read again, its last place included, so the logits after it are kept.

Shapes: B rows, L places of the prompt, T positions of a block, P kinds of positions (M-RoPE has several).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILLER = 0
"""Is read where a row of a batch has nothing to read, and taken back with the drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Prompts of a batch, as the model's own preparation has them.

    Attributes:
        inputs (`Mapping[str, Any]`): What the forward over them is given, but for the cache.
        is_real_BL (`np.ndarray` of shape `(B, L)`): `False` for padding.
        num_tokens (`Sequence[int]`): Of each row, the places that are known as tokens: all or none.
        next_positions (`torch.LongTensor` of shape `(B,)` or `(P, B)`, *optional*): Of the first token after each.
        per_token (`Mapping[str, torch.Tensor]`): Forward arguments of shape `(B, 1, ...)` for each token after them.
        per_row (`Mapping[str, torch.Tensor]`): Others of shape `(B, ...)`, for each block.
        fixed (`Mapping[str, Any]`): Others that concern no row.
        placeholders (`frozenset[int]`): Tokens that stand in the place of images and the like.
    """

    inputs: Mapping[str, Any]
    is_real_BL: np.ndarray
    num_tokens: Sequence[int]
    next_positions: Tensor | None = None
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_row: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    placeholders: frozenset[int] = frozenset()

    @property
    def num_unseen(self) -> int:
        """How far positions or places are ahead of what rows know of tokens, at most."""
        nums = self.is_real_BL.sum(axis=1).tolist()
        ahead = [num - known for num, known in zip(nums, self.num_tokens, strict=True)]
        if self.next_positions is not None:
            highest = self.next_positions.reshape(-1, len(nums)).amax(dim=0).tolist()
            ahead += [position - known for position, known in zip(highest, self.num_tokens, strict=True)]
        return max(0, *ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterPrompt:
    """What prompts that were read leave for the tokens after them.

    Attributes:
        num_tokens (`list[int]`): Of each row; it can't go back further.
        num_unseen (`list[int]`): Places of each row that are not known as tokens.
        num_columns (`int`): Of the cache, padding included.
        logits_BV (`torch.Tensor` of shape `(B, V)`): After the prompts.
        nothing_B0F (`torch.Tensor` of shape `(B, 0, F)`, *optional*): Tapped hidden states of no tokens.
        shifts (`torch.LongTensor` of shape `(B,)` or `(P, B)`, *optional*): To be added to counted positions.
        per_token, per_row, fixed: As those of [`Prompt`].
    """

    num_tokens: list[int]
    num_unseen: list[int]
    num_columns: int
    logits_BV: Tensor
    nothing_B0F: Tensor | None
    shifts: Tensor | None
    per_token: Mapping[str, Tensor]
    per_row: Mapping[str, Tensor]
    fixed: Mapping[str, Any]

    @classmethod
    def of(cls, prompt: Prompt, logits_BV: Tensor, hidden_BLF: Tensor | None) -> AfterPrompt:
        """What a forward over the prompts leaves."""
        nums, device = prompt.is_real_BL.sum(axis=1).tolist(), logits_BV.device
        following = prompt.next_positions
        return cls(
            num_tokens=list(prompt.num_tokens),
            num_unseen=[num - known for num, known in zip(nums, prompt.num_tokens, strict=True)],
            num_columns=prompt.is_real_BL.shape[1],
            logits_BV=logits_BV.clone(),
            nothing_B0F=None if hidden_BLF is None else hidden_BLF[:, :0].clone(),
            shifts=None if following is None else (following.to(device) - torch.tensor(nums, device=device)),
            per_token={name: value.to(device) for name, value in prompt.per_token.items()},
            per_row={name: value.to(device) for name, value in prompt.per_row.items()},
            fixed=prompt.fixed,
        )

    def in_tokens(self, lengths: Sequence[int]) -> list[int]:
        """Of each row, the tokens that so many places are."""
        return [length - unseen for length, unseen in zip(lengths, self.num_unseen, strict=True)]

    def in_places(self, lengths: Sequence[int]) -> list[int]:
        """Of each row, the places that so many tokens are; the prompt stays."""
        triples = zip(lengths, self.num_tokens, self.num_unseen, strict=True)
        return [max(length, known) + unseen for length, known, unseen in triples]

    def is_last_in(self, lengths: Sequence[int]) -> bool:
        """Whether some row has no tokens after its prompt."""
        return any(length == known for length, known in zip(lengths, self.num_tokens, strict=True))

    def select(self, rows: Sequence[int]) -> AfterPrompt:
        """That of some rows, in this order; a row may come several times."""
        rows = list(rows)
        return replace(
            self,
            num_tokens=[self.num_tokens[row] for row in rows],
            num_unseen=[self.num_unseen[row] for row in rows],
            logits_BV=self.logits_BV[rows],
            nothing_B0F=None if self.nothing_B0F is None else self.nothing_B0F[rows],
            shifts=None if self.shifts is None else self.shifts[..., rows],
            per_token={name: value[rows] for name, value in self.per_token.items()},
            per_row={name: value[rows] for name, value in self.per_row.items()},
        )

    def continued(self, arguments: Mapping[str, Any], num_new: int) -> dict[str, Any]:
        """The arguments of a forward over the next tokens, as they go on after these prompts."""
        given = {**arguments, **self.fixed, **self.per_row}
        given |= {name: value.expand(-1, num_new, *value.shape[2:]) for name, value in self.per_token.items()}
        if self.shifts is not None and "position_ids" in given:
            given["position_ids"] = given["position_ids"] + self.shifts[..., None]
        return given

    def read_rest(
        self,
        lengths: Sequence[int],
        blocks: Sequence[Sequence[int]],
        num_logits: int,
        num_drafts: Sequence[int] | None,
        read: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:
        """A forward of rows of which some have read nothing but their prompt, so that it gives no logits after that.

        Args:
            lengths (`Sequence[int]`): Tokens of each row, before the blocks.
            blocks (`Sequence[Sequence[int]]`):
                The tokens of each row; none where only the logits after the prompt are wanted. Such a row reads a
                filler, if any other has something to read, which has to be taken back as a draft has.
            num_logits (`int`): Of the last positions.
            num_drafts (`Sequence[int]`, *optional*): For each row, how many of its last tokens may be rejected.
            read (`Callable`): The forward; it gets blocks and the arguments after them.
        """
        is_at_end = [length == known for length, known in zip(lengths, self.num_tokens, strict=True)]
        if not any(blocks):
            return self.logits_BV[:, None], self.nothing_B0F
        filled = [block or [FILLER] for block in blocks]
        nums = [num if block else 1 for num, block in zip(num_drafts or [0] * len(blocks), blocks, strict=True)]
        logits_BTV, hidden_BTF = read(filled, min(num_logits, max(map(len, filled))), nums)
        missing = max(num_logits - logits_BTV.shape[1], 0)
        logits_BTV = torch.nn.functional.pad(logits_BTV, (0, 0, missing, 0))
        for row, block in enumerate(blocks):
            if is_at_end[row] and len(block) < num_logits:
                logits_BTV[row, -len(block) - 1] = self.logits_BV[row]
        return logits_BTV, hidden_BTF
