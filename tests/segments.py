"""What segment mode judged, and what passes of their own say about the same text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import torch

from safespec_hf import Provenance
from safespec_hf.config import QualityReading
from safespec_hf.decoding.quality import find_digit_ids, read_quality
from safespec_hf.decoding.segment_mode import SegmentDecoder


class Judged(NamedTuple):
    """A segment that a draft proposed.

    Attributes:
        context (`list[int]`): What the target read before it.
        tokens (`list[int]`): The segment; `num_own` with what there was of it before.
        risks (`list[float]`), quality (`float`): As they were read in the round's one forward.
        outcome (`str`): What became of it.
    """

    context: list[int]
    tokens: list[int]
    num_own: int
    risks: list[float]
    quality: float
    outcome: str


@contextmanager
def recorded_segments() -> Iterator[list[Judged]]:
    """Notes every segment that is judged, but for those in whose middle a reflection stands."""
    found: list[Judged] = []
    decide = SegmentDecoder._decide

    def record(decoder: Any, row: Any, turn: Any, reading: Any, quality: float, flag: Any) -> Any:
        context, start, tokens = row.context(0), row.segments.starts[-1], turn.tokens
        is_plain = Provenance.REFLECTION not in row.origins[start:]
        num_own, risks = len(row.tokens) - start + len(tokens), reading.risks[-len(tokens) :]
        flag = decide(decoder, row, turn, reading, quality, flag)
        outcome = decoder.segments[row.index][-1].outcome
        if is_plain and outcome != "dropped":
            found.append(Judged(context, tokens, num_own, risks, quality, outcome))
        return flag

    with patch.object(SegmentDecoder, "_decide", record):
        yield found


@torch.no_grad()
def separate_risks(model: Any, head: Any, segment: Judged) -> list[float]:
    """Of a segment's tokens, from a forward without the quality prompt, pooled from the segment's own beginning."""
    (layer,), num = head.config.hidden_layers, segment.num_own
    ids = torch.tensor([segment.context + segment.tokens])
    states = model(ids, output_hidden_states=True).hidden_states[layer][0, -num:].float()
    pooled = states.cumsum(0) / torch.arange(1, num + 1)[:, None] if head.config.pooling == "mean" else states
    return head.risk(pooled)[-len(segment.tokens) :].tolist()


@torch.no_grad()
def separate_grades(model: Any, tokenizer: Any, segment: Judged, prompt: str) -> dict[QualityReading, float]:
    """A segment's grade by each reading, from a forward over all of the text."""
    ids: Sequence[int] = segment.context + segment.tokens + tokenizer.encode(prompt, add_special_tokens=False)
    logits = model(torch.tensor([ids]), logits_to_keep=1).logits[:, -1]
    digit_ids = find_digit_ids(tokenizer, logits.shape[-1])
    return {reading: float(read_quality(logits, digit_ids, reading)) for reading in get_args(QualityReading)}
