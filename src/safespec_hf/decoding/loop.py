"""The decoding loop: draft, score, verify, commit, or recover. Here and in `safety_mode` models are called.

Method: SafeSpec, Xu et al., arXiv 2606.19755. This is an independent implementation. `Decoder._round` is the method,
one line per step. Rows are independent: each has its own acceptance, segments, rollbacks and end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..answer.bans import keep_off
from ..answer.logits import process_drafts, split_processors
from ..answer.rows import Row, pad_rows
from ..drafting.drafters import Proposal
from ..drafting.router import DraftRouter
from ..engine.alone import cached_model
from ..engine.cache import CACHE_NAME
from ..engine.callers_cache import States, lay_out
from ..engine.inference import ordinary_tensor
from ..engine.prompt import Prompt
from ..engine.tap import split_tap
from ..engine.token_tree import accept_matching, depths_of, is_chain, path_to
from ..engine.transfer import to_host
from ..outputs import Provenance, SafeSpecOutput, SafeSpecSegment, SafeSpecStatistics
from .commit import NOTHING, Committer, Flag
from .plan import Plan
from .prompt_screen import PromptScreen
from .safety_mode import SafetyMode
from .sampling import Shares, token_at
from .verification import NO_TOKEN, Verification, verify_sampled
from .watch import Watch


class Reading(NamedTuple):
    """What the round's forward says about one row, on the host; pooled states stay on the device.

    Attributes:
        path (`list[int]`): The drafts that stand.
        next_token (`int`): The target's own token after them.
        risks (`list[float]`): Of the tokens that waited for one, and of all drafts.
        pooled_TF (`torch.Tensor`, *optional*): The pooled states after the same tokens.
    """

    path: list[int]
    next_token: int
    risks: list[float]
    pooled_TF: Tensor | None


class Decoder:
    """Generates a batch of answers.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        rows (`list[Row]`): The batch, empty answers.
        drafter ([`DraftRouter`]): Drafts for it.
        plan ([`Plan`]): The call.
        streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*): Gets tokens once final.
        watch ([`Watch`], *optional*): Stops speculation while it loses.
        prompt ([`Prompt`], *optional*): What the prompts are besides tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[Row],
        drafter: DraftRouter,
        plan: Plan,
        streamer: BaseStreamer | None = None,
        watch: Watch | None = None,
        prompt: Prompt | None = None,
    ):
        # of the tapped states, the first ones are the safety head's and the others the draft head's
        self._risk_layers = [] if plan.monitor is None else plan.monitor.layers
        self.target = cached_model(model, len(rows), [*self._risk_layers, *drafter.layers])
        drafter.attach(self.target)
        self.rows = rows
        self.live = list(rows)
        self.drafter = drafter
        self.plan = plan
        self.streamer, self.watch, self.prompt = streamer, watch, prompt
        self.statistics = SafeSpecStatistics()
        self.commits = Committer(plan, self.statistics, rows)
        self.screen = PromptScreen(plan, self.commits)
        self.shares = [Shares(seed) for seed in plan.answer_seeds]
        self.segments: list[list[SafeSpecSegment]] | None = None  # those of segment mode
        # of finished rows the number of tokens that they have read, and their states, if a caller wants them
        self.finished: dict[int, tuple[int, States]] | None = None
        self.safety_mode: SafetyMode | None = None
        if plan.monitor is not None:
            self.safety_mode = SafetyMode(self.target, drafter, plan, plan.monitor, self.commits)

    @torch.no_grad()
    def run(self) -> None:
        """Runs until every row has finished."""
        try:
            if self.prompt is not None:
                self._prefill(self.prompt)
            while self.live:
                self._round()
            self.commits.report()
        finally:
            self._leave_consistent()

    def _prefill(self, prompt: Prompt) -> None:
        """Reads prompts that are more than tokens, by themselves; all others are read in the first round."""
        self.prompt, output = None, self.target.prefill(prompt)  # images are read once, and need not be kept
        head_BLF, states_BLF = split_tap(output.hidden_BTF, len(self._risk_layers), len(self.target.layers))
        self.screen.observe(head_BLF, torch.from_numpy(prompt.is_real_BL))
        if states_BLF is not None and any(prompt.num_tokens):
            num_cached = prompt.is_real_BL.shape[1] - states_BLF.shape[1]
            for index, is_real_L in enumerate(torch.from_numpy(prompt.is_real_BL)):
                is_new_L = is_real_L[num_cached:].to(states_BLF.device)
                self.drafter.observe(index, int(is_real_L[:num_cached].sum()), states_BLF[index, is_new_L])

    def _round(self) -> None:
        """One round of the method. The paper's x is a row's context, s the drafts that go on with it."""
        start = time.perf_counter()
        # a cheap draft proposes; what it is worth only decides how fast this goes, never what comes out
        proposal = self._draft()
        self._reach([row.num_context for row in self.live])
        # ONE forward of the target reads x and s: its logits say what stands, its hidden states how risky that is
        starts, blocks = list(self.target.lengths), self._blocks(proposal)
        logits_BTV, risk_states_BTF, draft_states_BTF = self._forward(blocks, proposal)
        verified = self._verify(proposal, logits_BTV)
        readings = self._read(proposal, verified, risk_states_BTF)
        # safety comes first: of what stands, only tokens before the first unsafe one are kept
        flags = self._commit(proposal, readings)
        self._keep_accepted(proposal, [reading.path for reading in readings], starts, blocks, draft_states_BTF)
        self._roll_back_caches()
        self._take_note(proposal, readings, time.perf_counter() - start)
        # a flagged row goes through Safety Mode and is back here in the next round; the others notice nothing
        self._recover(flags)
        self.statistics.num_rounds += 1
        # what can't be taken back any more is the caller's
        self._stream()
        self._drop_finished()

    def _blocks(self, proposal: Proposal) -> list[list[int]]:
        """For each row what the target has not read: the tokens that wait, and the drafts after them."""
        triples = zip(self.live, self.target.lengths, proposal.drafts, strict=True)
        return [row.context(length) + drafts for row, length, drafts in triples]

    def _forward(self, blocks: Sequence[list[int]], proposal: Proposal) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits after the context and after each draft, the head's states, and the draft head's."""
        num_logits = 1 + max(len(drafts) for drafts in proposal.drafts)
        nums = [len(drafts) for drafts in proposal.drafts]
        output = self.target.forward(blocks, num_logits, parents=proposal.parents, num_drafts=nums)
        return output.logits_BTV, *split_tap(output.hidden_BTF, len(self._risk_layers), len(self.target.layers))

    def _draft(self) -> Proposal:
        start, most = time.perf_counter(), self.drafter.most(self.plan.num_draft_tokens)
        if self.watch is not None and not self.watch.lets_draft():
            most = 0
        most = min(most, self.plan.max_positions - max(row.num_context for row in self.live))  # columns are shared
        # the target adds a token of its own, so the last one allowed is never worth drafting
        limits = [
            0 if row.closing else max(min(most, row.room - 1, self._room_for_drafts(row)), 0) for row in self.live
        ]
        proposal = self.drafter.draft(self.live, limits)
        self.statistics.draft_seconds += time.perf_counter() - start
        return proposal

    def _room_for_drafts(self, row: Row) -> int:
        """Drafts that a row's context has room for, and which are read as the context is."""
        return min(self.plan.max_context - row.num_context, self.target.before_change(row.num_context))

    def _reach(self, ends: Sequence[int]) -> None:
        """Prepares the target for reading rows up to there; what has to be read again is read in that forward."""
        for index, end in enumerate(ends):
            self.target.reach(index, end)

    def _take_note(self, proposal: Proposal, readings: Sequence[Reading], seconds: float) -> None:
        """Tells the watch what a round took, and what it gave."""
        # the first one reads the prompts
        if self.watch is not None and self.statistics.num_rounds > 0:
            num_tokens = 1 + sum(len(reading.path) for reading in readings) / len(readings)
            self.watch.record(seconds, num_tokens, len(readings), any(proposal.drafts))

    def _keep_accepted(
        self,
        proposal: Proposal,
        paths: Sequence[list[int]],
        starts: Sequence[int],
        blocks: Sequence[Sequence[int]],
        states_BTF: Tensor | None,
    ) -> None:
        """What a round leaves to caches and drafters: of a tree, the path that was accepted."""
        self.drafter.record(paths)
        for index, (drafts, path) in enumerate(zip(proposal.drafts, paths, strict=True)):
            is_prefix = path == list(range(len(path)))
            if not is_prefix:
                self.target.keep_drafts(index, len(drafts), path)
            if states_BTF is not None:
                num_others = len(blocks[index]) - len(drafts)
                states_TF = states_BTF[index, states_BTF.shape[1] - len(blocks[index]) :]
                if not is_prefix:
                    states_TF = torch.cat([states_TF[:num_others], states_TF[num_others:][path]])
                self.drafter.observe(index, starts[index], states_TF)

    def _verify(self, proposal: Proposal, logits_BTV: Tensor) -> Verification | Tensor:
        """The target's choice at every position; or what was accepted of drafts that were sampled themselves."""
        scores_BTV = keep_off(self.live, proposal.drafts, proposal.trees(), self._process(proposal, logits_BTV))
        if not self.plan.do_sample:
            return scores_BTV.max(dim=-1).indices  # the first of several, as argmax gives, at a quarter of its time
        if proposal.probs_BGV is None:
            return self._sample(proposal, scores_BTV)
        device, num_positions = logits_BTV.device, logits_BTV.shape[1]
        padded = [[0] * (num_positions - 1 - len(drafts)) + drafts for drafts in proposal.drafts]
        drafts_BG = torch.tensor(padded, dtype=torch.long).view(len(padded), -1).to(device, non_blocking=True)
        num_drafts_B = torch.tensor([len(drafts) for drafts in proposal.drafts]).to(device, non_blocking=True)
        return verify_sampled(scores_BTV.float(), drafts_BG, num_drafts_B, proposal.probs_BGV.to(device))

    def _sample(self, proposal: Proposal, scores_BTV: Tensor) -> Tensor:
        """What the target draws at every position: drafts stand where they are what it draws anyway.

        So each token is drawn from the target's own distribution, whatever and however much was drafted.
        """
        num_positions = scores_BTV.shape[1]
        shares = []
        for row, drafts, parents in zip(self.live, proposal.drafts, proposal.trees(), strict=True):
            depths = [0, *depths_of(parents)]
            ahead = self.shares[row.index].ahead(1 + max(depths))
            shares.append([0.0] * (num_positions - 1 - len(drafts)) + [ahead[depth] for depth in depths])
        share_K1 = torch.tensor(shares, dtype=torch.double).view(-1, 1).to(scores_BTV.device, non_blocking=True)
        probs_KV = scores_BTV.float().softmax(dim=-1).flatten(0, 1)
        # softmax makes a position without any finite score, or with one that is not a number, all nan
        token_K1 = token_at(probs_KV, share_K1).masked_fill(probs_KV[:, :1].isnan(), NO_TOKEN)
        return token_K1.view(len(shares), num_positions)

    def _process(self, proposal: Proposal, logits_BTV: Tensor) -> Tensor:
        """The caller's processors; those that look at the context once per position that can be reached."""
        row = self.live[0]
        if not row.processors:
            return logits_BTV
        of_context, of_scores = split_processors(row.processors)
        scores_BTV = logits_BTV.to(row.device, torch.float32)
        if of_context:
            scores_BTV = scores_BTV.clone()  # places before those of a row mean nothing, and stay as they are
            for index, args in enumerate(zip(self.live, proposal.drafts, proposal.trees(), strict=True)):
                of_row_TV = scores_BTV[index, -1 - len(proposal.drafts[index]) :]
                of_row_TV.copy_(process_drafts(args[0], self._ids_at(*args), *args[1:], of_row_TV))
        ids_1L = cast("torch.LongTensor", row.visible_ids())
        scores_NV = cast("torch.FloatTensor", scores_BTV.flatten(0, 1))
        return of_scores(ids_1L, scores_NV).view_as(scores_BTV) if of_scores else scores_BTV

    def _ids_at(self, row: Row, drafts: list[int], parents: Sequence[int]) -> list[Tensor]:
        """What processors see of a row before its drafts, and after each."""
        ids_1L, num = row.visible_ids(drafts), row.visible_ids().shape[1]
        if is_chain(parents):
            return [ids_1L[:, : num + count] for count in range(len(drafts) + 1)]
        paths = [path_to(draft, parents) for draft in range(-1, len(drafts))]
        return [row.visible_ids([drafts[index] for index in path]) for path in paths]

    def _read(self, proposal: Proposal, verified: Verification | Tensor, hidden_BTF: Tensor | None) -> list[Reading]:
        """Risks of all tokens that wait for one, drafts included; and the round's only transfer to the host."""
        start = time.perf_counter()
        trees: Sequence[Sequence[int] | None] = proposal.parents or [None for _ in self.live]
        pooled: list[Tensor] = []
        if self.plan.monitor is not None and hidden_BTF is not None:
            pool = self.plan.monitor.pool
            pooled = [pool(*args) for args in zip(self.live, proposal.drafts, hidden_BTF, trees, strict=True)]
        parts = [verified] if isinstance(verified, Tensor) else [*verified]
        if pooled and self.plan.monitor is not None:
            of_prompts = self.screen.ask(hidden_BTF, [len(drafts) for drafts in proposal.drafts])
            risks, *outcome = to_host([self.plan.monitor.risks(pooled), *parts, *of_prompts])
            self.screen.take([outcome.pop() for _ in of_prompts])
            risks_of_rows = [risks_T.tolist() for risks_T in risks.split([len(states_TF) for states_TF in pooled])]
        else:
            outcome, risks_of_rows = to_host(parts), [[] for _ in self.live]
        accepted = self._accepted(proposal, outcome)
        self.statistics.head_seconds += time.perf_counter() - start
        states: Sequence[Tensor | None] = pooled or [None for _ in self.live]
        triples = zip(accepted, risks_of_rows, states, strict=True)
        return [Reading(path, token, risks_T, pooled_TF) for (path, token), risks_T, pooled_TF in triples]

    def _accepted(self, proposal: Proposal, outcome: Sequence[Tensor]) -> list[tuple[list[int], int]]:
        """For each row the path that stands, and the target's token after it, from the host's copy of `_verify`."""
        if proposal.probs_BGV is not None:
            num_accepted, next_tokens = (part.tolist() for part in outcome)
            return [(list(range(num)), token) for num, token in zip(num_accepted, next_tokens, strict=True)]
        triples = zip(outcome[0].tolist(), proposal.drafts, proposal.trees(), strict=True)
        return [
            accept_matching(choices[len(choices) - 1 - len(drafts) :], drafts, parents)
            for choices, drafts, parents in triples
        ]

    def _commit(self, proposal: Proposal, readings: Sequence[Reading]) -> list[Flag | None]:
        """Adds verified tokens and their risks to the rows; ends answers, or takes back what is unsafe."""
        pending, of_prompts = [], self.screen.flags(self.live)
        for row, drafts, reading, flag in zip(self.live, proposal.drafts, readings, of_prompts, strict=True):
            self.statistics.num_draft_tokens += len(drafts)
            self.statistics.num_accepted_tokens += len(reading.path)
            if flag is not None:  # nothing is said yet
                pending.append(NOTHING)
                continue
            num_waiting = row.num_unscored()
            new = [(drafts[index], Provenance.DRAFTED) for index in reading.path]
            reason = self.commits.append(row, [*new, (reading.next_token, Provenance.TARGET)])
            # of all risks those on the path that stands, up to the end of the answer
            on_path = [*range(num_waiting), *(num_waiting + index for index in reading.path)][: row.num_unscored()]
            risks, pooled_TF = [reading.risks[index] for index in on_path] if reading.risks else [], reading.pooled_TF
            if pooled_TF is not None:
                is_prefix = on_path == list(range(len(on_path)))
                pooled_TF = pooled_TF[: len(on_path)] if is_prefix else pooled_TF[on_path]
            pending.append(self.commits.settle(row, risks, pooled_TF, reason))
        flags = self.commits.decide(self.live, pending)
        if self.shares:
            for row, reading, flag, of_prompt in zip(self.live, readings, flags, of_prompts, strict=True):
                if flag is not None:
                    self.shares[row.index].forget()
                elif of_prompt is None:
                    self.shares[row.index].use(len(reading.path) + 1)
        return [of_prompt or flag for of_prompt, flag in zip(of_prompts, flags, strict=True)]

    def _recover(self, flags: Sequence[Flag | None]) -> None:
        for index, (row, flag) in enumerate(zip(self.live, flags, strict=True)):
            # the recovery of a row before may have let a criterion end this one
            if flag is not None and row.finish_reason is None and self.safety_mode is not None:
                self.safety_mode.recover(index, row, flag)
        if any(flags):
            self._roll_back_caches()

    def _roll_back_caches(self) -> None:
        """Every cache forgets what was not kept; the last token of a row always waits for the next forward."""
        lengths = [max(row.num_context - 1, 0) for row in self.live]  # of embeddings no token is known
        self.target.keep(lengths)
        self.drafter.keep(lengths)

    def _stream(self) -> None:
        if self.streamer is None:
            return
        row = self.rows[0]
        end = row.num_final if row.finish_reason is None else len(row.tokens)
        for index in row.visible(row.num_streamed, end):
            self.streamer.put(ordinary_tensor([row.tokens[index]]))
        row.num_streamed = max(row.num_streamed, end)
        if row.finish_reason is not None:
            self.streamer.end()

    def _drop_finished(self) -> None:
        for index, row in enumerate(self.live):
            if self.finished is not None and row.finish_reason is not None:
                # text that was inserted at its end is read by nobody
                num_read = min(self.target.lengths[index], row.num_continuable)
                layers = range(len(self.target.cache.layers))
                self.finished[row.index] = num_read, [self.target.states_of(index, layer) for layer in layers]
        left = [index for index, row in enumerate(self.live) if row.finish_reason is None]
        self.live = [self.live[index] for index in left]
        if left:
            self.target.select(left)
            self.drafter.select(left)

    def _leave_consistent(self) -> None:
        """A single row's cache, which the caller may go on with, ends before anything the caller does not see."""
        if len(self.rows) == 1:
            self.target.trim_cache(self.rows[0].num_continuable)
        target = self.target.usage
        self.statistics.num_target_forwards, self.statistics.target_seconds = target.num_forwards, target.seconds
        self.statistics.num_reread_tokens = target.num_reread_tokens
        self.statistics.num_watch_pauses = 0 if self.watch is None else self.watch.num_pauses
        self.statistics.num_draft_forwards = self.drafter.num_forwards
        self.statistics.num_plain_rounds = self.drafter.num_plain_rounds
        self.statistics.num_new_tokens = sum(row.num_visible for row in self.rows)

    def whole_cache(self, is_real_BL: np.ndarray) -> States:
        """What a batch has read, in the columns of the sequences that are returned, up to where the first row ends.

        `is_real_BL`: `False` for padding, of the prompts.
        """
        assert self.finished is not None
        length, columns = is_real_BL.shape[1], []
        nums, states = zip(*(self.finished[row.index] for row in self.rows), strict=True)
        ends = [length + num - len(row.prompt) for num, row in zip(nums, self.rows, strict=True)]
        for is_real_L, end in zip(is_real_BL, ends, strict=True):
            columns.append(np.concatenate([np.flatnonzero(is_real_L), np.arange(length, max(end, length))]))
        return lay_out(states, columns, min(ends))

    def output(self, prompt_ids: Tensor, pad_token_id: int, cache: Any = None) -> SafeSpecOutput:
        """The finished batch, padded on the right, with a cache that a later call can go on with."""
        tokens, risks, provenance = pad_rows(self.rows, pad_token_id, prompt_ids.device)
        return SafeSpecOutput(
            sequences=cast("torch.LongTensor", torch.cat([prompt_ids, tokens], dim=1)),
            risks=cast("torch.FloatTensor", risks),
            provenance=cast("torch.LongTensor", provenance),
            events=[row.events for row in self.rows],
            finish_reasons=[row.finish_reason or "" for row in self.rows],
            statistics=self.statistics,
            segments=self.segments,
            **{CACHE_NAME: cache},
        )
