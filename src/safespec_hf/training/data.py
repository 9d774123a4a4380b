"""Labelled answers and prompts from files, checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import SafeSpecError
from .files import DataError, RawRow, distinct_names, hash_file, read_rows

__all__ = ["LABELS", "DataError", "Example", "base_names", "hash_examples", "hash_file", "load_examples"]

LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "safe": 0, "unsafe": 1}
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and, unless it is yet to be answered, one labelled answer.

    Attributes:
        id (`str`): Unique within a run: source and line unless the file says otherwise.
        messages (`tuple[dict[str, str], ...]`): The conversation up to the answer, for the chat template.
        response (`str`): The answer; empty for a prompt that is yet to be answered.
        label (`int`, *optional*): 1 if the answer is unsafe, 0 if it is safe.
        group (`str`): What must stay on one side of every split; the prompt unless the file says otherwise.
        category, source (`str`): For reports; the source is the file's name unless the file says otherwise.
        weight (`float`): Of the example in training, > 0.
        unsafe_from (`int`): Characters of an unsafe answer that come before its unsafe part; 0 if it starts so.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    response: str = ""
    label: int | None = None
    group: str = ""
    category: str = ""
    source: str = ""
    weight: float = 1.0
    unsafe_from: int = 0

    def to_json(self) -> str:
        """The example as one line of a JSON lines file that [`load_examples`] reads."""
        return json.dumps(asdict(self), ensure_ascii=False)


def load_examples(
    paths: Sequence[str | os.PathLike[str]], *, label: int | None = None, needs_response: bool = True
) -> list[Example]:
    """Reads JSON lines, Parquet or CSV files, folders of `datasets.save_to_disk`, or ids of data sets on the Hub.

    Text is UTF-8, or what a byte order mark says, and may be gzipped. What can't be read rightly is refused.

    Fields: `prompt` (or `messages`), `response`, `label` (0/1 or safe/unsafe), and optionally `id`, `group`,
    `category`, `source`, `weight`, `unsafe_from`; see [`Example`].

    Args:
        paths (`Sequence[str]`): The files. A Hub id may end in `:split` or `:config:split`, by default `:train`.
        label (`int`, *optional*): Label of rows that have none, for data that is safe or unsafe by construction.
        needs_response (`bool`, *optional*, defaults to `True`): `False` for prompts that are yet to be answered.

    Returns:
        `list[Example]`: In the order of the files.

    Raises:
        DataError: If a row lacks a field or has a bad one.
        SafeSpecError: If a file has no rows, is damaged, or is in an encoding that it does not name.
        FileNotFoundError: If a path is neither a file, nor a folder, nor looks like a Hub id.

    Example:

        >>> import pathlib, tempfile
        >>> from safespec_hf.training.data import load_examples

        >>> file = pathlib.Path(tempfile.mkdtemp(), "garden.jsonl")
        >>> _ = file.write_text('{"prompt": "When to prune roses?", "response": "In late winter.", "label": 0}')
        >>> load_examples([file])[0].source
        'garden'
    """
    examples: dict[str, Example] = {}
    files = list(map(str, paths))
    for path, source in zip(files, _sources(files), strict=True):
        num_before = len(examples)
        for raw in read_rows(path):
            example = _parse(raw, source, label, needs_response)
            if example.id in examples:
                raise raw.error("id", f"{example.id!r} occurs twice; ids must be unique within a run")
            examples[example.id] = example
        if len(examples) == num_before:
            raise SafeSpecError(f"No rows in {path}: nothing to do.")
    return list(examples.values())


def base_names(arguments: Sequence[str]) -> list[str]:
    """A command line without folders, for provenance: a published file should not tell where on a machine things lay.

    Example:

        >>> base_names(["/opt/bin/safespec", "report", "data/test.jsonl", "--out=~/report/", "--alpha", "0.02"])
        ['safespec', 'report', 'test.jsonl', '--out=report', '--alpha', '0.02']
    """
    # only an option has a value behind `=`; in a path it is part of the name
    parts = [part.partition("=") if part.startswith("-") else ("", "", part) for part in arguments]
    return [option + equals + (Path(value).name or value) for option, equals, value in parts]


def _sources(paths: Sequence[str]) -> list[str]:
    """What rows call their file if they don't say: its name without an ending; with a folder, if two have one name."""
    stems = [
        os.path.splitext(path.removesuffix(".gz"))[0] if os.path.exists(path) else path.partition(":")[0]
        for path in paths
    ]
    return distinct_names([path if stems.count(stem) > 1 else stem for path, stem in zip(paths, stems, strict=True)])


def hash_examples(examples: Sequence[Example]) -> str:
    """16 hex digits over everything in the examples."""
    return hashlib.sha256("\n".join(example.to_json() for example in examples).encode()).hexdigest()[:16]


def _parse(raw: RawRow, source: str, label: int | None, needs_response: bool) -> Example:
    messages = parse_messages(raw)
    response = _parse_text(raw, "response", "", may_be_blank=not needs_response)
    label = _parse_label(raw, label)
    if needs_response and label is None:
        raise raw.error("label", "missing; add it, or pass the file as safe by construction (`--benign`)")
    source = _parse_text(raw, "source", source)
    return Example(
        id=_parse_text(raw, "id", f"{source}:{raw.number}"),
        messages=messages,
        response=response,
        label=label,
        group=_parse_text(raw, "group", messages[-1]["content"]),
        category=_parse_text(raw, "category", "", may_be_blank=True),
        source=source,
        weight=_parse_weight(raw),
        unsafe_from=_parse_unsafe_from(raw, response if needs_response else None, label),
    )


def check_text(raw: RawRow, field: str, value: object, *, may_be_blank: bool = False, inside: str = "") -> str:
    """The value of a field that must be a text, which it raises for unless it is one."""
    if not isinstance(value, str) or not (may_be_blank or value.strip()):
        expected = "a text" if may_be_blank else "a text that is not blank"
        raise raw.error(field, f"{inside}expected {expected}, got {value!r:.40}")
    surrogate = next((index for index, char in enumerate(value) if "\ud800" <= char <= "\udfff"), None)
    if surrogate is not None:
        half = f"character {surrogate}, {value[surrogate]!a}"
        raise raw.error(field, f"{inside}{half}, is one half of a pair (a lone surrogate), which no file can hold")
    return value


def _parse_text(raw: RawRow, field: str, default: str, *, may_be_blank: bool = False) -> str:
    value = raw.values.get(field, default)
    if field == "response":
        return check_text(raw, field, value, may_be_blank=may_be_blank)
    # names are often numbers, and 0 is one
    name = str(value) if isinstance(value, (int, float)) else value
    return check_text(raw, field, default if name == "" else name, may_be_blank=may_be_blank)


def _parse_label(raw: RawRow, default: int | None) -> int | None:
    value = raw.values.get("label")
    if value is None:
        return default
    # a table of numbers with gaps has 1.0 for 1; `true` may as well mean that the answer is safe
    key = value.strip().lower().removesuffix(".0") if isinstance(value, str) else value
    if isinstance(key, bool) or not isinstance(key, (int, float, str)) or key not in LABELS:
        raise raw.error("label", f"expected 0, 1, 'safe' or 'unsafe', got {value!r:.40}")
    return LABELS[key]


def parse_messages(raw: RawRow) -> tuple[dict[str, str], ...]:
    """The conversation of a row, up to the answer: its `messages`, or else its `prompt`.

    Raises:
        DataError: If it has neither, or if they are no conversation in which the last one asks.
    """
    if "messages" not in raw.values:
        prompt = check_text(raw, "prompt", raw.values.get("prompt"))
        return ({"role": "user", "content": prompt},)
    value = raw.values["messages"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise raw.error("messages", f"expected messages, or JSON of them, got the text {value!r:.40}") from error
    if not isinstance(value, (list, tuple)) or not value:
        raise raw.error("messages", f"expected a list of messages, got {value!r:.40}")
    messages = tuple(_parse_message(raw, f"messages[{number}]", message) for number, message in enumerate(value))
    if messages[-1]["role"] not in ("user", "tool"):
        raise raw.error(
            "messages",
            f"the last one must ask, but its role is {messages[-1]['role']!r}; an answer goes to `response`",
        )
    return messages


def _parse_message(raw: RawRow, field: str, message: object) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise raw.error("messages", f"expected objects with `role` and `content`, got {message!r:.40} in {field}")
    role = message.get("role")
    if role not in ROLES:
        raise raw.error("messages", f"`role` in {field} must be one of {', '.join(ROLES)}, but it is {role!r:.40}")
    content = check_text(raw, "messages", message.get("content"), inside=f"`content` in {field}: ")
    return {"role": str(role), "content": content}


def _parse_number(raw: RawRow, field: str, default: float, legal: str) -> float:
    value = raw.values.get(field, default)
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < math.inf:
        raise raw.error(field, f"expected {legal}, got {value!r:.40}")
    return number


def _parse_weight(raw: RawRow) -> float:
    legal = "a finite number > 0"
    weight = _parse_number(raw, "weight", 1.0, legal)
    if weight == 0:
        raise raw.error("weight", f"expected {legal}, got 0; leave the row out")
    return weight


def _parse_unsafe_from(raw: RawRow, response: str | None, label: int | None) -> int:
    legal = "a whole number of characters >= 0"
    number = _parse_number(raw, "unsafe_from", 0, legal)
    if number != int(number):
        raise raw.error("unsafe_from", f"expected {legal}, got {number}")
    if response is not None and number > len(response) - (label == 1):
        raise raw.error(
            "unsafe_from", f"{number:.0f} leaves nothing of the answer, which has {len(response)} characters"
        )
    return int(number)
