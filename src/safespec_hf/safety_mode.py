"""Safety Mode: what happens to a row after a flag. Reflect, sample K continuations, keep the safest, or refuse."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import CachedModel
from .candidates import SafeSpecCandidateGenerator, sample_segments
from .commit import Committer, Flag
from .logits import SafeSpecLogitsProcessor
from .monitor import RiskMonitor
from .outputs import Provenance, SafeSpecEvent
from .plan import Plan
from .recovery import choose, next_step
from .rows import Row
from .tap import split_tap
from .verification import mean_log_prob


class SafetyMode:
    """Recovers rows of a batch.

    Args:
        target ([`CachedModel`]): The target, rolled back to what was kept.
        candidates ([`SafeSpecCandidateGenerator`]): Has the draft that samples continuations, if one does.
        plan ([`Plan`]): The call.
        monitor ([`RiskMonitor`]): The plan's.
        commits ([`Committer`]): Adds what is chosen.
    """

    def __init__(
        self,
        target: CachedModel,
        candidates: SafeSpecCandidateGenerator,
        plan: Plan,
        monitor: RiskMonitor,
        commits: Committer,
    ):
        self.target = target
        self.candidates = candidates
        self.plan = plan
        self.monitor = monitor
        self.commits = commits
        self.statistics = commits.statistics
        self._generators: dict[int, torch.Generator] = {}

    def recover(self, index: int, row: Row, flag: Flag) -> None:
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
        risk_states_BTF, draft_states_BTF = split_tap(
            output.hidden_BTF, len(self.monitor.layers), len(self.target.layers)
        )
        assert risk_states_BTF is not None
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
        reason = self.commits.append(row, [(token, Provenance.RECOVERED) for token in segments[choice.candidate]])
        num_added = row.num_unscored()
        self.commits.settle(row, risks[choice.candidate][:num_added], pooled[choice.candidate], reason)
        self.target.replace(index, scorer, choice.candidate)
        if draft_states_BTF is not None:
            width = len(blocks[choice.candidate])
            self.candidates.observe(index, start, draft_states_BTF[choice.candidate, -width:])
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
        self, row: Row, segments: Sequence[Sequence[int]], hidden_BTF: Tensor
    ) -> tuple[list[list[float]], list[Tensor]]:
        start = time.perf_counter()
        pairs = zip(segments, hidden_BTF, strict=True)
        pooled = [self.monitor.pool(row, tokens, hidden_TF) for tokens, hidden_TF in pairs]
        values = iter(self.monitor.risks(pooled).tolist())
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
