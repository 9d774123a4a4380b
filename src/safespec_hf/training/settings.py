"""Ranges of settings, checked when they are made: long before a model is loaded or a minute is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import SafeSpecError

NUM_SEEDS = 2**31
SEEDS = f"[0, {NUM_SEEDS})"
"""Legal seeds: what is counted up from them is still one to NumPy, which takes 32 bits."""


def check_ranges(settings: Any, ranges: Mapping[str, str]) -> None:
    """Raises unless each field lies in its interval.

    Args:
        settings (`dataclass`): What is checked. A field that is declared as `int` must be one.
        ranges (`Mapping[str, str]`): Intervals by field name, as they are written: `"(0, 1]"`, `"[1, inf)"`.

    Raises:
        SafeSpecError: Names the field, its range and the value.
    """
    declared = {field.name: field.type for field in fields(settings)}
    for name, interval in ranges.items():
        kind = "an integer" if declared[name] in ("int", int) else "a number"
        check_number(name, getattr(settings, name), interval, kind)


def check_number(name: str, value: object, interval: str, kind: str = "a number") -> None:
    """Raises unless a number lies in an interval.

    Args:
        name (`str`): What the number is called.
        value (`object`): The number.
        interval (`str`): As it is written: `"(0, 1]"`, `"[1, inf)"`.
        kind (`str`, *optional*, defaults to `"a number"`): Or `"an integer"`.

    Raises:
        SafeSpecError: If it does not. Not a number, NaN, lies in none.

    Example:

        >>> check_number("alpha", 0.02, "(0, 1)")
        >>> check_number("alpha", 2, "(0, 1)")
        Traceback (most recent call last):
        safespec_hf.errors.SafeSpecError: `alpha` must be a number in (0, 1), but it is 2.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    legal_types = int if kind == "an integer" else (int, float)
    is_legal = isinstance(value, legal_types) and not isinstance(value, bool)
    if is_legal:
        number: Any = value
        is_above = low <= number if interval[0] == "[" else low < number
        is_legal = is_above and (number <= high if interval[-1] == "]" else number < high)
    if not is_legal:
        raise SafeSpecError(f"`{name}` must be {kind} in {interval}, but it is {value!r}.")


def check_counts(settings: Any, *names: str) -> None:
    """Raises unless each of these fields is an integer >= 1."""
    check_ranges(settings, dict.fromkeys(names, "[1, inf)"))


def differences(was: Any, now: Any) -> tuple[Any, Any]:
    """What two settings don't share, of each of them: what is alike would hide what is not.

    Example:

        >>> differences({"seed": 1, "head": {"span": "answer"}}, {"seed": 1, "head": {"span": "segment"}})
        ({'head': {'span': 'answer'}}, {'head': {'span': 'segment'}})
        >>> differences({"seed": 1}, {"seed": 1, "dtype": "float32"})
        ({'dtype': 'not recorded'}, {'dtype': 'float32'})
    """
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        return was, now
    names = [name for name in {**was, **now} if name not in was or name not in now or was[name] != now[name]]
    pairs = {name: differences(*(one.get(name, "not recorded") for one in (was, now))) for name in names}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}
