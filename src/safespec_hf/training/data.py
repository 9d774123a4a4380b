"""Labelled answers and prompts from files, checked before any model is loaded."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import SafeSpecError

LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "safe": 0, "unsafe": 1}


class DataError(SafeSpecError):
    """A row that can't be used; names the file, the line (or row) and the field."""

    def __init__(self, path: str, line: int, field: str, problem: str):
        super().__init__(f"{path}, line {line}, field `{field}`: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt and, unless it is yet to be answered, one labelled answer.

    Attributes:
        id (`str`): Unique within a run: source and line.
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

    Fields: `prompt` (or `messages`), `response`, `label` (0/1 or safe/unsafe), and optionally `id`, `group`,
    `category`, `source`, `weight`, `unsafe_from`; see [`Example`].

    Args:
        paths (`Sequence[str]`): The files. A Hub id may end in `:split`, by default `:train`.
        label (`int`, *optional*): Label of rows that have none, for data that is safe or unsafe by construction.
        needs_response (`bool`, *optional*, defaults to `True`): `False` for prompts that are yet to be answered.

    Returns:
        `list[Example]`: In the order of the files.

    Raises:
        DataError: If a row lacks a field or has a bad one.
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
    for path in map(str, paths):
        for line, row in _read_rows(path):
            example = _parse(row, path, line, label, needs_response)
            if example.id in examples:
                raise DataError(path, line, "id", f"{example.id!r} occurs twice; ids must be unique within a run")
            examples[example.id] = example
    if not examples:
        raise SafeSpecError(f"No rows in {', '.join(map(str, paths))}: nothing to do.")
    return list(examples.values())


def hash_file(path: str | os.PathLike[str]) -> str:
    """16 hex digits of a file's content, for provenance."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def base_names(arguments: Sequence[str]) -> list[str]:
    """A command line without folders, for provenance: a published file should not tell where on a machine things lay.

    Example:

        >>> base_names(["/opt/bin/safespec", "report", "data/test.jsonl", "--out=~/report/", "--alpha", "0.02"])
        ['safespec', 'report', 'test.jsonl', '--out=report', '--alpha', '0.02']
    """
    # only an option has a value behind `=`; in a path it is part of the name
    parts = [part.partition("=") if part.startswith("-") else ("", "", part) for part in arguments]
    return [option + equals + (Path(value).name or value) for option, equals, value in parts]


def hash_examples(examples: Sequence[Example]) -> str:
    """16 hex digits over everything in the examples."""
    return hashlib.sha256("\n".join(example.to_json() for example in examples).encode()).hexdigest()[:16]


def _read_rows(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path) or (not os.path.exists(path) and suffix == "" and path.count("/") == 1):
        yield from _read_dataset(path)
    elif not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not a file, nor a folder, nor a data set's id on the Hub (`owner/name`).")
    elif suffix == ".parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]

        rows = pyarrow.parquet.read_table(path).to_pylist()
        yield from ((n, {k: v for k, v in row.items() if v is not None}) for n, row in enumerate(rows, start=1))
    elif suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            yield from ((reader.line_num, {k: v for k, v in row.items() if v != ""}) for row in reader)
    else:
        yield from _read_json_lines(path)


def _read_json_lines(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(path, number, "*", f"not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(path, number, "*", f"expected an object, got {type(row).__name__}")
            yield number, row


def _read_dataset(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import datasets

    if os.path.isdir(path):
        data = datasets.load_from_disk(path)
    else:
        name, _, split = path.partition(":")
        data = datasets.load_dataset(name, split=split or "train")
    yield from enumerate(data, start=1)


def _parse(row: Mapping[str, Any], path: str, line: int, label: int | None, needs_response: bool) -> Example:
    messages = _parse_messages(row, path, line)
    response = row.get("response", "")
    if needs_response and not (isinstance(response, str) and response.strip()):
        raise DataError(path, line, "response", f"expected a text that is not blank, got {response!r:.40}")
    found = row.get("label", label)
    if needs_response and found is None:
        raise DataError(path, line, "label", "missing; add it, or pass the file as safe by construction (`--benign`)")
    if found is not None and found not in LABELS:
        raise DataError(path, line, "label", f"expected 0, 1, 'safe' or 'unsafe', got {found!r:.40}")
    source = str(row.get("source") or Path(path.partition(":")[0]).stem)
    return Example(
        id=str(row.get("id") or f"{source}:{line}"),
        messages=messages,
        response=response if isinstance(response, str) else "",
        label=None if found is None else LABELS[found],
        group=str(row.get("group") or messages[-1]["content"]),
        category=str(row.get("category") or ""),
        source=source,
        weight=_parse_number(row, "weight", 1.0, path, line),
        unsafe_from=int(_parse_number(row, "unsafe_from", 0, path, line)),
    )


def _parse_messages(row: Mapping[str, Any], path: str, line: int) -> tuple[dict[str, str], ...]:
    field = "messages" if "messages" in row else "prompt"
    value = row.get(field)
    if field == "prompt":
        value = [{"role": "user", "content": value}]
    if isinstance(value, str):
        value = json.loads(value)
    messages = list(value) if isinstance(value, Sequence) else []
    for message in messages or [None]:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not (isinstance(content, str) and content.strip()):
            raise DataError(path, line, field, f"expected a text that is not blank, got {content!r:.40}")
    return tuple({"role": str(m["role"]), "content": m["content"]} for m in messages)


def _parse_number(row: Mapping[str, Any], field: str, default: float, path: str, line: int) -> float:
    value = row.get(field, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf") or (field == "weight" and number == 0):
        raise DataError(
            path, line, field, f"expected a finite number {'>' if field == 'weight' else '>='} 0, got {value!r}"
        )
    return number
