"""The decoding loop: draft, score, verify, commit, or recover. Here and in `safety_mode` models are called.

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

from ..answer.logits import process_rows
from ..answer.rows import Row, pad_rows
from ..drafting.candidates import SafeSpecCandidateGenerator
from ..drafting.drafters import Proposal
from ..engine.cache import CACHE_NAME, CachedModel
from ..engine.tap import split_tap
from ..engine.token_tree import accept_greedy, chain_parents, path_to
from ..outputs import Provenance, SafeSpecOutput, SafeSpecStatistics
from .commit import Committer, Flag
from .plan import Plan, check_context
from .safety_mode import SafetyMode
from .verification import Verification, verify_sampled


class Scored(NamedTuple):
    """A row's share of a round, on the host; pooled states stay on the device.

    `path` names the drafts that were accepted; risks and pooled states are of the tokens that waited and of all
    drafts.
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
        check_context(rows, plan)
        # of the tapped states, the first ones are the safety head's and the others the draft head's
        self._risk_layers = [] if plan.monitor is None else plan.monitor.layers
        self.target = CachedModel(model, len(rows), [*self._risk_layers, *candidates.layers])
        self.rows = rows
        self.live = list(rows)
        self.candidates = candidates
        self.plan = plan
        self.streamer = streamer
        self.statistics = SafeSpecStatistics()
        self.commits = Committer(plan, self.statistics)
        self.safety_mode: SafetyMode | None = None
        if plan.monitor is not None:
            self.safety_mode = SafetyMode(self.target, candidates, plan, plan.monitor, self.commits)

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
        starts, num_logits = list(self.target.lengths), 1 + max(len(drafts) for drafts in proposal.drafts)
        output = self.target.forward(blocks, num_logits, parents=proposal.parents)
        risk_states_BTF, draft_states_BTF = split_tap(
            output.hidden_BTF, len(self._risk_layers), len(self.target.layers)
        )
        scored = self._score(proposal, self._verify(proposal, output.logits_BTV), risk_states_BTF)
        triples = zip(self.live, proposal.drafts, scored, strict=True)
        flags = [self._commit(row, drafts, result) for row, drafts, result in triples]
        self._keep_accepted(proposal, [result.path for result in scored], starts, blocks, draft_states_BTF)
        self._roll_back_caches()
        for index, (row, flag) in enumerate(zip(self.live, flags, strict=True)):
            if flag is not None and self.safety_mode is not None:
                self.safety_mode.recover(index, row, flag)
        self.statistics.num_rounds += 1
        self._stream()
        self._drop_finished()

    def _draft(self) -> Proposal:
        start, most = time.perf_counter(), self.plan.num_draft_tokens
        most = min(most, self.plan.max_positions - max(row.num_context for row in self.live))  # columns are shared
        # the target adds a token of its own, so the last one allowed is never worth drafting
        limits = [
            0 if row.closing else max(min(most, row.room - 1, self.plan.max_context - row.num_context), 0)
            for row in self.live
        ]
        proposal = self.candidates.draft(self.live, limits)
        self.statistics.draft_seconds += time.perf_counter() - start
        return proposal

    def _keep_accepted(
        self,
        proposal: Proposal,
        paths: Sequence[list[int]],
        starts: Sequence[int],
        blocks: Sequence[Sequence[int]],
        states_BTF: Tensor | None,
    ) -> None:
        """What a round leaves to caches and drafters: of a tree, the path that was accepted."""
        self.candidates.record(paths)
        for index, (drafts, path) in enumerate(zip(proposal.drafts, paths, strict=True)):
            is_prefix = path == list(range(len(path)))
            if not is_prefix:
                self.target.keep_drafts(index, len(drafts), path)
            if states_BTF is not None:
                num_others = len(blocks[index]) - len(drafts)
                states_TF = states_BTF[index, states_BTF.shape[1] - len(blocks[index]) :]
                if not is_prefix:
                    states_TF = torch.cat([states_TF[:num_others], states_TF[num_others:][path]])
                self.candidates.observe(index, starts[index], states_TF)

    def _verify(self, proposal: Proposal, logits_BTV: Tensor) -> Verification | Tensor:
        """What sampling accepted, or the target's greedy choice at every position."""
        scores_BTV = self._process(proposal, logits_BTV)
        if not self.plan.do_sample:
            return scores_BTV.max(dim=-1).indices  # the first of several, as argmax gives, at a quarter of its time
        device, num_positions = logits_BTV.device, logits_BTV.shape[1]
        padded = [[0] * (num_positions - 1 - len(drafts)) + drafts for drafts in proposal.drafts]
        drafts_BG = torch.tensor(padded, dtype=torch.long).view(len(padded), -1).to(device, non_blocking=True)
        num_drafts_B = torch.tensor([len(drafts) for drafts in proposal.drafts]).to(device, non_blocking=True)
        probs = None if proposal.probs_BGV is None else proposal.probs_BGV.to(device)
        return verify_sampled(scores_BTV.float(), drafts_BG, num_drafts_B, probs)

    def _process(self, proposal: Proposal, logits_BTV: Tensor) -> Tensor:
        """The caller's processors, once per position; rows are aligned to the right."""
        if not self.live[0].processors:
            return logits_BTV
        num_positions = logits_BTV.shape[1]
        columns = []
        for position in range(num_positions):
            extras = []
            for index, drafts in enumerate(proposal.drafts):
                last = position - (num_positions - len(drafts))
                parents = chain_parents(len(drafts)) if proposal.parents is None else proposal.parents[index]
                extras.append([drafts[draft] for draft in path_to(last, parents)] if last >= 0 else [])
            columns.append(process_rows(self.live, extras, logits_BTV[:, position]))
        return torch.stack(columns, dim=1)

    def _score(self, proposal: Proposal, verified: Verification | Tensor, hidden_BTF: Tensor | None) -> list[Scored]:
        """Risks of all tokens that wait for one, drafts included, and the round's only transfer to the host."""
        start = time.perf_counter()
        parts = [verified.flatten()] if isinstance(verified, Tensor) else list(verified)
        trees: Sequence[Sequence[int] | None] = proposal.parents or [None for _ in self.live]
        pooled: list[Tensor] = []
        if self.plan.monitor is not None and hidden_BTF is not None:
            pool = self.plan.monitor.pool
            pooled = [pool(*args) for args in zip(self.live, proposal.drafts, hidden_BTF, trees, strict=True)]
            parts.append(self.plan.monitor.risks(pooled))
        device = parts[0].device  # float32 holds every token id below 2**24
        values = torch.cat([part.float().to(device) for part in parts]).tolist()
        accepted = self._read_accepted(proposal, verified, values)
        after = iter(values[sum(part.numel() for part in parts[: len(parts) - bool(pooled)]) :])
        risks = [[next(after) for _ in states] for states in pooled]
        self.statistics.head_seconds += time.perf_counter() - start
        if not pooled:
            return [Scored(path, token, [], None) for path, token in accepted]
        triples = zip(accepted, risks, pooled, strict=True)
        return [Scored(path, token, values, states) for (path, token), values, states in triples]

    def _read_accepted(
        self, proposal: Proposal, verified: Verification | Tensor, values: Sequence[float]
    ) -> list[tuple[list[int], int]]:
        """For each row the path that was accepted, and the target's token after it."""
        num_rows = len(self.live)
        if not isinstance(verified, Tensor):
            pairs = zip(values[:num_rows], values[num_rows : 2 * num_rows], strict=True)
            return [(list(range(int(num))), int(token)) for num, token in pairs]
        width, found = verified.shape[1], []
        for index, drafts in enumerate(proposal.drafts):
            choices = [int(value) for value in values[(index + 1) * width - 1 - len(drafts) : (index + 1) * width]]
            parents = chain_parents(len(drafts)) if proposal.parents is None else proposal.parents[index]
            found.append(accept_greedy(choices, drafts, parents))
        return found

    def _commit(self, row: Row, drafts: Sequence[int], scored: Scored) -> Flag | None:
        """Adds a row's verified tokens up to its end; takes back an unsafe one with its segment."""
        self.statistics.num_draft_tokens += len(drafts)
        self.statistics.num_accepted_tokens += len(scored.path)
        num_waiting, reason = row.num_unscored(), row.closing
        new = [(drafts[index], Provenance.DRAFTED) for index in scored.path]
        if reason is None:
            reason = self.commits.append(row, [*new, (scored.next_token, Provenance.TARGET)])
        num_read = min(num_waiting + len(scored.path), row.num_unscored())
        read = [*range(num_waiting), *(num_waiting + index for index in scored.path)][:num_read]
        risks, pooled_TF = [scored.risks[index] for index in read] if scored.risks else [], scored.pooled_TF
        if pooled_TF is not None:
            pooled_TF = pooled_TF[:num_read] if read == list(range(num_read)) else pooled_TF[read]
        return self.commits.settle(row, risks, pooled_TF, reason)

    def _roll_back_caches(self) -> None:
        """Every cache forgets what was not kept; the last token of a row always waits for the next forward."""
        lengths = [row.num_context - 1 for row in self.live]
        self.target.keep(lengths)
        self.candidates.keep(lengths)

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
            self.target.trim_cache(min(len(row.prompt) + next(hidden, len(row.tokens)), row.num_context - 1))
        target = self.target.usage
        self.statistics.num_target_forwards, self.statistics.target_seconds = target.num_forwards, target.seconds
        self.statistics.num_draft_forwards = self.candidates.num_forwards
        self.statistics.num_plain_rounds = self.candidates.num_plain_rounds
        self.statistics.num_new_tokens = sum(row.num_visible for row in self.rows)

    def _is_plain(self, prompt_ids: Tensor) -> bool:
        """Whether the cache has a column per token, so that a later call can go on with it."""
        return len(self.rows) == 1 and len(self.rows[0].prompt) == prompt_ids.shape[1]

    def output(self, prompt_ids: Tensor, pad_token_id: int, with_cache: bool = True) -> SafeSpecOutput:
        """The finished batch, padded on the right."""
        tokens, risks, provenance = pad_rows(self.rows, pad_token_id, prompt_ids.device)
        return SafeSpecOutput(
            sequences=cast("torch.LongTensor", torch.cat([prompt_ids, tokens], dim=1)),
            risks=cast("torch.FloatTensor", risks),
            provenance=cast("torch.LongTensor", provenance),
            events=[row.events for row in self.rows],
            finish_reasons=[row.finish_reason or "" for row in self.rows],
            statistics=self.statistics,
            **{CACHE_NAME: self.target.give_cache() if with_cache and self._is_plain(prompt_ids) else None},
        )
