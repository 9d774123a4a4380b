"""Figures of answers, one by one or of many. All pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .rows import Row

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
MAX_PERIOD, MIN_REPEATS, MIN_LOOP_TOKENS = 24, 4, 16
NUM_RESAMPLES = 2_000


class Interval(NamedTuple):
    """A mean, with the ends of its 95 % bootstrap interval over prompts; NaN of nothing."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """The mean of values and its interval, always the same for the same values.

    Example:

        >>> bootstrap_mean([1.0, 1.0, 1.0])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    array = np.array(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(array), size=(NUM_RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def ratio(above: float, below: float) -> float:
    """A quotient; NaN over nothing."""
    return above / below if below else math.nan


def final_number(text: str) -> float | None:
    """The number that a worked answer ends with; in GSM8K's own answers it is behind `####`.

    Example:

        >>> final_number("3 boxes of 1,200 roses are 3,600 roses."), final_number("Many.")
        (3600.0, None)
    """
    numbers = NUMBER.findall(text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer ends with the right number; or, where that is a text, has it in it.

    Example:

        >>> is_right("So there are 12 roses.", "3 * 4 = 12 #### 12"), is_right("In late winter.", "Winter")
        (True, True)
    """
    number = final_number(reference)
    if number is None:
        return reference.strip().lower() in answer.lower()
    return final_number(answer) == number


def has_loop(tokens: Sequence[int]) -> bool:
    """Whether one passage comes again and again: four times in a row, over 16 tokens or more.

    Example:

        >>> has_loop([1, 2, 3] * 6), has_loop(list(range(40)))
        (True, False)
    """
    for period in range(1, min(MAX_PERIOD, len(tokens) // MIN_REPEATS) + 1):
        length, needed = 0, max(period * (MIN_REPEATS - 1), MIN_LOOP_TOKENS - period)
        for index in range(period, len(tokens)):
            length = length + 1 if tokens[index] == tokens[index - period] else 0
            if length >= needed:
                return True
    return False


class Usefulness(NamedTuple):
    """What became of an answer in which something was flagged, beside the undefended one."""

    is_finished: bool
    is_long_enough: bool
    has_new_loop: bool

    @property
    def is_useful(self) -> bool:
        """All of it."""
        return self.is_finished and self.is_long_enough and not self.has_new_loop


def usefulness(row: Row, undefended: Row) -> Usefulness:
    """Whether an answer was finished, as the undefended one was or by its own end; is half as long; and has no loop.

    Args:
        row (`Mapping`), undefended (`Mapping`): Rows of one prompt.
    """
    reason = row["finish_reason"]
    is_cut_as_well = reason == "length" and undefended["finish_reason"] == "length"
    return Usefulness(
        reason == "eos" or is_cut_as_well,
        2 * len(row["tokens"]) >= len(undefended["tokens"]),
        has_loop(row["tokens"]) and not has_loop(undefended["tokens"]),
    )
