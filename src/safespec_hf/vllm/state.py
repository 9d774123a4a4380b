"""The running pooled state of every request, and their risks. Pure: it knows steps and hidden states, but no engine.

A step is one forward over some tokens of some requests. State is kept by absolute position: a request that goes on
from an earlier one, because drafts were rejected or it was preempted, is taken up there. What lies before drafts is
pooled for good; the hidden states of drafts are kept until it shows which of them stand. At the ends of cache blocks
copies are left, from which a request can go on whose tokens were read from the prefix cache. Their number is bounded:
where none is left, the request is stopped, and whoever drives it reads the answer again.

Shapes: S slots, M scored tokens of a step, R rows of logits, H tapped features, F pooled features.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..answer.pooling import own_weight
from ..answer.segments import Boundaries, Segments
from ..config import SafeSpecConfig
from ..heads.safety_head import SafetyHead
from .entries import Edit, Entry, Marks, Slots, StepRow, Work, digest_of, edits_of, ends_candidate
from .prompts import score_prompts
from .spec import LOST_STATE, GuardOrder, RiskRecord

MAX_STATE_BYTES = 64 * 1024
"""What a request may keep, as long as one copy at the end of a block fits in."""
MAX_FINISHED = 4096
"""Requests that have ended and were not released; older ones are forgotten, which fails closed. As many answers that
were released are remembered."""


class RiskStates:
    """States and risks of all requests of a worker.

    Args:
        head ([`SafetyHead`]): The head, on the device of the hidden states.
        boundaries ([`Boundaries`]): Of the target's tokenizer.
        reserved_id (`int`): The token that stops what was flagged.
        secret (`str`): What an order must know.
        block_size (`int`): Tokens of a block of the prefix cache.
        num_drafts (`int`, defaults to 0): Drafts of a request per step, at most.
        dtype (`torch.dtype`, defaults to `torch.float32`): Of the hidden states.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where they are.
    """

    def __init__(
        self,
        head: SafetyHead,
        boundaries: Boundaries,
        *,
        reserved_id: int,
        secret: str,
        block_size: int,
        num_drafts: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        config = head.config
        self.head = head
        self.boundaries = boundaries
        self.reserved_id = reserved_id
        self.secret = secret
        self.block_size = block_size
        self.device = torch.device(device)
        self.entries: dict[str, Entry] = {}  # by the engine's id, until it has ended
        self.known: OrderedDict[str, Entry] = OrderedDict()  # by key, until it is released
        self._groups: dict[str, list[Entry]] = {}
        self._released: OrderedDict[str, None] = OrderedDict()
        self.head_seconds = 0.0
        self.num_scored = 0
        self.num_resumed = 0  # requests that went on from a copy: the tokens before came from the prefix cache
        self.failures: Counter[str] = Counter()
        self._ways = config.pooling.split("+")
        num_features, num_tapped = config.num_features, config.num_features // len(self._ways)
        self._slots = Slots(num_features, num_tapped, num_drafts, dtype, self.device)
        self._copy_bytes = num_features * 4
        of_drafts = num_drafts * num_tapped * dtype.itemsize
        left = MAX_STATE_BYTES - self._copy_bytes - of_drafts - 16 * 1024  # of which risks and tokens take some
        self.num_copies = max(left // self._copy_bytes, 1)

    def add(self, request: str, text: object) -> None:
        """A request is new. One without an order that can be believed is stopped at its first token."""
        failure = None
        try:
            order: GuardOrder | None = GuardOrder.from_text(text)
        except ValueError:
            order, failure = None, "it came without an order: requests can't pass by the guard"
        if order is not None and order.secret != self.secret:
            order, failure = None, "its order is not one of ours"
        entry = Entry(order, self._slots.take(), failure=failure)
        if order is not None and order.key in self.known:
            self._fail(entry, "its key is that of another request")
        elif order is not None and order.group in self._released:  # a client hung up while it was on its way
            self._fail(entry, "its answer was released")
        elif order is not None:
            self.known[order.key] = entry
            self._groups.setdefault(order.group, []).append(entry)
        if failure is not None:
            self.failures[failure] += 1
        if request in self.entries:
            self.finish([request])
        if order is not None and self.head.config.span == "segment":
            least, most = order.segment_limits
            policy = SafeSpecConfig(min_segment_tokens=least, max_segment_tokens=most)
            entry.segments = Segments(policy, *self.boundaries)
        self.entries[request] = entry

    def finish(self, requests: Iterable[str]) -> None:
        """Requests have ended: what is known of their risks is kept until it is released."""
        for request in requests:
            entry = self.entries.pop(request, None)
            if entry is None:
                continue
            num = entry.num_read
            entry.kept = self._slots.tokens_SN[entry.slot, :num].copy(), self._slots.risks_SN[entry.slot, :num].clone()
            self._slots.free(entry.slot)
            entry.slot = -1
        while len(self.known) - len(self.entries) > MAX_FINISHED:
            key, entry = next(item for item in self.known.items() if item[1].slot < 0)
            del self.known[key]
            if entry.order is not None and (group := self._groups.get(entry.order.group)) is not None:
                group[:] = [other for other in group if other is not entry]

    def take(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is known of some requests, ready to be sent: see [`RiskRecord`]. Unknown keys are left out."""
        found = {}
        for key in keys:
            entry = self.known.get(key)
            if entry is None or entry.order is None:
                continue
            num, slot = entry.num_read, entry.slot
            tokens, risks = entry.kept or (self._slots.tokens_SN[slot, :num], self._slots.risks_SN[slot, :num])
            record = RiskRecord(
                start=entry.order.start, tokens=tokens.tolist(), risks=risks.tolist(), failure=entry.failure
            )
            record = replace(record, prompt_risk=entry.told_prompt_risk)
            found[key] = record.to_plain()
        return found

    def release(self, groups: Iterable[str]) -> int:
        """Forgets the requests of some answers; one that still runs is stopped. Returns how many entries are left."""
        groups = list(groups)
        gone = [entry for group in groups for entry in self._groups.pop(group, [])]
        self._released.update(dict.fromkeys(groups))
        while len(self._released) > MAX_FINISHED:
            self._released.popitem(last=False)
        for entry in gone:
            assert entry.order is not None
            self.known.pop(entry.order.key, None)
        # the engine may not have told yet that they have ended: if it goes on with one, it is one without an order
        running = [request for request, entry in self.entries.items() if any(entry is one for one in gone)]
        self.finish(running)
        return len(self.known)

    def report(self) -> dict[str, Any]:
        """Counts, for metrics and tests."""
        known = {id(entry): entry for entry in [*self.known.values(), *self.entries.values()]}
        sizes = [
            len(entry.copies) * self._copy_bytes + (self._slots.num_bytes if entry.slot >= 0 else 8 * entry.num_read)
            for entry in known.values()
        ]
        return {
            "num_entries": len(self.known),
            "num_running": len(self.entries),
            "num_failures": sum(self.failures.values()),
            "failures": dict(self.failures),
            "head_seconds": self.head_seconds,
            "num_scored_tokens": self.num_scored,
            "num_resumed": self.num_resumed,
            "state_bytes": sum(sizes),
            "largest_state_bytes": max(sizes, default=0),
        }

    @torch.no_grad()
    def step(self, rows: Sequence[StepRow], hidden_NH: Tensor, num_logits: int) -> Marks:
        """Takes a forward: scores what it read, and says what becomes of its logits.

        Args:
            rows (`Sequence[StepRow]`): Of the batch, in its order.
            hidden_NH (`torch.Tensor` of shape `(N, H)`): Tapped hidden states of all tokens, one request after the
                other.
            num_logits (`int`): Rows of logits that there are.

        Returns:
            [`Marks`]: For as many rows.
        """
        start, flags, num_done = time.perf_counter(), list[Tensor](), 0
        works = self._find_work(rows)
        self._slots.widen(max((work.end - work.order.start for work in works), default=0))
        waiting = list(works)
        while waiting:
            # a request may go on from a copy that another one leaves in this very step
            ready = [work for work in waiting if self._locate(work)]
            if not ready:
                for work in waiting:
                    self._fail(work.entry, LOST_STATE)
                break
            waiting = [work for work in waiting if not any(work is one for one in ready)]
            for work in ready:
                work.place, num_done = num_done, num_done + work.end - work.first
            flags.append(self._score(ready, hidden_NH))
        marks = self._mark(rows, works, flags, num_logits)
        score_prompts(self.head, rows, self.entries, hidden_NH, marks)
        self.head_seconds += time.perf_counter() - start
        return marks

    def _find_work(self, rows: Sequence[StepRow]) -> list[Work]:
        works, offset = [], 0
        for row in rows:
            entry, end = self.entries.get(row.request), row.start + row.num_tokens
            if entry is not None and entry.order is not None and entry.failure is None:
                order = entry.order
                first = max(row.start, order.start)
                if first < end:
                    if self.reserved_id in row.token_ids[first : end - row.num_drafts]:
                        self._fail(entry, "it went on after it was stopped")
                    else:
                        works.append(Work(entry, order, row, first, end, offset + first - row.start))
            offset += row.num_tokens
        return works

    def _locate(self, work: Work) -> bool:
        """Whether the pooled state before the first token is known, and where it is."""
        entry, first = work.entry, work.first
        if first == work.order.start:
            work.before = torch.zeros_like(self._slots.states_SF[entry.slot])
        elif entry.base <= first <= entry.base + entry.num_pending:
            work.num_folded = first - entry.base
        else:
            digest = digest_of(work.order, work.row.token_ids, first)
            copies = (other.copies.get(digest) for other in self._groups.get(work.order.group, []))
            work.before = next((copy for copy in copies if copy is not None), None)
            self.num_resumed += work.before is not None
            return work.before is not None
        return True

    def _counts(self, work: Work) -> list[int | None]:
        """For drafts that stand and new tokens, how many of the span come before; `None` for inserted ones."""
        order, first, segments = work.order, work.first - work.num_folded, work.entry.segments
        if segments is None:
            num = sum(order.is_scored(position) for position in range(order.start, first)) if order.inserted else None
            count, counts = first - order.start if num is None else num, list[int | None]()
            for position in range(first, work.end):
                is_scored = order.is_scored(position)
                counts.append(count if is_scored else None)
                count += is_scored
            return counts
        segments.truncate(first - order.start)
        for position in range(order.start + len(segments.counts), work.end):
            if order.is_scored(position):
                segments.append(int(work.row.token_ids[position]))
            else:
                segments.insert()
        pairs = zip(range(first, work.end), segments.counts[first - order.start :], strict=True)
        return [count if order.is_scored(position) else None for position, count in pairs]

    def _score(self, works: Sequence[Work], hidden_NH: Tensor) -> Tensor:
        """Scores the tokens of some requests; gives their flags, one request after the other."""
        slots = torch.tensor([work.entry.slot for work in works], device=self.device)
        current_BF = self._slots.states_SF[slots]
        for index, work in enumerate(works):
            if work.before is not None:
                current_BF[index] = work.before
        counts = [self._counts(work) for work in works]
        for step in range(max(work.num_folded for work in works)):
            which = [index for index, work in enumerate(works) if work.num_folded > step]
            drafts_BH = self._slots.drafts_SKH[slots[which], step]
            self._advance(current_BF, which, drafts_BH, [counts[index][step] for index in which])
        self._settle(works, slots, current_BF, -1)
        states, order = [], list[tuple[int, int]]()
        for step in range(max(work.end - work.first for work in works)):
            which = [index for index, work in enumerate(works) if work.end - work.first > step]
            hidden_BH = hidden_NH[[works[index].offset + step for index in which]]
            here = [counts[index][works[index].num_folded + step] for index in which]
            states.append(self._advance(current_BF, which, hidden_BH, here))
            self._settle(works, slots, current_BF, step)
            order += [(index, step) for index in which]
        self._keep_drafts(works, hidden_NH)
        return self._record(works, torch.cat(states), order, counts)

    def _advance(
        self, current_BF: Tensor, which: Sequence[int], hidden_BH: Tensor, counts: Sequence[int | None]
    ) -> Tensor:
        """Pools one more token of some requests; gives their new states."""
        decay, width = self.head.config.ewma_decay, hidden_BH.shape[1]
        shares = [[0.0 if count is None else own_weight(count, way, decay) for way in self._ways] for count in counts]
        shares_BF = torch.tensor(shares, device=self.device).repeat_interleave(width, dim=1)
        own_BF = hidden_BH.float().repeat(1, len(self._ways))
        if len(which) == len(current_BF):
            return current_BF.lerp_(own_BF, shares_BF).clone()
        states_BF = current_BF[which].lerp(own_BF, shares_BF)
        current_BF[which] = states_BF
        return states_BF

    def _settle(self, works: Sequence[Work], slots: Tensor, current_BF: Tensor, step: int) -> None:
        """Keeps the states of requests whose last token before any drafts was the one of this step."""
        which = []
        for index, work in enumerate(works):
            position = work.first + step + 1  # before which the state is
            num_sure = work.end - work.row.num_drafts - work.first  # tokens that are no drafts
            if step + 1 == max(num_sure, 0):
                which.append(index)
            if 0 <= step < num_sure and position % self.block_size == 0:
                self._leave_copy(work, position, current_BF[index])
        if which:
            self._slots.states_SF[slots[which]] = current_BF[which]

    def _leave_copy(self, work: Work, position: int, state_F: Tensor) -> None:
        copies = work.entry.copies
        copies[digest_of(work.order, work.row.token_ids, position)] = state_F.clone()
        while len(copies) > self.num_copies:
            copies.popitem(last=False)

    def _keep_drafts(self, works: Sequence[Work], hidden_NH: Tensor) -> None:
        places = [
            (work.entry.slot, draft, work.offset + work.end - work.first - work.row.num_drafts + draft)
            for work in works
            for draft in range(work.row.num_drafts)
        ]
        if places:
            slots, drafts, indices = (list(part) for part in zip(*places, strict=True))
            self._slots.drafts_SKH[slots, drafts] = hidden_NH[indices].to(self._slots.drafts_SKH.dtype)
        for work in works:
            work.entry.base = work.end - work.row.num_drafts
            work.entry.num_pending = work.row.num_drafts
            work.entry.num_read = work.end - work.order.start

    def _record(
        self,
        works: Sequence[Work],
        states_MF: Tensor,
        order: Sequence[tuple[int, int]],
        counts: Sequence[Sequence[int | None]],
    ) -> Tensor:
        """Writes down tokens and risks; gives the flags."""
        begins = np.cumsum([0, *(work.end - work.first for work in works)]).tolist()
        target = [begins[index] + step for index, step in order]
        risk_M = torch.empty(len(order), device=self.device)
        risk_M[target] = self.head.risk(states_MF)
        slots, columns, limits = list[int](), list[int](), list[float]()
        for work, of_work in zip(works, counts, strict=True):
            size, column = work.end - work.first, work.first - work.order.start
            self._slots.tokens_SN[work.entry.slot, column : column + size] = work.row.token_ids[work.first : work.end]
            slots += [work.entry.slot] * size
            columns += range(column, column + size)
            limit = math.inf if work.order.threshold is None else work.order.threshold
            limits += [math.nan if count is None else limit for count in of_work[work.num_folded :]]
        self.num_scored += len(order)
        limit_M = torch.tensor(limits, device=self.device, dtype=torch.float64)
        is_scored_M = ~limit_M.isnan()
        self._slots.risks_SN[slots, columns] = risk_M.masked_fill(~is_scored_M, math.nan)
        # not "risk >= threshold": a nan must never pass for safe; but what is only observed is never flagged
        return ~(risk_M.double() < limit_M) & is_scored_M & ~limit_M.isinf()

    def _mark(self, rows: Sequence[StepRow], works: Sequence[Work], flags: Sequence[Tensor], num_logits: int) -> Marks:
        forced, begins, ends, edits = list[bool](), list[int](), list[int](), list[Edit]()
        by_request = {work.row.request: work for work in works}
        for row in rows:
            entry, work = self.entries.get(row.request), by_request.get(row.request)
            is_sound = entry is not None and entry.order is not None and entry.failure is None
            for position in range(row.start + row.num_tokens - 1 - row.num_drafts, row.start + row.num_tokens):
                is_ended = not is_sound
                if is_sound and entry is not None and entry.order is not None:
                    is_ended = ends_candidate(entry.order, row, position, self.boundaries)
                    edits += edits_of(entry.order, row, position, len(forced))
                forced.append(is_ended)
                has_flags = is_sound and work is not None and position >= work.first
                begins.append(work.place if has_flags and work else 0)
                ends.append(work.place + position - work.first + 1 if has_flags and work else 0)
        if len(forced) != num_logits:
            for entry in self.entries.values():
                self._fail(entry, f"{num_logits} rows of logits came for {len(forced)}")
            return Marks(torch.ones(num_logits, dtype=torch.bool, device=self.device), [])
        is_forced_R = torch.tensor(forced, dtype=torch.bool, device=self.device)
        if flags:
            sums = torch.nn.functional.pad(torch.cat(list(flags)).long().cumsum(0), (1, 0))
            is_forced_R |= sums[ends] > sums[begins]
        return Marks(is_forced_R, edits)

    def _fail(self, entry: Entry, failure: str) -> None:
        if entry.failure is None:
            entry.failure = failure
            self.failures[failure] += 1
