"""Segments that the draft draws again, before the target reads one, where the draft's own head flags what it wrote.

It decides nothing about safety: whichever draw the target gets, its own head scores every token of it.

Shapes: T tokens of a segment, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..answer.logits import SafeSpecLogitsProcessor
from ..answer.rows import Row
from ..drafting.drafters import fit_vocabulary
from ..drafting.router import DraftRouter
from ..engine.cache import BlockOutput
from ..engine.transfer import to_host
from .candidate_scores import worst_risk
from .draft_screen import DraftScreen, safest
from .monitor import RiskMonitor
from .plan import Plan
from .sampling import sample_segments

KEEP_SCORES = SafeSpecLogitsProcessor(0, ())


class Redraws(NamedTuple):
    """Draws segments again.

    Attributes:
        drafter ([`DraftRouter`]): Has the draft, which is a language model.
        plan ([`Plan`]): The call.
        monitor ([`RiskMonitor`]): Of the draft's head.
        generator (`Callable`): Of a row.
        num_before_end (`Callable`): How many of the next tokens of a row there are up to the end of its answer.
    """

    drafter: DraftRouter
    plan: Plan
    monitor: RiskMonitor
    generator: Callable[[Row], torch.Generator]
    num_before_end: Callable[[Row, Sequence[int]], int]

    def choose(
        self, index: int, row: Row, segment: list[int], max_tokens: int, is_whole: Callable[[list[int]], bool]
    ) -> tuple[list[int], bool]:
        """What the target is to read in the place of a segment that the draft wrote, and whether it was drawn again.

        Args:
            index (`int`): Where the row lies in the draft's batch.
            row ([`Row`]): The row, at the beginning of a segment.
            segment (`list[int]`): What the draft wrote.
            max_tokens (`int`): Longest segment.
            is_whole (`Callable`): Whether tokens are enough for one.
        """
        risks = self._look(index, row, segment, max_tokens)
        if risks is None:
            return segment, False
        others, their_risks = self._draw(index, row, max_tokens, is_whole)
        # what comes after the end of an answer, no one gets; an empty draw is a failed one, and has no risk
        pairs = zip([segment, *others], [risks, *their_risks], strict=True)
        worst = [worst_risk(risks[: self.num_before_end(row, tokens)]) for tokens, risks in pairs]
        return [segment, *others][safest(worst)], True

    def _look(self, index: int, row: Row, segment: list[int], max_tokens: int) -> list[float] | None:
        """The risks of a segment that is worth other draws, to the draft's head; `None` for any other."""
        reader = self.drafter.fork(index, row, max_tokens, self.monitor.layers)
        if reader is None:  # the draft has no positions left for it
            return None
        num, limit = len(segment), self.plan.policy.draft_uncertainty
        # what it read in order to write has left no states behind, and the last token it has not read
        output = reader.forward([row.context(reader.lengths[0]) + segment], num + 1)
        assert output.hidden_BTF is not None
        parts = [DraftScreen(row, self.monitor).read(segment, output.hidden_BTF[0, -num:])]
        if limit is not None:
            parts.append(uncertainty(fit_vocabulary(output.logits_BTV[0, -1 - num : -1], self.drafter.vocab_size)))
        risks_T, *doubts = to_host(parts)
        risks: list[float] = risks_T.tolist()
        is_safe = worst_risk(risks[: self.num_before_end(row, segment)]) < self.monitor.head.config.risk_threshold
        is_sure = limit is None or float(doubts[0]) <= limit  # what is no number is not sure
        return None if is_safe and is_sure else risks

    def _draw(
        self, index: int, row: Row, max_tokens: int, is_whole: Callable[[list[int]], bool]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """All other draws in one batch, with their risks."""
        screen = DraftScreen(row, self.monitor)

        def judge(segments: Sequence[Sequence[int]], is_open: Sequence[bool], output: BlockOutput) -> list[bool]:
            pairs = zip(segments, screen.watch(segments, is_open, output), strict=True)
            return [is_open and not (tokens and is_whole(list(tokens))) for tokens, is_open in pairs]

        sampler = self.drafter.fork(index, row, max_tokens, self.monitor.layers)
        assert sampler is not None
        segments, _ = sample_segments(
            sampler,
            row,
            num_segments=self.plan.policy.num_draft_segments - 1,
            max_tokens=max_tokens,
            vocab_size=self.drafter.vocab_size,
            end_ids=self.plan.eos_ids,
            steer=KEEP_SCORES,
            temperature=1.0,
            generator=self.generator(row),
            judge=judge,
        )
        return segments, screen.risks


def uncertainty(logits_TV: Tensor) -> Tensor:
    """1 minus the mean probability of the likeliest token, a number in [0, 1).

    Example:

        >>> import torch
        >>> float(uncertainty(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])))
        0.25
    """
    return 1 - logits_TV.float().softmax(dim=-1).amax(dim=-1).mean()
