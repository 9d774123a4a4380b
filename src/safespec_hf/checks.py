"""Values of configs are checked by name, type and range."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

MAX_FLOAT = sys.float_info.max


def check_value(name: str, value: object, is_legal: bool, legal: str) -> None:
    """Raises unless a value is legal.

    Raises:
        ValueError: Names the field, its legal range and its value.

    Example:

        >>> check_value("num_candidates", 0, False, ">= 1")
        Traceback (most recent call last):
        ValueError: `num_candidates` must be >= 1, but it is 0.
    """
    if not is_legal:
        raise ValueError(f"`{name}` must be {legal}, but it is {value!r}.")


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field names of a config class to their types, without inherited ones: transformers' can't be evaluated."""
    own = SimpleNamespace(__annotations__=dict(cls.__annotations__))
    return get_type_hints(own, globalns=vars(sys.modules[cls.__module__]))


def check_types(config: object, hints: Mapping[str, Any]) -> None:
    """Raises unless all fields are of their types.

    Raises:
        TypeError: Names the field, its legal type and its value.
    """
    for name, hint in hints.items():
        value = getattr(config, name)
        if not _is_of_type(value, hint):
            legal = getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
            raise TypeError(f"`{name}` must be of type {legal}, but it is a {type(value).__name__}: {value!r}.")


def check_choices(config: object, hints: Mapping[str, Any]) -> None:
    """Raises unless every field of a `Literal` type is one of its values.

    Raises:
        ValueError: Names the field, its values and what it is.
    """
    for name, hint in hints.items():
        if get_origin(hint) is Literal:
            value, choices = getattr(config, name), get_args(hint)
            check_value(name, value, value in choices, f"one of {choices}")


def _is_of_type(value: object, hint: Any) -> bool:
    """`True` is no number, a whole number is a float as well, and NumPy's integers are not what JSON can hold."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_is_of_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if arguments:
        return any(_is_of_type(value, argument) for argument in arguments)
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, hint)):
            return False
        return hint is int or isinstance(value, float) or abs(value) <= MAX_FLOAT
    return isinstance(value, hint)
