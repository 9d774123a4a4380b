"""Methods by name: `safespec:num_candidates=20` is the guarded loop with that field of its policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .. import config
from ..config import SafeSpecConfig
from ..errors import SafeSpecError
from ..training.settings import check_number
from .judges import Judge
from .methods import Forced, Guarded, Method, Plain, Screened
from .safedecoding import SafeDecoding

Make = Callable[[str, Mapping[str, str | Any], Judge | None], Method]
DEFAULT_EVERY = 16


def parse_method(spec: str, guard: Judge | None = None) -> Method:
    """The method that a specification names.

    Args:
        spec (`str`):
            A name of [`METHODS`]; or the name, a colon, and its options: `name=value,...`, or a JSON object, for texts
            with commas in them. Options are fields of [`SafeSpecConfig`] for guarded methods, `threshold` and `every`
            for those with a guard model, and those of [`SafeDecoding`] for `safedecoding`.
        guard ([`Judge`], *optional*): For `guard_finished` and `guard_every_n`.

    Raises:
        SafeSpecError: If there is no such method or option, or a value is out of its range.

    Example:

        >>> parse_method("safespec:num_candidates=20,reflection=").policy.num_candidates
        20
    """
    name, _, text = spec.partition(":")
    if name not in METHODS:
        raise SafeSpecError(f"There is no method {name!r}. The methods are {', '.join(METHODS)}.")
    try:
        return METHODS[name](spec, _parse_options(text), guard)
    except (TypeError, ValueError) as error:
        raise SafeSpecError(f"The method {spec!r} can't be had: {error}") from error


def _parse_options(text: str) -> dict[str, Any]:
    """Values are texts; those in a JSON object are what they are there."""
    if text.startswith("{"):
        options: dict[str, Any] = json.loads(text)
        return options
    pairs = [part.partition("=") for part in text.split(",") if part]
    bad = next((name for name, equals, _ in pairs if not equals), None)
    if bad is not None:
        raise SafeSpecError(f"options are written `name=value`, but got {bad!r}.")
    return {name: _Text(value) for name, _, value in pairs}


class _Text(str):
    """A value as it was written on a command line, whatever its type is to be."""


def _policy(options: Mapping[str, Any], **own: Any) -> SafeSpecConfig:
    hints = get_type_hints(SafeSpecConfig, globalns=vars(config))
    typed = {
        name: _read(value, hints.get(name)) if isinstance(value, _Text) else value for name, value in options.items()
    }
    return SafeSpecConfig.from_dict({**own, **typed})


def _read(text: str, hint: Any) -> Any:
    """A written value as what a field takes: texts as they are, everything else as JSON has it."""
    kinds = get_args(hint) or (hint,)
    takes_text = str in kinds or get_origin(hint) is Literal or any(get_origin(kind) is Literal for kind in kinds)
    if takes_text and not (text == "null" and type(None) in kinds):
        return str(text)
    try:
        return json.loads(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        return str(text)  # of a wrong type, and the policy says so


def _plain(spec: str, options: Mapping[str, Any], guard: Judge | None, *, is_reminded: bool = False) -> Method:
    if options:
        raise ValueError("it has no options.")
    return Plain(name=spec, is_reminded=is_reminded)


def _guarded(
    spec: str,
    options: Mapping[str, Any],
    guard: Judge | None,
    *,
    own: Mapping[str, Any] | None = None,
    is_monitored: bool = True,
    is_reminded: bool = False,
) -> Method:
    missing = [name for name in own or {} if name not in {field.name for field in fields(SafeSpecConfig)}]
    if missing:
        raise ValueError(f"this version has no `{missing[0]}`.")
    policy = _policy(options, **(own or {}))
    return Guarded(name=spec, policy=policy, is_monitored=is_monitored, is_reminded=is_reminded)


def _forced(spec: str, options: Mapping[str, Any], guard: Judge | None) -> Method:
    return Forced(name=spec, policy=_policy(options))


def _screened(spec: str, options: Mapping[str, Any], guard: Judge | None, *, is_streamed: bool) -> Method:
    if guard is None:
        raise ValueError("it needs a guard model: give one with `--guard`.")
    values: dict[str, Any] = {"threshold": guard.threshold, "every": DEFAULT_EVERY if is_streamed else None}
    _check_names(options, [name for name in values if name != "every" or is_streamed])
    values |= {name: json.loads(value) if isinstance(value, _Text) else value for name, value in options.items()}
    check_number("threshold", values["threshold"], "(0, 1]")
    if is_streamed:
        check_number("every", values["every"], "[1, inf)", "an integer")
    return Screened(name=spec, guard=guard, threshold=float(values["threshold"]), every=values["every"])


def _safedecoding(spec: str, options: Mapping[str, Any], guard: Judge | None) -> Method:
    hints = {"expert": str, "alpha": float, "first_tokens": int, "num_common": int}
    _check_names(options, list(hints))
    if not isinstance(options.get("expert"), str) or not options["expert"]:
        raise ValueError("it needs an expert: `expert=PATH`, a LoRA adapter of the target, or a model.")
    typed = {name: _read(value, hints[name]) if isinstance(value, _Text) else value for name, value in options.items()}
    return SafeDecoding(name=spec, **typed)


def _check_names(options: Mapping[str, Any], legal: Sequence[str]) -> None:
    unknown = [name for name in options if name not in legal]
    if unknown:
        raise ValueError(f"it has no option {unknown[0]!r}; its options are {', '.join(legal)}.")


METHODS: dict[str, Make] = {
    "target": _plain,
    "assisted": partial(_guarded, is_monitored=False),
    "safespec": _guarded,
    "self_reminder": partial(_plain, is_reminded=True),
    "safespec+self_reminder": partial(_guarded, is_reminded=True),
    "refuse": partial(_guarded, own={"max_recoveries": 0}),
    "guard_finished": partial(_screened, is_streamed=False),
    "guard_every_n": partial(_screened, is_streamed=True),
    "specreason": partial(_guarded, own={"verification": "segment"}, is_monitored=False),
    "safedecoding": _safedecoding,
    "forced": _forced,
}
"""What there is to compare: see [`parse_method`]."""
