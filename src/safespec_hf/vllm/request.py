"""One guarded answer, as a machine that needs no engine: it says what to submit, takes what comes back, and decides.

The engine may be called by whatever loop there is, in this thread or in another. It goes round by round:

    submissions = answer.begin()
    while submissions:
        ...run them all, and answer.feed(key, tokens) whatever comes...
        submissions = answer.advance(records)  # of those keys, from the worker, when all have ended
    answer.result()

In General Mode a round is one submission, in a recovery K of them. A token is known to be safe when the engine has
read it and went on: after a token that it flagged, the worker lets nothing but the reserved token through. So what
`take_final` gives can be shown at once, while risks come at the end of a round and are checked once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..answer.recovery import Choice, batch_sizes, choose, is_harmless, next_step, without_early_ends
from ..answer.rows import Row
from ..answer.transcript import INSERTED
from ..decoding.candidate_scores import worst_risk
from ..decoding.commit import Committer, Flag, Pending
from ..decoding.outcome import attempt_event, end_answer, insert_reflection, room_for_candidate
from ..decoding.plan import Plan
from ..outputs import Provenance, SafeSpecStatistics
from .rounds import Candidates, GuardedResult, Recovery, Submission, guard_order, risks_of, why_untrusted
from .sampling import Sampling, shifted_seed
from .spec import ARGUMENT, LOST_STATE, CandidateOrder, RiskRecord

MAX_REREADS = 2
"""Rounds in a row that may read the answer again because the worker had lost its state, before it is refused."""


class GuardedRequest:
    """One answer. Made by [`Guard.request`].

    Args:
        key (`str`): Unique as long as the engine lives; the keys of submissions begin with it.
        plan ([`Plan`]): Everything that was decided before; its `monitor` holds the head.
        row ([`Row`]): The empty answer.
        sampling ([`Sampling`]): How it is sampled.
        reserved_id (`int`): The token that stops what was flagged.
        secret (`str`): The engine's.

    Attributes:
        key (`str`): As given. `safespec_release(key)` frees all that the worker keeps for this answer.
        failure (`str`, *optional*): Why it could not be guarded.
    """

    def __init__(self, key: str, *, plan: Plan, row: Row, sampling: Sampling, reserved_id: int, secret: str):
        self.key = key
        self.plan = plan
        self.row = row
        self.sampling = sampling
        self.reserved_id = reserved_id
        self.secret = secret
        self.statistics = SafeSpecStatistics()
        self.failure: str | None = None
        self._commits = Committer(plan, self.statistics, [row])
        self._recovery: Recovery | None = None
        self._running: dict[str, int] = {}  # candidate's number, or -1
        self._num_submitted = 0
        self._num_rereads = 0
        self._num_before = 0  # answer tokens that were there when the round began
        self._is_forced = False  # the reserved token came

    @property
    def is_finished(self) -> bool:
        """Whether the answer has come to its end, and its risks have been checked."""
        return self.row.finish_reason is not None and not self._running

    def begin(self) -> list[Submission]:
        """The first round."""
        return self._go_on()

    def feed(self, key: str, tokens: Sequence[int], log_probs: Sequence[float] | None = None) -> bool:
        """Takes new tokens of a submission.

        Args:
            key (`str`): The submission's.
            tokens (`Sequence[int]`): All that came since the last call.
            log_probs (`Sequence[float]`, *optional*):
                Where the submission asked for them: theirs, or those of its prompt, `nan` where one is not known.

        Returns:
            `bool`: Whether the engine need not go on with it: the answer has ended by our own rules. Abort it then.
        """
        number = self._running[key]
        if number >= 0:
            assert self._recovery is not None
            self._recovery.feed(number, tokens, log_probs or [], self.reserved_id)
            return False
        for token in tokens:
            if self._is_forced or self.row.finish_reason is not None:
                break
            if token == self.reserved_id:
                self._is_forced = True
            else:
                self._add(token)
        return self.row.finish_reason is not None

    def advance(self, records: Mapping[str, RiskRecord]) -> list[Submission]:
        """Decides about a round whose submissions have all ended.

        Args:
            records (`Mapping[str, RiskRecord]`):
                By key, what the worker knows of them. One that is missing counts as a failure: the answer is refused.

        Returns:
            `list[Submission]`: The next round; none when the answer is finished.
        """
        running, self._running = self._running, {}
        if self._recovery is not None:
            return self._judge(self._recovery, running, records)
        (key,) = running
        record = records.get(key)
        failure = "the worker knows nothing of it" if record is None else record.failure
        risk = None if record is None else record.prompt_risk
        if risk is not None and (flag := self._commits.flag_prompt(self.row, risk)) is not None:
            self._reopen()
            return self._recover(flag)
        flagged = None if record is None else self._note(record)
        if flagged is not None:
            self._reopen()
            return self._recover(self._commits.roll_back(self.row, flagged, self.row.risks[flagged]))
        if failure == LOST_STATE and self._num_rereads < MAX_REREADS:
            self._num_rereads += 1
            self._reopen()
            return self._go_on(is_reread=True)
        if failure is None:
            failure = why_untrusted(self.row, self._num_before, self._is_forced)
        if failure is not None:
            return self._fail(failure)
        self._num_rereads = 0
        self._commits.report()
        return []

    def take_final(self) -> list[int]:
        """Visible tokens that nothing can take back any more, and that were not given before."""
        row = self.row
        end = len(row.tokens) if self.is_finished else row.num_final
        indices = row.visible(row.num_streamed, end)
        row.num_streamed = max(row.num_streamed, end)
        return [row.tokens[index] for index in indices]

    def abandon(self, reason: str) -> None:
        """Ends the answer with the refusal: the engine is gone, or a submission of it came to no proper end."""
        self._running = {}
        self._fail(reason)

    def result(self) -> GuardedResult:
        """The finished answer."""
        assert self.is_finished, "the answer goes on"
        row, visible = self.row, self.row.visible()
        self.statistics.num_new_tokens = row.num_visible
        return GuardedResult(
            token_ids=[row.tokens[index] for index in visible],
            risks=[row.risks[index] for index in visible],
            provenance=[row.origins[index] for index in visible],
            events=row.events,
            finish_reason=row.finish_reason or "",
            statistics=self.statistics,
            failure=self.failure,
        )

    def _position(self, index: int) -> int:
        return len(self.row.prompt) + index

    def _add(self, token: int) -> None:
        """A token of General Mode: that it came says that those before it are safe."""
        row, num_waiting = self.row, self.row.num_unscored()
        reason = self._commits.append(row, [(token, Provenance.TARGET)])
        row.settle([math.nan] * num_waiting, torch.empty(num_waiting, 0))  # the risks follow
        self._commits.decide([row], [Pending(reason, None)])

    def _note(self, record: RiskRecord) -> int | None:
        """Writes down the risks of a round; gives the first token that is flagged, if any."""
        row, first_flagged = self.row, None
        for index in range(self._num_before, len(row.tokens)):
            position, token = self._position(index), row.tokens[index]
            if row.origins[index] in INSERTED or not record.was_read(position, token):
                continue
            row.risks[index] = record.risk(position, token)
            # not "risk >= threshold": a nan must never pass for safe
            is_unsafe = not row.risks[index] < self.plan.risk_threshold
            if is_unsafe and not self.plan.observes and first_flagged is None:
                first_flagged = index
        return first_flagged

    def _reopen(self) -> None:
        """A round had an end that the answer does not have."""
        self.row.finish_reason = self.row.closing = None

    def _fail(self, failure: str) -> list[Submission]:
        """Fails closed: nothing that is not final is believed any more."""
        row, self.failure, self._recovery = self.row, failure, None
        self._reopen()
        num_discarded = row.num_scored() - row.num_scored(row.num_final)
        position = len(row.visible(0, row.num_final))
        end_answer(row, self.plan, Flag(position, math.nan, row.num_final, num_discarded))
        return []

    def _recover(self, flag: Flag) -> list[Submission]:
        """Begins Safety Mode, where the row has been rolled back."""
        recovery = self._recovery = Recovery(flag, room_for_candidate(self.row, self.plan))
        recovery.is_test = self._may_try(recovery) and self.plan.tests(self.row)
        return self._attempt(recovery) if recovery.is_test else self._reflect(recovery)

    def _reflect(self, recovery: Recovery) -> list[Submission]:
        """The flag is believed."""
        if self.plan.policy.reflection_stays and self._may_try(recovery):
            insert_reflection(self.row, self.plan)
        return self._attempt(recovery)

    def _may_try(self, recovery: Recovery) -> bool:
        most = self.plan.policy.max_recoveries
        return next_step(self.row.num_recoveries, most, recovery.room) == "resample"

    def _attempt(self, recovery: Recovery) -> list[Submission]:
        """Another attempt, or the end of the answer."""
        if not self._may_try(recovery):
            end_answer(self.row, self.plan, recovery.flag)
            self._recovery = None
            return []
        self.row.num_recoveries += not recovery.is_test
        self.statistics.num_recovery_attempts += 1
        policy = self.plan.policy
        recovery.sizes = batch_sizes(policy.num_candidates, policy.candidates_per_batch)
        recovery.tried = []
        return self._sample(recovery, recovery.sizes.pop(0))

    def _sample(self, recovery: Recovery, num: int, is_reread: bool = False) -> list[Submission]:
        """Candidates that are sampled together.

        A reflection that does not stay is read while they are sampled, and at no other time.
        """
        policy, row = self.plan.policy, self.row
        recovery.tried.append(Candidates(num, self.plan.risk_threshold))
        recovery.is_scoring = False
        if not is_reread:
            self.statistics.num_candidates += num
            self.statistics.num_candidate_batches += 1
        aside = self._aside()
        order = CandidateOrder(
            first=row.num_context + len(aside),
            max_tokens=recovery.room,
            min_tokens=policy.min_segment_tokens,
            end_ids=sorted(self.plan.eos_ids),
            steer_ids=sorted(row.flagged_first_tokens.get(recovery.flag.kept, ())),
            penalty=policy.flagged_token_penalty,
        )
        temperature = policy.test_temperature if recovery.is_test else policy.recovery_temperature
        arguments = self.sampling.arguments | {"temperature": temperature, "logprobs": 0}
        seeds = [shifted_seed(self.plan.seeds[0], self._num_submitted + number) for number in range(num)]
        return [
            self._submit(number, recovery.room + 1, arguments | {"seed": seed}, order, aside, is_reread)
            for number, seed in enumerate(seeds)
        ]

    def _aside(self) -> list[int]:
        """The reflection, where candidates alone read it; those of a test read none."""
        is_test = self._recovery is not None and self._recovery.is_test
        return [] if is_test or self.plan.policy.reflection_stays else self.plan.reflection_ids

    def _score(self, recovery: Recovery, is_reread: bool = False) -> list[Submission]:
        """Has candidates read as the answer would go on with them: after what was kept, and without the reflection."""
        recovery.is_scoring, batch = True, recovery.tried[-1]
        batch.token_log_probs = [[math.nan] * len(tokens) for tokens in batch.segments]
        # vLLM reads a prompt without its prefix cache when log-probabilities are asked for, because none come of
        # tokens after cached ones. Those before candidates are not wanted: mostly they alone are cached, and else
        # candidates are read again without the cache.
        arguments = {"temperature": 0.0, "prompt_logprobs": 0, "skip_reading_prefix_cache": False}
        return [
            self._submit(number, 1, arguments, None, tokens, is_reread)
            for number, tokens in enumerate(batch.segments)
            if tokens
        ]

    def _judge(
        self, recovery: Recovery, running: Mapping[str, int], records: Mapping[str, RiskRecord]
    ) -> list[Submission]:
        """Chooses among candidates that have all ended."""
        batch, plan, num_aside = recovery.tried[-1], self.plan, len(self._aside())
        found = {number: records.get(key) for key, number in running.items()}
        if any(record is not None and record.failure == LOST_STATE for record in found.values()):
            if self._num_rereads >= MAX_REREADS:
                return self._fail(LOST_STATE)
            self._num_rereads += 1
            if recovery.is_scoring:
                return self._score(recovery, is_reread=True)
            recovery.tried.pop()
            return self._sample(recovery, len(running), is_reread=True)
        if recovery.is_scoring and batch.lacks_log_probs() and not self._num_rereads:
            self._num_rereads = 1
            return self._score(recovery, is_reread=True)
        self._num_rereads = 0
        first = self._position(len(self.row.tokens)) + (0 if recovery.is_scoring else num_aside)
        for number, record in found.items():
            batch.risks[number] = risks_of(batch.segments[number], record, first)
        if not recovery.is_scoring:
            batch.watched = [worst_risk(risks) for risks in batch.risks]
            if recovery.is_test and not is_harmless(batch.watched, plan.harmless):
                return self._confirm(recovery)
            # log-probabilities of sampled tokens are those after bans; the likeliest is chosen by the model's own
            takes_likeliest = recovery.is_test and not recovery.flag.gives_nothing_up
            is_read_again = bool(num_aside) or takes_likeliest or plan.policy.candidate_choice == "likeliest_safe"
            if is_read_again and any(batch.segments):
                return self._score(recovery)
        if recovery.is_test:
            return self._dismiss(recovery)
        choice = choose(batch.worst(), batch.log_probs, plan.risk_threshold, plan.safe_enough)
        if choice.is_safe:
            return self._take(recovery, choice)
        if recovery.sizes:
            return self._sample(recovery, recovery.sizes.pop(0))
        self.row.events.append(attempt_event(self.row, recovery.flag, recovery.tried, recovery.room, "retried"))
        # how a segment begins decides most of it: the next attempt steers away from these beginnings
        firsts = {tokens[0] for tried in recovery.tried for tokens in tried.segments if tokens}
        self.row.flagged_first_tokens.setdefault(recovery.flag.kept, set()).update(firsts)
        return self._attempt(recovery)

    def _confirm(self, recovery: Recovery) -> list[Submission]:
        """Some candidate of a test is not harmless."""
        row, recovery.is_test = self.row, False
        row.events.append(attempt_event(row, recovery.flag, recovery.tried, recovery.room, "confirmed"))
        return self._reflect(recovery)

    def _dismiss(self, recovery: Recovery) -> list[Submission]:
        """All candidates of a test are harmless, unless their second reading says otherwise."""
        batch, plan = recovery.tried[-1], self.plan
        if not is_harmless(batch.worst(), plan.harmless):
            return self._confirm(recovery)
        if recovery.sizes:
            return self._sample(recovery, recovery.sizes.pop(0))
        self.row.num_recoveries += not recovery.flag.is_prompt
        if recovery.flag.gives_nothing_up:
            left, self._recovery = self._commits.mend(self.row, recovery.flag), None
            self.row.events.append(attempt_event(self.row, left, recovery.tried, recovery.room, "dismissed"))
            return self._go_on()
        num = recovery.flag.num_discarded
        log_probs = without_early_ends(batch.log_probs, batch.segments, num, plan.eos_ids)
        return self._take(recovery, choose(batch.worst(), log_probs, plan.risk_threshold, plan.harmless))

    def _take(self, recovery: Recovery, choice: Choice) -> list[Submission]:
        """The answer goes on with a candidate."""
        row, batch, number = self.row, recovery.tried[-1], choice.candidate
        outcome = "dismissed" if recovery.is_test else "recovered"
        row.events.append(attempt_event(row, recovery.flag, recovery.tried, recovery.room, outcome, number))
        self._recovery = None
        reason = self._commits.append(row, [(token, Provenance.RECOVERED) for token in batch.segments[number]])
        num_new = row.num_unscored()
        pending = self._commits.settle(row, batch.risks[number][:num_new], torch.empty(num_new, 0), reason)
        self._commits.decide([row], [pending])
        return [] if row.finish_reason is not None else self._go_on()

    def _go_on(self, is_reread: bool = False) -> list[Submission]:
        """General Mode: the answer goes on until it ends or something is flagged."""
        row = self.row
        # what waits for its risk is read, and noted, in the new round
        self._num_before, self._is_forced = row.num_settled, False
        arguments = dict(self.sampling.arguments)
        if self.sampling.seed is not None and not self.sampling.is_greedy:
            arguments["seed"] = shifted_seed(self.sampling.seed, self._num_submitted)
        # one token more than there is room for: that it comes tells that the last one is safe
        room = min(row.room, self.plan.max_context - row.num_context)
        return [self._submit(-1, 1 + max(room, 0), arguments, None, [], is_reread)]

    def _submit(
        self,
        number: int,
        max_tokens: int,
        arguments: dict[str, Any],
        order: CandidateOrder | None,
        more: Sequence[int],
        is_reread: bool,
    ) -> Submission:
        """A submission whose prompt is all there is, and `more`; before a candidate that is a reflection."""
        key = f"{self.key}-{self._num_submitted}"
        self._num_submitted += 1
        self._running[key] = number
        row = self.row
        guard = guard_order(key, self.key, self.secret, row, self.plan, order, more)
        # an end token that is to be scored must be read: then the worker, or `feed`, ends what comes after it
        reads_ends = order is not None or self.plan.policy.score_last_token is True
        params = arguments | {
            "max_tokens": max_tokens,
            "stop_token_ids": [self.reserved_id, *([] if reads_ends else sorted(self.plan.eos_ids))],
            "ignore_eos": True,
            "detokenize": False,
            "extra_args": {ARGUMENT: guard.to_text()},
        }
        if is_reread:
            params["skip_reading_prefix_cache"] = True
        return Submission(key, [*row.prompt, *row.tokens, *more], params)
