"""The arithmetic of the speed benchmark: intervals, theory, engine efficiency, bars. Pure: no model, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NUM_RESAMPLES = 10_000
EFFICIENCY_FORMULA = (
    "engine_efficiency = measured_speedup / raw_speedup. measured_speedup = tokens per second of our arm / those of "
    "target.generate, whole calls. raw_speedup = (N_ours / R_ours) / (N_plain / R_plain), where N counts the returned "
    "tokens, R_plain = prefill + (N_plain - 1) * t(1), R_ours = prefill + sum over our rounds after the first of "
    "t(block of that round) + seconds of our raw draft forwards, and t(n) is the median time of a raw target forward "
    "of n tokens on a KV cache that holds the prompt and half of the answer, timed right after the prompt's arms (for "
    "R_ours in inference mode, and with packed weights if our arm ran so). "
    "raw_share = R_ours / seconds of our arm is the stricter figure, in which target.generate plays no part."
)


class Interval(NamedTuple):
    """A median with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float
    num: int


def bootstrap_median(values: Sequence[float], num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap over prompts; what is not a number is left out."""
    kept = np.array([value for value in values if not math.isnan(value)])
    if not kept.size:
        return Interval(math.nan, math.nan, math.nan, 0)
    picks = np.random.default_rng(seed).integers(kept.size, size=(num_resamples, kept.size))
    low, high = np.quantile(np.median(kept[picks], axis=1), [0.025, 0.975])
    return Interval(float(np.median(kept)), float(low), float(high), int(kept.size))


def expected_tokens_per_round(acceptance: float, num_drafts: int) -> float:
    """(1 - a^(g+1)) / (1 - a): a round gives the accepted drafts and one token of the target's own.

    Leviathan et al., arXiv 2211.17192, equation 1, for drafts that are accepted independently with probability a.
    """
    if acceptance == 1:
        return num_drafts + 1.0
    return (1 - acceptance ** (num_drafts + 1)) / (1 - acceptance)


def theoretical_speedup(acceptance: float, num_drafts: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Tokens per round over the cost of a round, in target steps: v + g * c.

    Args:
        draft_cost: c, a draft step over a target step of one token.
        verify_cost: v, a target forward of g + 1 tokens over a target step of one token; 1 in the textbook.
    """
    return expected_tokens_per_round(acceptance, num_drafts) / (verify_cost + num_drafts * draft_cost)


def count_rounds(is_agreed: Sequence[bool], num_drafts: int) -> int:
    """Rounds that a perfect engine needs for tokens of which the draft agrees on exactly these."""
    rounds, position = 0, 0
    while position < len(is_agreed):
        run = 0
        while run < num_drafts and position + run < len(is_agreed) and is_agreed[position + run]:
            run += 1
        position += run + 1
        rounds += 1
    return rounds


def plain_raw_seconds(num_tokens: int, prefill: float, blocks: Mapping[int, float]) -> float:
    """R_plain of the formula."""
    return prefill + (num_tokens - 1) * blocks[1]


def ours_raw_seconds(
    num_rounds_of: Mapping[int, int], prefill: float, blocks: Mapping[int, float], draft: float
) -> float:
    """R_ours of the formula. `num_rounds_of` counts the rounds after the first by the size of their block."""
    return prefill + sum(num * blocks[size] for size, num in num_rounds_of.items()) + draft


def engine_efficiency(measured_speedup: float, raw_speedup: float) -> float:
    """See `EFFICIENCY_FORMULA`."""
    return measured_speedup / raw_speedup


def tokens_per_second(measured: Mapping[str, Any]) -> float:
    return float(measured["num_tokens"] / measured["seconds"])


def ratios(records: Sequence[Mapping[str, Any]], arm: str, base: str, of: str = "tokens_per_second") -> list[float]:
    """Per prompt, how much faster an arm is than another: in tokens per second, or by the `seconds` of an answer."""
    pairs = [(record["arms"][arm], record["arms"][base]) for record in records]
    if of == "seconds":
        return [other["seconds"] / own["seconds"] for own, other in pairs]
    return [tokens_per_second(own) / tokens_per_second(other) for own, other in pairs]


def summarise_arm(records: Sequence[Mapping[str, Any]], arm: str, base: str) -> dict[str, Any]:
    """Speed, ratio to `base` overall and by category, and what the rounds were like."""
    runs = [record["arms"][arm] for record in records]
    totals = {
        name: sum(run[name] or 0 for run in runs)
        for name in (
            "num_tokens",
            "num_target_forwards",
            "num_plain_rounds",
            "num_drafted",
            "num_accepted",
            "num_flags",
            "is_as_plain",
        )
    }
    own = ratios(records, arm, base)
    categories = [record["category"] for record in records]
    return {
        "tokens_per_second": bootstrap_median([tokens_per_second(run) for run in runs])._asdict(),
        "ratio": bootstrap_median(own)._asdict(),
        "ratio_by_category": {
            category: bootstrap_median([r for r, c in zip(own, categories, strict=True) if c == category])._asdict()
            for category in dict.fromkeys(categories)
        },
        "acceptance_rate": divide(totals["num_accepted"], totals["num_drafted"]),
        "tokens_per_round": divide(totals["num_tokens"], totals["num_target_forwards"]),
        "target_forwards_per_token": divide(totals["num_target_forwards"], totals["num_tokens"]),
        "num_identical_to_plain": int(totals["is_as_plain"]),
        "num_plain_rounds": int(totals["num_plain_rounds"]),
        "num_flags": int(totals["num_flags"]),
        "num_prompts": len(runs),
    }


def divide(one: float, other: float) -> float:
    return one / other if other else math.nan


class Bar(NamedTuple):
    """A figure and the least it has to be. A goal is shown, but does not decide the exit status."""

    part: str
    name: str
    measured: float
    limit: float
    is_goal: bool = False

    @property
    def passes(self) -> bool:
        """False for what could not be measured."""
        return self.measured >= self.limit
