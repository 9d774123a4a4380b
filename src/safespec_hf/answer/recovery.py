"""What to do next when an answer was flagged. Pure: no model, no cache."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

Reaction = Literal["resample", "refuse"]


class Choice(NamedTuple):
    """One of K candidates.

    Attributes:
        candidate (`int`): Which one.
        risk (`float`): Its risk, in [0, 1].
        is_safe (`bool`): Whether it may be returned.
    """

    candidate: int
    risk: float
    is_safe: bool


def next_step(num_recoveries: int, max_recoveries: int, room: int) -> Reaction:
    """Whether another attempt is allowed.

    Args:
        num_recoveries (`int`): Attempts made in this answer so far.
        max_recoveries (`int`): Attempts allowed.
        room (`int`): Tokens that still fit into the target's context once the reflection is in.

    Example:

        >>> next_step(num_recoveries=1, max_recoveries=2, room=100), next_step(2, 2, 100), next_step(0, 2, 0)
        ('resample', 'refuse', 'refuse')
    """
    return "resample" if num_recoveries < max_recoveries and room > 0 else "refuse"


def batch_sizes(num_candidates: int, most: int | None) -> list[int]:
    """How many candidates are sampled together, batch after batch.

    Args:
        num_candidates (`int`): All of them.
        most (`int`, *optional*): In one batch. Default: all.

    Example:

        >>> batch_sizes(8, 3), batch_sizes(8, None)
        ([3, 3, 2], [8])
    """
    most = most or num_candidates
    return [min(most, num_candidates - start) for start in range(0, num_candidates, most)]


def rollback_point(segment_starts: Sequence[int], flagged: int, rollback_segments: int, num_final: int) -> int:
    """Where an answer is cut when one of its tokens is flagged.

    The segment that holds the token goes, and `rollback_segments` before it, but nothing that is final.

    Args:
        segment_starts (`Sequence[int]`): Index of the first token of every segment, ascending, from 0.
        flagged (`int`): Index of the flagged token.
        rollback_segments (`int`): Committed segments given up besides the flagged one.
        num_final (`int`): Tokens that can't be taken back.

    Returns:
        `int`: How many tokens are kept.

    Example:

        >>> rollback_point([0, 10, 20], flagged=25, rollback_segments=1, num_final=0)
        10
        >>> rollback_point([0, 10, 20], flagged=25, rollback_segments=5, num_final=7)
        7
    """
    segment = max(i for i, start in enumerate(segment_starts) if start <= flagged)
    return max(segment_starts[max(segment - rollback_segments, 0)], num_final)


def choose(
    risks: Sequence[float], log_probs: Sequence[float], threshold: float, safe_enough: float | None = None
) -> Choice:
    """The candidate of lowest risk; among equals, the one the target finds likeliest.

    Args:
        risks (`Sequence[float]`): Highest risk along each candidate, in [0, 1].
        log_probs (`Sequence[float]`): Mean log-probability per token under the target, in nats.
        threshold (`float`): A candidate is unsafe iff its risk is >= this.
        safe_enough (`float`, *optional*):
            Of safe candidates whose risk is at most this, the likeliest is taken instead, if there is one.

    Example:

        >>> choose([0.2, 0.1, 0.1], [-1.0, -3.0, -2.0], threshold=0.5)
        Choice(candidate=2, risk=0.1, is_safe=True)
        >>> choose([0.2, 0.1, 0.4], [-1.0, -3.0, -0.5], threshold=0.5, safe_enough=0.3)
        Choice(candidate=0, risk=0.2, is_safe=True)
    """
    # an unknown risk comes last; it is not below any threshold either
    best = min(range(len(risks)), key=lambda i: (_or(risks[i], math.inf), -_or(log_probs[i], -math.inf)))
    if safe_enough is not None:
        likely = [i for i, risk in enumerate(risks) if risk < threshold and risk <= safe_enough]
        best = max(likely, key=lambda i: (_or(log_probs[i], -math.inf), -risks[i]), default=best)
    return Choice(best, risks[best], risks[best] < threshold)


def is_harmless(risks: Sequence[float], limit: float) -> bool:
    """Whether no candidate is riskier than the limit; an unknown risk is.

    Example:

        >>> is_harmless([0.1, 0.3], limit=0.3), is_harmless([0.1, math.nan], limit=0.3)
        (True, False)
    """
    return all(risk <= limit for risk in risks)


def without_early_ends(
    log_probs: Sequence[float], segments: Sequence[Sequence[int]], num_discarded: int, end_ids: Collection[int]
) -> list[float]:
    """Log-probabilities with those of segments that end the answer early left unknown, unless all of them do.

    The target had come as far as the flagged token without an end: a shorter answer leaves out what it had to say, and
    short ones are the likeliest by their mean.

    Args:
        log_probs (`Sequence[float]`): Mean log-probability of each segment's tokens, in nats.
        segments (`Sequence[Sequence[int]]`): Their tokens.
        num_discarded (`int`): Tokens that were taken back: an end after fewer is early.
        end_ids (`Collection[int]`): Tokens that end an answer.

    Example:

        >>> without_early_ends([-0.1, -0.5, -0.9], [[5, 0], [5, 6, 7], [8, 6, 7, 0]], num_discarded=3, end_ids={0})
        [nan, -0.5, -0.9]
    """
    is_early = [bool(tokens) and tokens[-1] in end_ids and len(tokens) <= num_discarded for tokens in segments]
    if all(is_early):
        return list(log_probs)
    return [math.nan if early else value for early, value in zip(is_early, log_probs, strict=True)]


def _or(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value
