"""What comes back besides the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput


class Provenance(IntEnum):
    """Where a returned token came from."""

    TARGET = 0
    """The target chose it itself."""
    DRAFTED = 1
    """The draft proposed it and the target accepted it."""
    RECOVERED = 2
    """Part of a candidate that recovery chose."""
    REFLECTION = 3
    """Inserted reflection text (returned only with `keep_reflection=True`)."""
    REFUSAL = 4
    """The policy's refusal text."""


@dataclass(frozen=True, slots=True)
class SafeSpecEvent:
    """One flag and the recovery attempt that answered it.

    Attributes:
        position (`int`): Index, among the answer's returned tokens, that the flagged token would have had.
        risk (`float`): Its risk, in [0, 1].
        rolled_back_to (`int`): Returned tokens that were kept.
        num_discarded (`int`): Tokens given up, the flagged one included.
        candidate_risks (`tuple[float, ...]`):
            Highest risk along each candidate; empty if none was sampled. Where the target samples, a candidate ends
            early once it is unsafe or worse than a finished one.
        candidate_log_probs (`tuple[float, ...]`): Their mean log-probability per token under the target, in nats.
        chosen (`int`, *optional*): The candidate that was taken, if any.
        outcome (`str`): `"recovered"`, `"retried"` (no candidate was safe) or `"refused"`.
    """

    position: int
    risk: float
    rolled_back_to: int
    num_discarded: int
    candidate_risks: tuple[float, ...] = ()
    candidate_log_probs: tuple[float, ...] = ()
    chosen: int | None = None
    outcome: str = "refused"


@dataclass(slots=True)
class SafeSpecStatistics:
    """Counts and seconds of one `generate` call, over all its rows.

    Attributes:
        num_rounds (`int`): General Mode rounds.
        num_plain_rounds (`int`): Those of them in which nothing was drafted although there was a drafter.
        num_target_forwards (`int`): Forwards of the target, recovery included.
        num_reread_tokens (`int`):
            Tokens that the target read once more, in forwards that it made anyway: recurrent states go back to where
            a copy of them is, and what was accepted after that is read again. 0 for attention alone.
        num_draft_forwards (`int`): Forwards of the draft model or head.
        num_draft_tokens (`int`): Tokens drafted in General Mode.
        num_accepted_tokens (`int`): Those of them that the target accepted.
        num_flags (`int`): Tokens that were flagged.
        num_recovery_attempts (`int`): Attempts at a safe continuation.
        num_discarded_tokens (`int`): Generated tokens that were rolled back.
        num_new_tokens (`int`): Tokens returned after the prompts.
        target_seconds (`float`): Host time in target forwards. On an accelerator, time to launch them.
        draft_seconds (`float`): Host time in drafting.
        head_seconds (`float`): Host time in pooling and in the safety head.
        measuring_seconds (`float`): Spent on measuring what forwards take here: once on a machine, 0 afterwards.
        num_watch_pauses (`int`): How often speculation was stopped because it took longer than plain steps would have.
    """

    num_rounds: int = 0
    num_plain_rounds: int = 0
    num_target_forwards: int = 0
    num_reread_tokens: int = 0
    num_draft_forwards: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_flags: int = 0
    num_recovery_attempts: int = 0
    num_discarded_tokens: int = 0
    num_new_tokens: int = 0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    head_seconds: float = 0.0
    measuring_seconds: float = 0.0
    num_watch_pauses: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, in [0, 1]; `nan` when nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else float("nan")


@dataclass
class SafeSpecOutput(GenerateDecoderOnlyOutput):
    """Returned by `generate(..., safespec=..., return_dict_in_generate=True)`.

    `scores`, `logits` and `cache`, before transformers 5.24 `past_key_values`, are as there; N is the number of new
    tokens.

    Attributes:
        sequences (`torch.LongTensor` of shape `(batch, prompt + N)`): Prompt and answer.
        risks (`torch.FloatTensor` of shape `(batch, N)`):
            Risk after each token, in [0, 1]; `nan` for inserted text, padding and a last token no forward has read.
        provenance (`torch.LongTensor` of shape `(batch, N)`): A [`Provenance`] per token; -1 for padding.
        events (`list[list[SafeSpecEvent]]`): For each row, what was flagged and what was done.
        finish_reasons (`list[str]`): For each row `"eos"`, `"length"`, `"stop"` or `"safety_refusal"`.
        statistics ([`SafeSpecStatistics`]): Counts and seconds.
    """

    risks: torch.FloatTensor | None = None
    provenance: torch.LongTensor | None = None
    events: list[list[SafeSpecEvent]] | None = None
    finish_reasons: list[str] | None = None
    statistics: SafeSpecStatistics | None = None
