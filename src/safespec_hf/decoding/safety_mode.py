"""Safety Mode: what happens to a row after a flag. Reflect, sample K continuations, keep a safe one, or end there.

An attack makes unsafe continuations likely, not safe ones impossible. If one sampled segment is safe with probability
p, one of K is with probability 1 - (1 - p)^K: the rollback before this and the reflection raise p, sampling raises K.
"""

from __future__ import annotations

import time

import torch

from ..answer.logits import SafeSpecLogitsProcessor
from ..answer.recovery import Choice, batch_sizes, choose, is_harmless, next_step, without_early_ends
from ..answer.rows import Row
from ..drafting.router import DraftRouter
from ..engine.cache import CachedModel
from ..outputs import Provenance
from .candidate_scores import CandidateScores
from .commit import Committer, Flag
from .draft_screen import DraftScreen
from .monitor import RiskMonitor
from .outcome import attempt_event, end_answer, insert_reflection, room_for_candidate
from .plan import Plan
from .sampling import sample_segments


class SafetyMode:
    """Recovers rows of a batch.

    Args:
        target ([`CachedModel`]): The target, rolled back to what was kept.
        drafter ([`DraftRouter`]): Has the draft that samples continuations, if one does.
        plan ([`Plan`]): The call.
        monitor ([`RiskMonitor`]): The plan's.
        commits ([`Committer`]): Adds what is chosen.
    """

    def __init__(
        self,
        target: CachedModel,
        drafter: DraftRouter,
        plan: Plan,
        monitor: RiskMonitor,
        commits: Committer,
    ):
        self.target = target
        self.drafter = drafter
        self.plan = plan
        self.monitor = monitor
        self.commits = commits
        self.statistics = commits.statistics
        self._generators: dict[int, torch.Generator] = {}

    def recover(self, index: int, row: Row, flag: Flag) -> None:
        """Reflects, and tries to find a safe continuation; ends the answer when attempts run out, or are not wanted.

        Args:
            index (`int`): Where the row lies in the target's batch.
            row ([`Row`]): The row, rolled back.
            flag ([`Flag`]): Why.
        """
        policy, room = self.plan.policy, room_for_candidate(row, self.plan)
        if next_step(row.num_recoveries, policy.max_recoveries, room) == "resample":
            if self.plan.tests(row) and self._dismiss(index, row, flag, room):
                return
            if policy.reflection_stays:
                insert_reflection(row, self.plan)
        while next_step(row.num_recoveries, policy.max_recoveries, room) == "resample":
            row.num_recoveries += 1
            self.statistics.num_recovery_attempts += 1
            if self._resample(index, row, flag, room):
                return
        end_answer(row, self.plan, flag)

    def _resample(self, index: int, row: Row, flag: Flag, max_tokens: int) -> bool:
        """One attempt: sample, score, choose. Returns whether a safe continuation was found."""
        plan, tried, choice = self.plan, list[CandidateScores](), Choice(0, 1.0, False)
        for num in batch_sizes(plan.policy.num_candidates, plan.policy.candidates_per_batch):
            scores = CandidateScores(row, self.monitor, plan.risk_threshold, plan.safe_enough)
            scorer = self._sample(index, row, flag, max_tokens, scores, num)
            tried.append(scores)
            choice = choose(scores.worst(), scores.log_probs, plan.risk_threshold, plan.safe_enough)
            if choice.is_safe:
                row.events.append(attempt_event(row, flag, tried, max_tokens, "recovered", choice.candidate))
                self._take(index, row, scores, scorer, choice.candidate)
                return True
        row.events.append(attempt_event(row, flag, tried, max_tokens, "retried"))
        # how a segment begins decides most of it: the next attempt steers away from these beginnings
        firsts = {tokens[0] for scores in tried for tokens in scores.segments if tokens}
        row.flagged_first_tokens.setdefault(flag.kept, set()).update(firsts)
        return False

    def _dismiss(self, index: int, row: Row, flag: Flag, max_tokens: int) -> bool:
        """Tests a flag by candidates without a reflection: if all of them are harmless, it was a false alarm.

        Where what was taken back before the token is harmless as well, that is put back, and the answer goes on from
        there without the token. Else the likeliest candidate is taken, but none that ends the answer before it is as
        long as what was taken back, if there are others. None is where the prompt was flagged: nothing was given up.

        They are the target's own: what another model would say does not tell whether this one is about to do harm.
        """
        limit, tried = self.plan.harmless, list[CandidateScores]()
        self.statistics.num_recovery_attempts += 1
        for num in batch_sizes(self.plan.policy.num_candidates, self.plan.policy.candidates_per_batch):
            scores = CandidateScores(row, self.monitor, self.plan.risk_threshold, limit, all_up_to=limit)
            scorer = self._sample(index, row, flag, max_tokens, scores, num, is_test=True)
            tried.append(scores)
            if not is_harmless(scores.worst(), limit):
                row.events.append(attempt_event(row, flag, tried, max_tokens, "confirmed"))
                return False
        row.num_recoveries += not flag.is_prompt
        if flag.gives_nothing_up:  # but for the flagged token, if there is one
            left = self.commits.mend(row, flag)
            row.events.append(attempt_event(row, left, tried, max_tokens, "dismissed"))
            return True
        log_probs = without_early_ends(scores.log_probs, scores.segments, flag.num_discarded, self.plan.eos_ids)
        choice = choose(scores.worst(), log_probs, self.plan.risk_threshold, limit)
        row.events.append(attempt_event(row, flag, tried, max_tokens, "dismissed", choice.candidate))
        self._take(index, row, scores, scorer, choice.candidate)
        return True

    def _take(self, index: int, row: Row, scores: CandidateScores, scorer: CachedModel, candidate: int) -> None:
        """The row goes on with a candidate."""
        start = self.target.lengths[index]
        # committed like any other tokens: an end token, a criterion or the length limit may end the answer in it
        reason = self.commits.append(row, [(token, Provenance.RECOVERED) for token in scores.segments[candidate]])
        risks, states_TF = scores.risks[candidate], scores.states(candidate)
        pending = self.commits.settle(row, risks[: row.num_unscored()], scores.pooled(candidate), reason)
        self.commits.decide([row], [pending])
        # the target has read all candidates; the row goes on with the states of the chosen one
        self.target.replace(index, scorer, candidate)
        # those of the safety head's layers come first, and then those of the draft head's
        if states_TF.shape[1] > self.monitor.num_tapped:
            self.drafter.observe(index, start, states_TF[:, self.monitor.num_tapped :])
        lengths = list(self.target.lengths)
        lengths[index] = row.num_context - 1
        self.target.keep(lengths)
        self.drafter.keep(lengths)

    def _sample(
        self,
        index: int,
        row: Row,
        flag: Flag,
        max_tokens: int,
        scores: CandidateScores,
        num_candidates: int,
        *,
        is_test: bool = False,
    ) -> CachedModel:
        """Samples candidate segments in one batch, and scores them; returns the target's cache of them.

        A reflection that does not stay is read while they are sampled, and at no other time: what is scored, and what
        the answer goes on from, is what the caller will have.
        """
        start, policy = time.perf_counter(), self.plan.policy
        self._reach(index, row, row.num_context + max_tokens)
        aside = () if is_test or policy.reflection_stays else self.plan.reflection_ids
        is_target = is_test or policy.candidate_source == "target"
        monitor = self.plan.draft_monitor
        num_read = len(aside) + max_tokens + (monitor is not None)  # its last token only to be scored
        draft = None if is_target else self.drafter.sampler(index, row, num_read)
        steer = SafeSpecLogitsProcessor(
            row.visible_ids().shape[1], row.flagged_first_tokens.get(flag.kept, ()), policy.flagged_token_penalty
        )
        screen = None if draft is None or monitor is None else DraftScreen(row, monitor)
        layers = None if screen is None else screen.monitor.layers
        sampler = (self.target if draft is None else draft).fork(index, 1, layers)
        sampler.reach(0, row.num_context + len(aside) + max_tokens)
        segments, scorer = sample_segments(
            sampler,
            row,
            num_segments=num_candidates,
            max_tokens=max_tokens,
            vocab_size=self.drafter.vocab_size,
            end_ids=self.plan.eos_ids,
            steer=steer,
            temperature=policy.test_temperature if is_test else policy.recovery_temperature,
            generator=self.generator(row),
            # the target's own forwards give the risks on the way, so hopeless segments end early
            judge=scores.watch if draft is None else None if screen is None else screen.watch,
            aside=aside,
        )
        if draft is not None:
            # it samples K segments for less than the target would take for one
            self.statistics.draft_seconds += time.perf_counter() - start
        if screen is not None:
            segments = [segments[k] for k in screen.promising(segments)]
            self.statistics.num_screened_candidates += num_candidates - len(segments)
        if draft is not None or aside:
            scorer = self.target.fork(index, len(segments))
            waiting = row.context(scorer.lengths[0])
            nums = [len(tokens) for tokens in segments]
            output = scorer.forward([waiting + tokens for tokens in segments], 1 + max(nums), num_drafts=nums)
            scores.read(segments, len(waiting), output)
        self.statistics.head_seconds += scores.seconds
        self.statistics.num_candidates += num_candidates
        self.statistics.num_candidate_batches += 1
        return scorer

    def _reach(self, index: int, row: Row, end: int) -> None:
        """Prepares the target for candidates up to there: what it has to read again is read once, not for each."""
        if self.target.reach(index, end):
            reader = self.target.fork(index, 1)
            reader.forward([row.context(0)[:-1]], 1)
            self.target.replace(index, reader, 0)

    def generator(self, row: Row) -> torch.Generator:
        """Each row has its own, so that what is sampled for it in a batch is what would be sampled for it alone."""
        if row.index not in self._generators:
            self._generators[row.index] = torch.Generator(row.device).manual_seed(self.plan.seeds[row.index])
        return self._generators[row.index]
