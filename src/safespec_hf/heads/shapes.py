"""What the files beside a head must hold, as far as something is made of it: checked once, where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import HeadFileError

NUMBER = (int, float)
# A shape is a type, [shape of each element], {name: shape}, or {"*": shape of each value}. What is null counts as
# missing, but for an object only where its name has a "?"; a name with "!" must be there, unless the whole is empty.
_DATA = [{"name!": str}]
_PROVENANCE = {"time": str, "data": {"*": str}}
_CALIBRATION = {
    "risk_threshold!": NUMBER,
    "alpha!": NUMBER,
    "num_answers!": int,
    "by_source": {"*": dict},
    "max_response_tokens": int,
}
_PROMPTS = {
    "prompt_threshold": NUMBER,
    "alpha!": NUMBER,
    "num_prompts!": {"train!": int, "calibration!": int},
    "flagged!": {"*": {"num!": int, "share!": NUMBER}},
}
_SOURCE = {"auroc": NUMBER, "num_safe!": int, "num_unsafe!": int}
SHAPES: dict[str, dict[str, Any]] = {
    "training.json": {
        "chat_template": str,
        "data": _DATA,
        "provenance": _PROVENANCE,
        "sweep": [{"hidden_layers!": [int], "reading!": [str], "auroc!": NUMBER}],
        "calibration?": _CALIBRATION,
        "prompts?": _PROMPTS,
    },
    "report.json": {
        "results": {"risk_threshold!": NUMBER, "sources": {"*": _SOURCE}, "calibration?": _CALIBRATION},
        "data": _DATA,
        "provenance": _PROVENANCE,
        "benchmarks": {"*": {"dataset_id!": str, "task_id": str}},
    },
}
SHAPES["report.json"]["training"] = SHAPES["training.json"]  # where a head was saved with both
_CALLED = {dict: "an object", list: "a list", str: "a text", int: "an integer", NUMBER: "a number"}


def check_shape(content: Any, name: str, place: str) -> dict[str, Any]:
    """The content of a file, if it is of the shape of these files.

    Args:
        content (`Any`): What was read.
        name (`str`): `"report.json"` or `"training.json"`.
        place (`str`): What errors call the file.

    Raises:
        HeadFileError: Says what is of another shape.

    Example:

        >>> check_shape({"data": [{"name": "garden"}]}, "report.json", "report.json")
        {'data': [{'name': 'garden'}]}
        >>> check_shape({"data": 1}, "report.json", "report.json")
        Traceback (most recent call last):
        safespec_hf.errors.HeadFileError: report.json: `data` must be a list, but it is 1. Remove it, or make it again.
    """
    if not isinstance(content, dict):
        raise HeadFileError(f"{place} must hold a JSON object, but it holds a {type(content).__name__}.")
    if fault := next(_faults(content, SHAPES[name], ""), None):
        raise HeadFileError(f"{place}: {fault}. Remove it, or make it again.")
    return content


def _faults(content: Any, shape: Any, where: str) -> Iterator[str]:
    kind: Any = type(shape) if isinstance(shape, (dict, list)) else shape
    if not isinstance(content, kind) or isinstance(content, bool):
        yield f"`{where}` must be {_CALLED[kind]}, but it is {content!r:.60}"
    elif isinstance(shape, list):
        for index, part in enumerate(content):
            # of an object that may be missing it says nothing to be empty, but a list has what is in it
            yield from [f"`{where}[{index}]` is empty"] if part in ({}, []) else ()
            yield from _faults(part, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict) and content:
        fields = dict.fromkeys(content, (shape["*"], True)) if "*" in shape else dict(_fields(shape, content))
        for name, (part, is_needed) in fields.items():
            if is_needed or content.get(name) is not None:
                yield from _faults(content.get(name), part, f"{where}.{name}".removeprefix("."))


def _fields(shape: dict[str, Any], content: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, bool]]]:
    """Each field that is known by its name, with its shape and whether it must be one."""
    for title, part in shape.items():
        name = title.rstrip("!?")
        is_object = isinstance(part, dict) and not title.endswith("?")
        yield name, (part, title.endswith("!") or (is_object and name in content))
