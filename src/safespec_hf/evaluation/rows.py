"""The file of an evaluation: a row for each answer, whoever appended it, and what it was begun with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SafeSpecError
from ..training.files import DataError, read_rows, write_whole
from ..training.settings import differences
from .engine import Reply

SETTINGS_SUFFIX, PART = ".settings.json", ".part-"
Row = Mapping[str, Any]
FIELDS: dict[str, type] = {
    **dict.fromkeys(("method", "set", "kind", "prompt", "request", "answer", "finish_reason"), str),
    **dict.fromkeys(("number", "turn", "num_recovered"), int),
    **dict.fromkeys(("tokens", "events"), list),
    "seconds": float,
}
MAY_BE_NULL = ("reference", "risk_max", "risk_threshold", "statistics", "log_prob", "recovered_log_prob")


class Key(NamedTuple):
    """What there is one row of."""

    method: str
    set_name: str
    prompt: str
    turn: int


def key_of(row: Row) -> Key:
    """The key of a row."""
    return Key(row["method"], row["set"], row["prompt"], row["turn"])


class AnswerFile:
    """JSON lines of answers, with the settings that they were made with in `<path>.settings.json` beside them.

    Process r of several appends to a part of its own, `<path>.part-r`; `merge` makes one file of all.

    Args:
        path (`Path`): The file.
        process_index (`int`, defaults to 0), num_processes (`int`, defaults to 1): Who writes.
    """

    def __init__(self, path: Path, process_index: int = 0, num_processes: int = 1):
        self.path = path
        self._own = path.with_name(f"{path.name}{PART}{process_index}") if num_processes > 1 else path

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows, all of them on disk when it returns."""
        with self._own.open("a", encoding="utf-8") as file:
            file.write("".join(_to_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> dict[Key, Row]:
        """All whole rows, of all processes. A line that a kill left incomplete is passed over."""
        return {key_of(row): row for path in [self.path, *self._parts()] for row in _read_lines(path)}

    def merge(self) -> None:
        """One file of all parts, in the order of the settings: by method, set, prompt and turn. For one process."""
        rows = self.read()
        if not rows and not self.path.exists():
            return
        settings = self.read_settings()
        methods, sets = (list(settings.get(name, {})) for name in ("methods", "sets"))

        def place(row: Row) -> tuple[int, int, int, int]:
            return methods.index(row["method"]), sets.index(row["set"]), row["number"], row["turn"]

        parts = self._parts()
        text = "".join(_to_line(row) for row in sorted(rows.values(), key=place))
        if parts or text.encode() != self.path.read_bytes():  # a kill may have cut a character, which is no text
            write_whole(self.path, text)
        for part in parts:
            part.unlink()

    def read_settings(self) -> dict[str, Any]:
        """What the file was begun with; empty if it was not."""
        file = self._settings_file()
        if not file.exists():
            return {}
        try:
            settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SafeSpecError(f"{file} is not JSON: {error}. Give another file for the answers.") from error
        return settings

    def check_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the file is of, with what is new in it: methods and sets may be added, others stay as they are.

        Args:
            settings (`Mapping[str, Any]`): `common`, `methods` and `sets`, each a dict of what answers depend on.

        Raises:
            SafeSpecError: If the file was begun with another target or other settings, a method or set of one name is
                another one now, or the file was written by something else.
        """
        begun = self.read_settings()
        if not begun and self.path.exists() and self.path.stat().st_size:
            raise SafeSpecError(f"{self.path} was not begun by `safespec evaluate`. Give another file.")
        for part, now in settings.items():
            before = begun.get(part, {})
            changed = [name for name in now if name in before and before[name] != now[name]]
            if part == "common" and begun:
                changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if changed:
                name = changed[0]
                was, now_is = differences(before.get(name), now.get(name))
                raise SafeSpecError(
                    f"{self.path} was begun with other settings: in {part}, {name!r} was {was!r:.300} "
                    f"and is {now_is!r:.300} now. Give another file, or delete this one."
                )
        return {part: {**begun.get(part, {}), **now} for part, now in settings.items()}

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Keeps what [`~AnswerFile.check_settings`] returned."""
        write_whole(self._settings_file(), json.dumps(settings, indent=2) + "\n")

    def _settings_file(self) -> Path:
        return self.path.with_name(self.path.name + SETTINGS_SUFFIX)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}{PART}*"))


def read_answers(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file that `safespec evaluate` wrote.

    Raises:
        DataError: If a row is none of these; names its place.
        SafeSpecError: If there are none.
    """
    rows: list[Row] = []
    for raw in read_rows(str(path)):
        bad = next((field for field, kind in FIELDS.items() if not isinstance(raw.values.get(field), kind)), None)
        if bad is not None:
            raise raw.error(bad, "missing, or of another type: this is no row that `safespec evaluate` wrote")
        rows.append({**dict.fromkeys(MAY_BE_NULL), **raw.values})  # which a reader of any data leaves out
    if not rows:
        raise SafeSpecError(f"No rows in {path}: nothing to report.")
    return rows


def to_reply(row: Row) -> Reply:
    """What a row says, as far as other methods need it."""
    return Reply(
        text=row["answer"], tokens=list(row["tokens"]), finish_reason=row["finish_reason"], seconds=row["seconds"]
    )


def read_keyed(path: Path) -> dict[str, dict[str, Any]]:
    """JSON lines by their `key`, after cutting off one that a kill left incomplete; none where there is no file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    return {row["key"]: row for row in map(json.loads, complete.splitlines())}


def _to_line(row: Row) -> str:
    # NaN and infinities, as of candidates that were never finished, become null: other readers refuse them
    finite = json.loads(json.dumps(row), parse_constant=lambda _: None)
    return json.dumps(finite, ensure_ascii=False) + "\n"


def _read_lines(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(str(path), number, "*", f"not JSON: {error}") from error
