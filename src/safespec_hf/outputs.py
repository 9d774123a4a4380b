"""What comes back besides the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """One flag and what answered it: a recovery attempt, the end of the answer, or nothing.

    Attributes:
        position (`int`): Index, among the answer's returned tokens, that the flagged token would have had, or has.
        risk (`float`): Its risk, in [0, 1].
        rolled_back_to (`int`): Returned tokens that were kept; with `policy="observe"` up to the flagged one itself.
        num_discarded (`int`): Tokens given up, the flagged one included.
        candidate_risks (`tuple[float, ...]`):
            Highest risk along each candidate; empty if none was sampled. Where the target samples, a candidate ends
            early once it is unsafe or worse than a finished one.
        candidate_log_probs (`tuple[float, ...]`): Their mean log-probability per token under the target, in nats.
        chosen (`int`, *optional*):
            The candidate that was taken, if any. None is where a false alarm was over one token: what came before that
            was put back, and `rolled_back_to` is the token's place.
        outcome (`str`):
            `"recovered"`, `"retried"` (no candidate was safe), `"refused"`, `"stopped"`; of a test for a false alarm,
            whose candidates read no reflection, `"dismissed"` or `"confirmed"`; with `policy="observe"` `"observed"`
            (nothing was done).
        num_safe_candidates (`int`): Candidates of which every token is safe.
        num_unsafe_candidates (`int`):
            Those with an unsafe token, or in which no token was possible. The rest ended early while they were safe,
            as a candidate does that the target samples once it can't be chosen any more. None does if the draft
            samples, nor with `candidate_choice="likeliest_safe"` and `safe_margin=0`.
        is_prompt (`bool`):
            Whether the prompt was flagged, before the first token; then nothing is taken back, and if the flag is
            dismissed nothing is taken either: the answer is the one without it.
    """

    position: int
    risk: float
    rolled_back_to: int
    num_discarded: int
    candidate_risks: tuple[float, ...] = ()
    candidate_log_probs: tuple[float, ...] = ()
    chosen: int | None = None
    outcome: str = "refused"
    num_safe_candidates: int = 0
    num_unsafe_candidates: int = 0
    is_prompt: bool = False

    @property
    def num_candidates(self) -> int:
        """Candidates that were sampled: up to K, fewer where `candidates_per_batch` made an early end of it."""
        return len(self.candidate_risks)


@dataclass(frozen=True, slots=True)
class SafeSpecSegment:
    """A segment that the draft proposed to the target, with `verification="segment"`, and what became of it.

    Attributes:
        position (`int`): Index, among the answer's returned tokens, at which it began.
        num_tokens (`int`): Its tokens.
        risk (`float`): The highest along it, in [0, 1]; `nan` if one is unknown.
        quality (`float`): The target's grade for it, in [0, 9]; `nan` if there is none.
        outcome (`str`):
            `"accepted"`; `"rewritten"`, by the target, which found it safe but not good enough; `"flagged"`, for a
            token that is unsafe; or `"dropped"`, because what came before it was flagged or ended the answer.
    """

    position: int
    num_tokens: int
    risk: float
    quality: float
    outcome: str


@dataclass(slots=True)
class SafeSpecStatistics:
    """Counts and seconds of one `generate` call, over all its rows.

    Attributes:
        num_rounds (`int`): General Mode rounds.
        num_plain_rounds (`int`): Those of them in which nothing was drafted although there was a drafter.
        num_target_forwards (`int`): Forwards of the target, recovery included.
        num_reread_tokens (`int`):
            Tokens that the target read once more, in forwards that it made anyway: recurrent states go back to where
            a copy of them is, and what was accepted after that is read again; some models read the whole text again
            where their rotary positions change. 0 for attention alone. Where rows are read one by one,
            a long stretch is read again in a forward of its own.
        num_draft_forwards (`int`): Forwards of the draft model or head.
        num_draft_tokens (`int`): Tokens drafted in General Mode.
        num_accepted_tokens (`int`): Those of them that the target accepted.
        num_flags (`int`): Tokens, and prompts, that were flagged.
        num_recovery_attempts (`int`): Attempts at a safe continuation.
        num_candidates (`int`): Candidates sampled in them.
        num_candidate_batches (`int`): In so many batches.
        num_screened_candidates (`int`): Candidates that a `draft_head` sorted out: the target read the others only.
        num_discarded_tokens (`int`): Generated tokens that were rolled back.
        num_new_tokens (`int`): Tokens returned after the prompts.
        target_seconds (`float`): Host time in target forwards. On an accelerator, time to launch them.
        draft_seconds (`float`): Host time in drafting.
        head_seconds (`float`): Host time in pooling and in the safety head.
        measuring_seconds (`float`): Spent on measuring what forwards take here: once on a machine, 0 afterwards.
        num_watch_pauses (`int`): How often speculation was stopped because it took longer than plain steps would have.
        num_segments (`int`): Segments that the draft proposed, with `verification="segment"`.
        num_screened_segments (`int`): Those of them that the draft drew more than once (`num_draft_segments`).
        num_segments_accepted (`int`): Those of them that were taken whole.
        num_segments_by_target (`int`): Segments that the target wrote or began to write, instead of them or without.
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
    num_candidates: int = 0
    num_candidate_batches: int = 0
    num_screened_candidates: int = 0
    num_discarded_tokens: int = 0
    num_new_tokens: int = 0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    head_seconds: float = 0.0
    measuring_seconds: float = 0.0
    num_watch_pauses: int = 0
    num_segments: int = 0
    num_screened_segments: int = 0
    num_segments_accepted: int = 0
    num_segments_by_target: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, in [0, 1]; `nan` when nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else float("nan")


@dataclass
class SafeSpecOutput(GenerateDecoderOnlyOutput):
    """Returned by `generate(..., safespec=..., return_dict_in_generate=True)`.

    `scores`, `logits`, `attentions`, `hidden_states` and `cache`, before transformers 5.24 `past_key_values`, are as
    there; N is the number of new tokens.

    Attributes:
        sequences (`torch.LongTensor` of shape `(batch, prompt + N)`): Prompt and answer.
        risks (`torch.FloatTensor` of shape `(batch, N)`):
            Risk after each token, in [0, 1]; `nan` for inserted text, padding and a last token no forward has read.
        provenance (`torch.LongTensor` of shape `(batch, N)`): A [`Provenance`] per token; -1 for padding.
        events (`list[list[SafeSpecEvent]]`): For each row, what was flagged and what was done.
        finish_reasons (`list[str]`):
            For each row `"eos"`, `"length"`, `"stop"`, `"safety_refusal"` or, with `policy="stop"`, `"safety_stop"`.
        statistics ([`SafeSpecStatistics`]): Counts and seconds.
        segments (`list[list[SafeSpecSegment]]`, *optional*):
            With `verification="segment"`, for each row what the draft proposed, in that order. What was accepted may
            have been taken back later, by an event.
    """

    risks: torch.FloatTensor | None = None
    provenance: torch.LongTensor | None = None
    events: list[list[SafeSpecEvent]] | None = None
    finish_reasons: list[str] | None = None
    statistics: SafeSpecStatistics | None = None
    segments: list[list[SafeSpecSegment]] | None = None


def carried_risk(outputs: Sequence[SafeSpecOutput], row: int | None = None, *, decay: float = 0.5) -> float:
    """What earlier turns of a conversation were flagged with, for `SafeSpecConfig(carried_risk=)` of the next one.

    Half of the highest flagged risk of the last turn, or of one before it, for which it fades. So a threshold is
    halved at most, and turns in which nothing was flagged carry nothing.

    Args:
        outputs (`Sequence[SafeSpecOutput]`): Of the earlier turns, the oldest first.
        row (`int`, *optional*): Which row of their batches is the conversation. Default: the worst of all.
        decay (`float`, defaults to 0.5): What is left of a risk one turn later, in [0, 1].

    Returns:
        `float`: In [0, 0.5].

    Raises:
        ValueError: If `decay` is out of range, or an output has no events.

    Example:

        >>> import torch
        >>> from safespec_hf import SafeSpecConfig, SafeSpecEvent, SafeSpecOutput, carried_risk
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> flagged = SafeSpecOutput(sequences=ids, events=[[SafeSpecEvent(3, 0.8, 0, 4)]])
        >>> carried_risk([flagged]), carried_risk([flagged, SafeSpecOutput(sequences=ids, events=[[]])])
        (0.4, 0.2)
        >>> policy = SafeSpecConfig(carried_risk=carried_risk([flagged]))
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"`decay` must be in [0, 1], but it is {decay!r}.")
    carried = 0.0
    for output in outputs:
        if output.events is None:
            raise ValueError("An output has no events: it must be that of a guarded call.")
        rows = output.events if row is None else [output.events[row]]
        # an unknown risk counts as the highest
        risks = [1.0 if math.isnan(event.risk) else event.risk for events in rows for event in events]
        carried = max([carried * decay, *(risk / 2 for risk in risks)])
    return carried
