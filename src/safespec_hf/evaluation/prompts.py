"""Sets of prompts that methods are compared on, and what a set is for."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..errors import SafeSpecError
from ..training.data import check_text, parse_messages
from ..training.files import DataFileError, RawRow, distinct_names, read_rows

Kind = Literal["attacks", "benign", "borderline", "tasks", "multi-turn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REFERENCES = ("reference", "answer", "response")
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One thing to ask, of one set.

    Attributes:
        id (`str`): Unique within its set.
        set_name (`str`), kind (`str`): The set, and what it is for.
        number (`int`): Its place in the set.
        messages (`tuple[dict[str, str], ...]`): The conversation up to the first answer.
        later_turns (`tuple[str, ...]`): What the user says after each answer but the last.
        request (`str`): What is really wanted, for a judge: an attack's goal, without its wrapping.
        reference (`str`, *optional*): The right answer of a task.
    """

    id: str
    set_name: str
    kind: Kind
    number: int
    messages: tuple[Message, ...]
    later_turns: tuple[str, ...] = ()
    request: str
    reference: str | None = None

    @property
    def num_turns(self) -> int:
        """Answers that it takes."""
        return 1 + len(self.later_turns)

    def requests(self) -> list[str]:
        """What a judge is told was asked for, by turn."""
        return [self.request, *self.later_turns]


def load_prompt_sets(
    files: Mapping[Kind, Sequence[str | os.PathLike[str]]], *, limit: int | None = None
) -> dict[str, list[Prompt]]:
    """Reads sets of prompts. A set has the name of its file, without the ending.

    A row is asked as its `messages` say, else its `turns` (all of them in a multi-turn set, else the first), its
    `jailbreak_prompt`, `prompt` or `question`. `query`, if there is one, is what is really wanted. A task has its
    right answer in `reference`, `answer` or `response`. Rows of a borderline set that are labelled unsafe are left
    out: refusing them is right.

    Args:
        files (`Mapping[str, Sequence[str]]`): By kind; whatever `safespec collect` reads.
        limit (`int`, *optional*): So many rows of each set at most, drawn evenly; a larger limit only adds some.

    Raises:
        DataError: If a row lacks what it needs; names its place.
        SafeSpecError: If there is nothing to ask, or a file can't be read.

    Example:

        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "garden.jsonl")
        >>> _ = file.write_text('{"query": "Prune roses.", "jailbreak_prompt": "Play a gardener. Prune roses."}')
        >>> sets = load_prompt_sets({"attacks": [file]})
        >>> sets["garden"][0].request
        'Prune roses.'
    """
    paths = [(kind, str(path)) for kind in KINDS for path in files.get(kind, ())]
    if not paths:
        raise SafeSpecError("Give prompts to answer: at least one file of attacks, benign or other prompts.")
    stems = [os.path.splitext(path.removesuffix(".gz"))[0] for _, path in paths]
    twice = [path for (_, path), stem in zip(paths, stems, strict=True) if stems.count(stem) > 1]
    if twice:
        raise SafeSpecError(f"{twice[0]} is given twice. A set is of one kind, and asked once.")
    named = zip(distinct_names(stems), paths, strict=True)
    return {name: _load_set(name, kind, path, limit) for name, (kind, path) in named}


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """16 hex digits over everything in the prompts."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()[:16]


def _load_set(name: str, kind: Kind, path: str, limit: int | None) -> list[Prompt]:
    raws = [raw for raw in read_rows(path) if kind != "borderline" or raw.values.get("label") not in ("unsafe", 1)]
    # drawn over the whole file, as many files are sorted by topic
    order = random.Random(0).sample(range(len(raws)), len(raws))[:limit]
    prompts = [_parse(raws[index], name, kind, index) for index in sorted(order)]
    if not prompts:
        raise DataFileError(path, "no rows to ask.")
    ids = [prompt.id for prompt in prompts]
    again = next((prompt for prompt in prompts if ids.count(prompt.id) > 1), None)
    if again is not None:
        raise DataFileError(path, f"the id {again.id!r} occurs twice; ids must be unique within a set.")
    return prompts


def _parse(raw: RawRow, name: str, kind: Kind, number: int) -> Prompt:
    messages, later = _parse_turns(raw, kind)
    request = check_text(raw, "query", raw.values.get("query", messages[-1]["content"]))
    reference = None
    if kind == "tasks":
        field = next((field for field in REFERENCES if field in raw.values), REFERENCES[0])
        value = raw.values.get(field)
        reference = check_text(raw, field, str(value) if isinstance(value, (int, float)) else value)
    return Prompt(
        id=str(raw.values.get("id", raw.values.get("question_id", number))),
        set_name=name,
        kind=kind,
        number=number,
        messages=messages,
        later_turns=later,
        request=request,
        reference=reference,
    )


def _parse_turns(raw: RawRow, kind: Kind) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    if "messages" in raw.values:
        return parse_messages(raw), ()
    if "turns" not in raw.values:
        field = next((field for field in ("jailbreak_prompt", "prompt", "question") if field in raw.values), "prompt")
        return (_from_user(check_text(raw, field, raw.values.get(field))),), ()
    turns: Any = raw.values["turns"]
    if not isinstance(turns, list) or not turns:
        raise raw.error("turns", f"expected a list of texts, got {turns!r:.40}")
    texts = [check_text(raw, "turns", turn) for turn in turns]
    return (_from_user(texts[0]),), tuple(texts[1:]) if kind == "multi-turn" else ()


def _from_user(text: str) -> Message:
    return {"role": "user", "content": text}
