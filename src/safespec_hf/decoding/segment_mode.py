"""Segment mode, the paper's own acceptance: the draft writes whole segments, the target judges each in one forward.

In a round a row does one of two things. Either the draft proposes a segment, and the target reads it with the quality
prompt after it: hidden states of the segment give its risks, the logits at the end its grade. Or the target writes a
segment itself, token by token as in token mode, with the draft's words as a guess. Rows of a batch share the forward,
which is as wide as its widest row: so segments wait to be judged while more than half of the rows are being written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..answer.rows import Row
from ..drafting.draft_length import DraftLength, Pace
from ..drafting.drafters import Proposal
from ..engine.transfer import to_host
from ..outputs import Provenance, SafeSpecSegment
from .candidate_scores import worst_risk
from .commit import NOTHING, Flag, Pending
from .loop import Decoder, Reading
from .quality import read_quality
from .redraws import Redraws

MAX_BROKEN = 3
"""Tokens for which a full segment may wait for a character to end."""
UNKNOWN = 0
"""Evidence for a guess: what the draft wrote is not told apart by how sure it was."""


class Turn(NamedTuple):
    """What a row does in a round.

    Attributes:
        tokens (`list[int]`): A segment that the draft proposes, or a guess at what the target will write.
        is_judged (`bool`): Whether they are a segment.
        position (`int`): Visible tokens of the answer before them.
        waits (`bool`): Whether it does neither, and reads its last token only.
    """

    tokens: list[int]
    is_judged: bool
    position: int
    waits: bool = False


class SegmentDecoder(Decoder):
    """Generates a batch of answers, segment by segment. Arguments are those of [`Decoder`]."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.segments: list[list[SafeSpecSegment]] = [[] for _ in self.rows]
        self._writing: dict[int, int] = {}  # of rows, the segment that the target writes or wrote last
        self._guesses: dict[int, list[int]] = {}  # and what it may begin with
        self._pace = Pace(self.drafter.costs)
        self._lengths: dict[int, DraftLength] = {}  # of rows, how many tokens are worth guessing
        self._redraws: Redraws | None = None
        draft_monitor, is_wanted = self.plan.draft_monitor, self.plan.policy.num_draft_segments > 1
        if is_wanted and draft_monitor is not None and self.safety_mode is not None:
            generator, num_before_end = self.safety_mode.generator, self.commits.stopping.num_before_end
            self._redraws = Redraws(self.drafter, self.plan, draft_monitor, generator, num_before_end)

    def _round(self) -> None:
        """One round of the method. The paper's x is a row's context, s a whole segment, P_eval the quality prompt."""
        # a cheap draft writes s; where it must not, can't, or was not good enough, the target has the word
        turns = self._take_turns()
        # ONE forward of the target reads x, s and P_eval: nothing in s sees P_eval, so its states are those without
        readings, qualities = self._judge(turns)
        # safety comes first, in the order of the text: what waited for its risk, then s; and then how good s is
        flags = self._settle(turns, readings)
        for index, turn in enumerate(turns):
            if turn.is_judged:
                flags[index] = self._decide(self.live[index], turn, readings[index], qualities[index], flags[index])
        # P_eval leaves the cache, and s where it was not accepted; else the states of s are the row's
        self._roll_back_caches()
        self._forget_flagged(flags)
        self._recover(flags)
        self.statistics.num_rounds += 1
        self._stream()
        self._drop_finished()

    def _take_turns(self) -> list[Turn]:
        """Segments of the draft, for all rows in one batch; and guesses for those whose target writes."""
        start = time.perf_counter()
        self._pace.costs = self.drafter.costs.of_rows(len(self.live))
        is_writing = [self._target_writes(row) for row in self.live]
        most_write = 2 * sum(is_writing) > len(self.live)
        waits = [most_write and not writes for writes in is_writing]
        triples = list(zip(self.live, is_writing, waits, strict=True))
        limits = [0 if must_wait else self._num_drafts(row, writes) for row, writes, must_wait in triples]
        drafts = self.drafter.write(self.live, limits, self._is_whole)
        if self._redraws is not None:
            drafts = self._screen(self._redraws, drafts, limits, is_writing)
        turns = [
            Turn([], False, row.num_visible, waits=True) if must_wait else self._turn(row, tokens, writes)
            for (row, writes, must_wait), tokens in zip(triples, drafts, strict=True)
        ]
        self.statistics.draft_seconds += time.perf_counter() - start
        return turns

    def _screen(
        self, redraws: Redraws, drafts: list[list[int]], limits: Sequence[int], is_writing: Sequence[bool]
    ) -> list[list[int]]:
        """What the target gets: of some rows another segment, which their draft drew when its own head flagged one."""
        chosen = list(drafts)
        kept = [row.num_context + len(tokens) for row, tokens in zip(self.live, drafts, strict=True)]
        for index, row in enumerate(self.live):
            # the draft's states of a segment that has begun already are gone
            if not drafts[index] or is_writing[index] or row.segments.num_open:
                continue
            is_whole = partial(self._is_whole, index)
            chosen[index], is_redrawn = redraws.choose(index, row, drafts[index], limits[index], is_whole)
            self.statistics.num_screened_segments += is_redrawn
            if chosen[index] != drafts[index]:
                kept[index] = row.num_context - 1
        if chosen != drafts:  # the draft must not go on from what is not proposed
            self.drafter.keep(kept)
        return chosen

    def _turn(self, row: Row, drafts: list[int], is_writing: bool) -> Turn:
        self.statistics.num_draft_tokens += len(drafts)
        if drafts and not is_writing:
            self.statistics.num_segments += 1
            segment = drafts[: self.commits.stopping.num_before_end(row, drafts)]
            return Turn(segment, True, row.num_visible)
        if not is_writing:
            self._let_target_write(row, [])  # the draft has nothing to say here
        if guess := self._guesses.pop(row.index, []):  # it is there already; and what came of it tells about others
            drafts = guess[: max(self._length(row).num_worth_verifying(len(guess)), 1)]
        return Turn(drafts[: self._room_for_guess(row)], False, row.num_visible)

    def _length(self, row: Row) -> DraftLength:
        return self._lengths.setdefault(row.index, DraftLength(self._pace, self.plan.policy.adaptive_drafts))

    def _target_writes(self, row: Row) -> bool:
        if row.closing is not None:
            return True
        if row.segments.index < self.plan.policy.num_target_segments:
            self._let_target_write(row, [])
        return self._writing.get(row.index) == row.segments.index

    def _let_target_write(self, row: Row, guess: list[int]) -> None:
        """The target writes the open segment of a row, to its end."""
        if self._writing.get(row.index) != row.segments.index:
            self._writing[row.index], self._guesses[row.index] = row.segments.index, guess
            self.statistics.num_segments_by_target += 1

    def _num_drafts(self, row: Row, is_writing: bool) -> int:
        """Tokens that the draft may write: to the end of the segment, or some that the target may go on with."""
        if row.closing is not None or self._guesses.get(row.index):
            return 0
        if is_writing:
            most = min(self.plan.num_draft_tokens, self._room_for_guess(row))
            # a draft that was not good enough before is rarely right: it must not cost more than it gives
            return self._length(row).num_worth_making(most)
        num_left = max(self.plan.policy.max_segment_tokens - row.segments.num_open, 0)
        return min(num_left + MAX_BROKEN, self._room(row, len(self.plan.quality_ids)))

    def _room(self, row: Row, num_after: int) -> int:
        """Tokens of the answer that may be read now, with so many others after them."""
        # columns are shared
        num_free = self.plan.max_positions - max(live.num_context for live in self.live)
        return max(min(row.room, min(num_free, self.plan.max_context - row.num_context) - num_after), 0)

    def _room_for_guess(self, row: Row) -> int:
        """The same for what the target may write, which is what plain decoding would."""
        return max(min(self._room(row, 0), self._room_for_drafts(row)), 0)

    def _is_whole(self, index: int, tokens: list[int]) -> bool:
        return tokens[-1] in self.plan.eos_ids or self.live[index].segments.closes_after(tokens)

    def _judge(self, turns: Sequence[Turn]) -> tuple[list[Reading], list[float]]:
        """The round's only forward and only transfer to the host: readings, and the grades of segments."""
        policy, ids = self.plan.policy, self.plan.quality_ids
        # a segment is read as the text that it would make, without the quality prompt
        after = [len(turn.tokens) if turn.is_judged else 0 for turn in turns]
        self._reach([row.num_context + num for row, num in zip(self.live, after, strict=True)])
        blocks = [
            row.context(length) + turn.tokens + ids * turn.is_judged
            for row, length, turn in zip(self.live, self.target.lengths, turns, strict=True)
        ]
        guesses = Proposal([[] if turn.is_judged else turn.tokens for turn in turns])
        # what waits reads its last token again in the next round
        nums = [1 if turn.waits else len(turn.tokens) + len(ids) * turn.is_judged for turn in turns]
        output = self.target.forward(blocks, 1 + max(map(len, guesses.drafts)), num_drafts=nums)
        start = time.perf_counter()
        parts = [read_quality(output.logits_BTV[:, -1], self.plan.digit_ids, policy.quality_reading)]
        if not all(turn.is_judged for turn in turns):
            # rows whose segment is judged have no guess, and what is chosen for them means nothing
            choices = self._verify(guesses, output.logits_BTV)
            assert isinstance(choices, Tensor)
            parts.append(choices)
        pooled = self._pool(turns, output.hidden_BTF)
        if pooled and self.plan.monitor is not None:
            of_prompts = self.screen.ask(output.hidden_BTF, nums)
            risks_N, *parts = to_host([self.plan.monitor.risks(pooled), *parts, *of_prompts])
            self.screen.take([parts.pop() for _ in of_prompts])
            risks = [risks_T.tolist() for risks_T in risks_N.split([len(states_TF) for states_TF in pooled])]
        else:
            parts, risks = to_host(parts), [[] for _ in turns]
        nothing: list[tuple[list[int], int]] = [([], 0) for _ in turns]
        written = self._accepted(guesses, parts[1:]) if len(parts) > 1 else nothing
        states: Sequence[Tensor | None] = pooled or [None for _ in turns]
        triples = zip(written, risks, states, strict=True)
        self.statistics.head_seconds += time.perf_counter() - start
        return [Reading(*pair, risks_T, states_TF) for pair, risks_T, states_TF in triples], parts[0].tolist()

    def _pool(self, turns: Sequence[Turn], hidden_BTF: Tensor | None) -> list[Tensor]:
        """Pooled states of what waits for a risk and of the turns' tokens, without the quality prompt."""
        if self.plan.monitor is None or hidden_BTF is None:
            return []
        ends = [hidden_BTF.shape[1] - len(self.plan.quality_ids) * turn.is_judged for turn in turns]
        return [
            self.plan.monitor.pool(row, turn.tokens, hidden_TF[:end])
            for row, turn, hidden_TF, end in zip(self.live, turns, hidden_BTF, ends, strict=True)
        ]

    def _settle(self, turns: Sequence[Turn], readings: Sequence[Reading]) -> list[Flag | None]:
        """Adds what the target wrote; settles that, and all that waited for its risk before a segment."""
        pending, of_prompts = [], self.screen.flags(self.live)
        for row, turn, reading, flag in zip(self.live, turns, readings, of_prompts, strict=True):
            if flag is not None:  # nothing is said yet
                pending.append(NOTHING)
                continue
            num_read, reason = row.num_unscored(), None
            if not (turn.is_judged or turn.waits):
                num_read += len(reading.path)
                reason = self.commits.append(row, self._written(row, turn.tokens, reading))
            num_read = min(num_read, row.num_unscored())
            pooled_TF = None if reading.pooled_TF is None else reading.pooled_TF[:num_read]
            pending.append(self.commits.settle(row, reading.risks[:num_read], pooled_TF, reason))
        flags = self.commits.decide(self.live, pending)
        return [of_prompt or flag for of_prompt, flag in zip(of_prompts, flags, strict=True)]

    def _written(self, row: Row, guess: list[int], reading: Reading) -> list[tuple[int, Provenance]]:
        """What of the guess stands, and the target's own token after it, unless that begins another segment."""
        tokens = [(guess[index], Provenance.DRAFTED) for index in reading.path]
        self.statistics.num_accepted_tokens += len(tokens)
        self._length(row).record([UNKNOWN] * len(guess), range(len(tokens)))
        is_whole = bool(tokens) and row.segments.closes_after(guess[: len(tokens)])
        if not is_whole:
            tokens.append((reading.next_token, Provenance.TARGET))
        if self.shares:
            self.shares[row.index].use(len(tokens))
        return tokens

    def _decide(self, row: Row, turn: Turn, reading: Reading, quality: float, flag: Flag | None) -> Flag | None:
        """What becomes of a segment. Returns the row's flag, be it the segment's or one before it."""
        plan, risk = self.plan, worst_risk(reading.risks[-len(turn.tokens) :])
        if flag is not None or row.finish_reason is not None:
            outcome = "dropped"
        elif plan.monitor is not None and not plan.observes and not risk < plan.risk_threshold:
            outcome, unsafe_risk = "flagged", self._add(row, turn.tokens, reading).unsafe_risk
            assert unsafe_risk is not None
            flag = self.commits.roll_back(row, row.num_settled, unsafe_risk)
        elif not quality >= plan.policy.quality_threshold:  # a grade that is no number must not pass for a good one
            outcome = "rewritten"
            self._let_target_write(row, turn.tokens)
        else:
            outcome = "accepted"
            self.commits.decide([row], [self._add(row, turn.tokens, reading)])
            self.statistics.num_segments_accepted += 1
            self.statistics.num_accepted_tokens += len(turn.tokens)
        self.segments[row.index].append(SafeSpecSegment(turn.position, len(turn.tokens), risk, quality, outcome))
        return flag

    def _add(self, row: Row, segment: list[int], reading: Reading) -> Pending:
        """Adds a segment with its risks, up to the first unsafe one."""
        reason = self.commits.append(row, [(token, Provenance.DRAFTED) for token in segment])
        pooled_TF = None if reading.pooled_TF is None else reading.pooled_TF[-len(segment) :]
        return self.commits.settle(row, reading.risks[-len(segment) :], pooled_TF, reason)

    def _forget_flagged(self, flags: Sequence[Flag | None]) -> None:
        """What comes in the place of a flagged segment is not what the target was writing."""
        for row, flag in zip(self.live, flags, strict=True):
            if flag is not None:
                self._writing.pop(row.index, None)
                self._guesses.pop(row.index, None)
                if self.shares:
                    self.shares[row.index].forget()
