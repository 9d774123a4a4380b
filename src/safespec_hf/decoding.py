"""The decoding loop: draft, score, verify, commit, or recover. It alone calls models and owns caches.

One round of General Mode is ONE forward of the target. Its logits verify the draft, its hidden states give the risk of
every position. A row whose risk reaches the threshold goes through Safety Mode and comes back. Rows are independent:
each has its own acceptance, segments, rollbacks and end.

Method: SafeSpec, Xu et al., arXiv 2606.19755. This is an independent implementation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .cache import CachedModel
from .candidates import SafeSpecCandidateGenerator, sample_segments
from .drafters import Proposal
from .logits import SafeSpecLogitsProcessor, process_rows
from .outputs import Provenance, SafeSpecEvent, SafeSpecOutput, SafeSpecStatistics
from .plan import Plan
from .recovery import choose, next_step
from .rows import Row, pad_rows
from .verification import Verification, mean_log_prob, verify_greedy, verify_sampled


class Flag(NamedTuple):
    """What was taken back for an unsafe token; the fields are those of [`SafeSpecEvent`]."""

    position: int
    risk: float
    kept: int
    num_discarded: int


class Scored(NamedTuple):
    """A row's share of a round, on the host; pooled states stay on the device."""

    num_accepted: int
    next_token: int
    risks: list[float]
    pooled_TF: Tensor | None


class Decoder:
    """Generates a batch of answers.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        rows (`list[Row]`): The batch, empty answers.
        candidates ([`SafeSpecCandidateGenerator`]): Drafts for it.
        plan ([`Plan`]): The call.
        streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*): Gets tokens once final.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[Row],
        candidates: SafeSpecCandidateGenerator,
        plan: Plan,
        streamer: BaseStreamer | None = None,
    ):
        risk_layers = [] if plan.monitor is None else plan.monitor.layers
        self.target = CachedModel(model, len(rows), [*risk_layers, *candidates.layers])
        # of the tapped states, the first ones are the safety head's and the others the draft head's
        self._draft_share = len(candidates.layers) / max(len(self.target.layers), 1)
        self.rows = rows
        self.live = list(rows)
        self.candidates = candidates
        self.plan = plan
        self.streamer = streamer
        self.statistics = SafeSpecStatistics()
        self._generators: dict[int, torch.Generator] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Runs until every row has finished."""
        try:
            while self.live:
                self._round()
        finally:
            self._leave_consistent()

    def _round(self) -> None:
        proposal = self._draft()
        blocks = [
            row.context(length) + drafts
            for row, length, drafts in zip(self.live, self.target.lengths, proposal.drafts, strict=True)
        ]
        num_logits = 1 + max(len(drafts) for drafts in proposal.drafts)
        starts = list(self.target.lengths)
        output = self.target.forward(blocks, num_logits)
        risk_states_BTF, draft_states_BTF = self._split(output.hidden_BTF)
        if draft_states_BTF is not None:
            self.candidates.observe(starts, blocks, draft_states_BTF)
        verification = self._verify(proposal, output.logits_BTV)
        scored = self._score(proposal, verification, risk_states_BTF)
        triples = zip(self.live, proposal.drafts, scored, strict=True)
        flags = [self._commit(row, drafts, result) for row, drafts, result in triples]
        self.candidates.record([result.num_accepted for result in scored])
        self._roll_back_caches()
        for index, (row, flag) in enumerate(zip(self.live, flags, strict=True)):
            if flag is not None:
                self._recover(index, row, flag)
        self.statistics.num_rounds += 1
        self._stream()
        self._drop_finished()

    def _draft(self) -> Proposal:
        start, most = time.perf_counter(), self.plan.num_draft_tokens
        # the target adds a token of its own, so the last one allowed is never worth drafting
        limits = [
            0 if row.closing else max(min(most, row.room - 1, self.plan.max_context - row.num_context), 0)
            for row in self.live
        ]
        proposal = self.candidates.draft(self.live, limits)
        self.statistics.draft_seconds += time.perf_counter() - start
        return proposal

    def _split(self, hidden_BTF: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The safety head's part of the tapped states, and the draft head's."""
        if hidden_BTF is None or self._draft_share == 0:
            return hidden_BTF, None
        num_own = round(hidden_BTF.shape[-1] * (1 - self._draft_share))
        return hidden_BTF[..., :num_own], hidden_BTF[..., num_own:]

    def _verify(self, proposal: Proposal, logits_BTV: Tensor) -> Verification:
        device, num_positions = logits_BTV.device, logits_BTV.shape[1]
        padded = [[0] * (num_positions - 1 - len(drafts)) + drafts for drafts in proposal.drafts]
        drafts_BG = torch.tensor(padded, dtype=torch.long).view(len(padded), -1).to(device, non_blocking=True)
        num_drafts_B = torch.tensor([len(drafts) for drafts in proposal.drafts]).to(device, non_blocking=True)
        scores_BTV = self._process(proposal.drafts, logits_BTV)
        if not self.plan.do_sample:
            return verify_greedy(scores_BTV, drafts_BG, num_drafts_B)
        probs = None if proposal.probs_BGV is None else proposal.probs_BGV.to(device)
        return verify_sampled(scores_BTV.float(), drafts_BG, num_drafts_B, probs)

    def _process(self, drafts: Sequence[Sequence[int]], logits_BTV: Tensor) -> Tensor:
        """The caller's processors, once per position; rows are aligned to the right."""
        if not self.live[0].processors:
            return logits_BTV
        num_positions = logits_BTV.shape[1]
        columns = []
        for position in range(num_positions):
            extras = [tokens[: max(position - (num_positions - 1 - len(tokens)), 0)] for tokens in drafts]
            columns.append(process_rows(self.live, extras, logits_BTV[:, position]))
        return torch.stack(columns, dim=1)

    def _score(self, proposal: Proposal, verified: Verification, hidden_BTF: Tensor | None) -> list[Scored]:
        """Risks of all tokens that wait for one, drafts included, and the round's only transfer to the host."""
        start = time.perf_counter()
        parts = [verified.num_accepted_B, verified.next_token_B]
        pooled: list[Tensor] = []
        if self.plan.monitor is not None and hidden_BTF is not None:
            triples = zip(self.live, proposal.drafts, hidden_BTF, strict=True)
            pooled = [self.plan.monitor.pool(row, drafts, hidden_TF) for row, drafts, hidden_TF in triples]
            parts.append(self.plan.monitor.risks(pooled))
        device = verified.next_token_B.device  # float32 holds every token id below 2**24
        values = iter(torch.cat([part.float().to(device) for part in parts]).tolist())
        num_accepted, next_tokens = [[int(next(values)) for _ in self.live] for _ in range(2)]
        risks = [[next(values) for _ in states] for states in pooled] or [[] for _ in self.live]
        self.statistics.head_seconds += time.perf_counter() - start
        states: Sequence[Tensor | None] = pooled or [None for _ in self.live]
        return [Scored(*fields) for fields in zip(num_accepted, next_tokens, risks, states, strict=True)]

    def _commit(self, row: Row, drafts: Sequence[int], scored: Scored) -> Flag | None:
        """Adds a row's verified tokens up to its end; takes back an unsafe one with its segment."""
        self.statistics.num_draft_tokens += len(drafts)
        self.statistics.num_accepted_tokens += scored.num_accepted
        num_waiting, reason = row.num_unscored(), row.closing
        new = [(token, Provenance.DRAFTED) for token in drafts[: scored.num_accepted]]
        if reason is None:
            reason = self._append(row, [*new, (scored.next_token, Provenance.TARGET)])
        num_read = min(num_waiting + len(drafts[: scored.num_accepted]), row.num_unscored())
        return self._settle(row, scored.risks[:num_read], scored.pooled_TF, reason)

    def _append(self, row: Row, tokens: Sequence[tuple[int, Provenance]]) -> str | None:
        """Adds tokens until one ends the answer; returns why it ended."""
        for token, origin in tokens:
            row.append(token, origin)
            if token in self.plan.eos_ids:
                return "eos"
            # hidden text uses up context as well, which `max_length` does not know
            if row.room <= 0 or (row.has_hidden and row.num_context > self.plan.max_context):
                return "length"
            if self.plan.criteria and bool(self.plan.criteria(row.visible_ids(), None).all()):
                return "stop"
        return None

    def _settle(self, row: Row, risks: Sequence[float], pooled_TF: Tensor | None, reason: str | None) -> Flag | None:
        """Records risks; on an unsafe one takes tokens back, otherwise ends the answer if there is a `reason`."""
        # not "risk >= threshold": a nan must never pass for safe
        unsafe = [index for index, risk in enumerate(risks) if not risk < self.plan.risk_threshold]
        num_safe = unsafe[0] if unsafe else len(risks)
        if pooled_TF is not None:
            row.settle(risks[:num_safe], pooled_TF[:num_safe])
        elif self.plan.monitor is None:
            row.num_settled = len(row.tokens)
        if unsafe:
            return self._take_back(row, row.num_settled, risks[num_safe])
        row.finalize()
        # an answer of one token would otherwise come back without any score
        is_wanted = self.plan.policy.score_last_token or (row.num_settled == 0 and reason != "eos")
        needs_score = is_wanted and pooled_TF is not None and row.num_unscored() > 0
        row.closing = reason if needs_score else None
        row.finish_reason = None if needs_score else reason
        return None

    def _take_back(self, row: Row, flagged: int, risk: float) -> Flag:
        position = len(row.visible(0, flagged))
        kept, num_discarded = row.rollback(flagged)
        row.closing = None
        self.statistics.num_flags += 1
        self.statistics.num_discarded_tokens += num_discarded
        return Flag(position, risk, kept, num_discarded)

    def _roll_back_caches(self) -> None:
        """Every cache forgets what was not kept; the last token of a row always waits for the next forward."""
        lengths = [row.num_context - 1 for row in self.live]
        self.target.keep(lengths)
        self.candidates.keep(lengths)

    def _recover(self, index: int, row: Row, flag: Flag) -> None:
        """Safety Mode: reflect, sample K continuations, keep the safest; refuse when attempts run out."""
        policy, reflection_ids = self.plan.policy, self.plan.reflection_ids
        num_shown = len(reflection_ids) if policy.keep_reflection else 0
        room = min(
            policy.max_segment_tokens,
            row.room - num_shown,
            self.plan.max_context - row.num_context - len(reflection_ids),
        )
        if next_step(row.num_recoveries, policy.max_recoveries, room) == "resample":
            for token in reflection_ids:
                row.append(token, Provenance.REFLECTION)
        while next_step(row.num_recoveries, policy.max_recoveries, room) == "resample":
            row.num_recoveries += 1
            self.statistics.num_recovery_attempts += 1
            if self._resample(index, row, flag, room):
                return
        self._refuse(row, flag)

    def _resample(self, index: int, row: Row, flag: Flag, max_tokens: int) -> bool:
        """One attempt. Returns whether a safe continuation was found."""
        segments = self._sample(index, row, flag, max_tokens)
        scorer = self.target.fork(index, len(segments))
        start = scorer.lengths[0]
        blocks = [row.context(start) + tokens for tokens in segments]
        output = scorer.forward(blocks, 1 + max(len(tokens) for tokens in segments))
        risk_states_BTF, draft_states_BTF = self._split(output.hidden_BTF)
        risks, pooled = self._score_segments(row, segments, risk_states_BTF)
        log_probs = [mean_log_prob(logits, tokens) for logits, tokens in zip(output.logits_BTV, segments, strict=True)]
        # not max(): a nan must never pass for safe
        worst = [max(values, key=lambda risk: 2.0 if risk != risk else risk) for values in risks]
        choice = choose(worst, log_probs, self.plan.risk_threshold)
        outcome = "recovered" if choice.is_safe else "retried"
        chosen = choice.candidate if choice.is_safe else None
        self._record(row, flag, outcome, tuple(worst), tuple(log_probs), chosen)
        if not choice.is_safe:
            row.flagged_first_tokens.setdefault(flag.kept, set()).update(tokens[0] for tokens in segments)
            return False
        reason = self._append(row, [(token, Provenance.RECOVERED) for token in segments[choice.candidate]])
        num_added = row.num_unscored()
        self._settle(row, risks[choice.candidate][:num_added], pooled[choice.candidate], reason)
        self.target.replace(index, scorer, choice.candidate)
        if draft_states_BTF is not None:
            best = slice(choice.candidate, choice.candidate + 1)
            self.candidates.observe([start], blocks[best], draft_states_BTF[best], first_row=index)
        lengths = list(self.target.lengths)
        lengths[index] = row.num_context - 1
        self.target.keep(lengths)
        self.candidates.keep(lengths)
        return True

    def _sample(self, index: int, row: Row, flag: Flag, max_tokens: int) -> list[list[int]]:
        """K candidate segments, in one batch that shares the row's cache."""
        start, policy = time.perf_counter(), self.plan.policy
        draft = None if policy.candidate_source == "target" else self.candidates.sampler
        parent = self.target if draft is None else draft
        steer = SafeSpecLogitsProcessor(
            row.visible_ids().shape[1], row.flagged_first_tokens.get(flag.kept, ()), policy.flagged_token_penalty
        )
        segments = sample_segments(
            parent.fork(index, policy.num_candidates),
            row,
            max_tokens=max_tokens,
            vocab_size=self.candidates.vocab_size,
            end_ids=self.plan.eos_ids,
            steer=steer,
            generator=self._generator(row),
        )
        if draft is not None:
            self.statistics.draft_seconds += time.perf_counter() - start
        return segments

    def _generator(self, row: Row) -> torch.Generator:
        """Each row has its own, so that a row recovers in a batch as it would alone."""
        if row.index not in self._generators:
            self._generators[row.index] = torch.Generator(row.device).manual_seed(self.plan.seeds[row.index])
        return self._generators[row.index]

    def _score_segments(
        self, row: Row, segments: Sequence[Sequence[int]], hidden_BTF: Tensor | None
    ) -> tuple[list[list[float]], list[Tensor]]:
        start, monitor = time.perf_counter(), self.plan.monitor
        assert monitor is not None
        assert hidden_BTF is not None
        pairs = zip(segments, hidden_BTF, strict=True)
        pooled = [monitor.pool(row, tokens, hidden_TF) for tokens, hidden_TF in pairs]
        values = iter(monitor.risks(pooled).tolist())
        risks = [[next(values) for _ in tokens] for tokens in segments]
        self.statistics.head_seconds += time.perf_counter() - start
        return risks, pooled

    def _refuse(self, row: Row, flag: Flag) -> None:
        row.truncate(flag.kept)
        for token in (self.plan.separator_ids if row.num_visible else []) + self.plan.refusal_ids:
            if row.room > 0:
                row.append(token, Provenance.REFUSAL)
        row.finish_reason = "safety_refusal"
        self._record(row, flag, "refused")

    def _record(
        self,
        row: Row,
        flag: Flag,
        outcome: str,
        risks: tuple[float, ...] = (),
        log_probs: tuple[float, ...] = (),
        chosen: int | None = None,
    ) -> None:
        kept = len(row.visible(0, flag.kept))
        event = SafeSpecEvent(flag.position, flag.risk, kept, flag.num_discarded, risks, log_probs, chosen, outcome)
        row.events.append(event)

    def _stream(self) -> None:
        if self.streamer is None:
            return
        row = self.rows[0]
        end = row.num_final if row.finish_reason is None else len(row.tokens)
        for index in row.visible(row.num_streamed, end):
            self.streamer.put(torch.tensor([row.tokens[index]]))
        row.num_streamed = max(row.num_streamed, end)
        if row.finish_reason is not None:
            self.streamer.end()

    def _drop_finished(self) -> None:
        left = [index for index, row in enumerate(self.live) if row.finish_reason is None]
        self.live = [self.live[index] for index in left]
        if left:
            self.target.select(left)
            self.candidates.select(left)

    def _leave_consistent(self) -> None:
        """A single row's cache, which the caller may go on with, ends before anything the caller does not see."""
        if len(self.rows) == 1:
            row = self.rows[0]
            hidden = (index for index in range(len(row.tokens)) if not row.is_visible(index))
            self.target.leave(min(len(row.prompt) + next(hidden, len(row.tokens)), row.num_context - 1))
        target = self.target.usage
        self.statistics.num_target_forwards, self.statistics.target_seconds = target.num_forwards, target.seconds
        self.statistics.num_draft_forwards = self.candidates.num_forwards
        self.statistics.num_plain_rounds = self.candidates.num_plain_rounds
        self.statistics.num_new_tokens = sum(row.num_visible for row in self.rows)

    def _is_plain(self, prompt_ids: Tensor) -> bool:
        """Whether the cache has a column per token, so that a later call can go on with it."""
        return len(self.rows) == 1 and len(self.rows[0].prompt) == prompt_ids.shape[1]

    def output(self, prompt_ids: Tensor, pad_token_id: int) -> SafeSpecOutput:
        """The finished batch, padded on the right."""
        tokens, risks, provenance = pad_rows(self.rows, pad_token_id, prompt_ids.device)
        return SafeSpecOutput(
            sequences=cast("torch.LongTensor", torch.cat([prompt_ids, tokens], dim=1)),
            past_key_values=self.target.cache if self._is_plain(prompt_ids) else None,
            risks=cast("torch.FloatTensor", risks),
            provenance=cast("torch.LongTensor", provenance),
            events=[row.events for row in self.rows],
            finish_reasons=[row.finish_reason or "" for row in self.rows],
            statistics=self.statistics,
        )
