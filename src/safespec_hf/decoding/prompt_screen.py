"""Scores the prompt itself, in the forward that reads it: a request can be what is wrong, before anything is said."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..answer.rows import Row
from .commit import Committer, Flag
from .plan import Plan


class PromptScreen:
    """Flags the prompts of a batch in its first round, by the hidden states of the last token of each.

    Args:
        plan ([`Plan`]): The call.
        commits ([`Committer`]): Makes flags.
    """

    def __init__(self, plan: Plan, commits: Committer):
        self.plan = plan
        self.commits = commits
        self._is_wanted = plan.screens_prompts
        self._read_before_BF: Tensor | None = None
        self._risks: list[float] = []

    def observe(self, states_BLF: Tensor | None, is_real_BL: Tensor) -> None:
        """Takes the states of prompts that are more than tokens, which are read before the first round.

        Args:
            states_BLF (`torch.Tensor` of shape `(B, L, F)`, *optional*): Those that the head reads.
            is_real_BL (`torch.Tensor` of shape `(B, L)`): `False` for padding.
        """
        if self._is_wanted and states_BLF is not None:
            num_places = is_real_BL.shape[1]
            last_B = num_places - 1 - is_real_BL.flip(1).int().argmax(dim=1)
            last_B = (last_B - num_places + states_BLF.shape[1]).to(states_BLF.device)
            self._read_before_BF = states_BLF[torch.arange(len(last_B), device=last_B.device), last_B]

    def ask(self, states_BTF: Tensor | None, num_after: Sequence[int]) -> list[Tensor]:
        """The risks of the prompts, on the device; nothing once they are known, or where they are not wanted.

        Args:
            states_BTF (`torch.Tensor` of shape `(B, T, F)`, *optional*): Of the first round, aligned to the right.
            num_after (`Sequence[int]`): Of each row, the tokens that were read after its prompt.
        """
        if not self._is_wanted or states_BTF is None or self.plan.monitor is None:
            return []
        self._is_wanted, states_BF = False, self._read_before_BF
        if states_BF is None:
            pairs = zip(states_BTF, num_after, strict=True)
            states_BF = torch.stack([states_TF[len(states_TF) - 1 - num] for states_TF, num in pairs])
        self._read_before_BF = None
        return [self.plan.monitor.head.prompt_risk(states_BF)]

    def take(self, risks: Sequence[Tensor]) -> None:
        """What [`ask`] gave, on the host."""
        self._risks = [risk for risks_B in risks for risk in risks_B.tolist()]

    def flags(self, rows: Sequence[Row]) -> list[Flag | None]:
        """Of each row the flag of its prompt, once."""
        assert not self._is_wanted, "no prompt may pass without a risk"
        if not self._risks:
            return [None] * len(rows)
        risks, self._risks = self._risks, []
        return [self.commits.flag_prompt(*pair) for pair in zip(rows, risks, strict=True)]
