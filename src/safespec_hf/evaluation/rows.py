"""The file of an evaluation: a row for each answer, whoever appended it, and what it was begun with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SafeSpecError
from ..training.files import DataFileError, RawRow, read_own_rows, read_rows, write_whole
from ..training.settings import differences
from .engine import Reply

SETTINGS_SUFFIX, PART = ".settings.json", ".part-"
PARTS = ("common", "methods", "sets")
Row = Mapping[str, Any]
NUMBER = (int, float)
FIELDS: dict[str, type] = {
    **dict.fromkeys(("method", "set", "kind", "prompt", "request", "answer", "finish_reason"), str),
    **dict.fromkeys(("number", "turn", "num_recovered"), int),
    **dict.fromkeys(("tokens", "events"), list),
    "seconds": float,
}
MAY_BE_NULL: dict[str, type | tuple[type, ...]] = {
    "reference": str,
    "statistics": dict,
    **dict.fromkeys(("risk_max", "risk_threshold", "log_prob", "recovered_log_prob"), NUMBER),
}


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
        """All whole rows, of all processes. A line that a kill left incomplete is passed over.

        Raises:
            DataError: If a row is not one of an evaluation; names its place.
        """
        return {key: raw.values for key, raw in self._read().items()}

    def merge(self) -> None:
        """One file of all parts, in the order of the settings: by method, set, prompt and turn. For one process.

        Raises:
            DataError: As [`~AnswerFile.read`], and if a row is of a method or set that the settings don't name.
        """
        rows = self._read()
        if not rows and not self.path.exists():
            return
        settings = self.read_settings()
        known = {field: list(settings.get(f"{field}s", {})) for field in ("method", "set")}

        def place(raw: RawRow) -> tuple[int, ...]:
            row = raw.values
            if unknown := next((field for field in known if row[field] not in known[field]), None):
                raise raw.error(unknown, f"{row[unknown]!r} is none that this file has answers of. Remove the line.")
            return *(names.index(row[field]) for field, names in known.items()), row["number"], row["turn"]

        parts = self._parts()
        text = "".join(_to_line(raw.values) for raw in sorted(rows.values(), key=place))
        if parts or text.encode() != self.path.read_bytes():  # a kill may have cut a character, which is no text
            write_whole(self.path, text)
        for part in parts:
            part.unlink()

    def read_settings(self) -> dict[str, Any]:
        """What the file was begun with; empty if it was not.

        Raises:
            DataFileError: If that is damaged.
        """
        file = self._settings_file()
        if not file.exists():
            return {}
        try:
            settings: Any = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataFileError(str(file), f"not JSON: {error}. Give another file for the answers.") from error
        return _check_parts(settings, file)

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

    def _read(self) -> dict[Key, RawRow]:
        paths = [path for path in [self.path, *self._parts()] if path.exists()]
        raws = [_check_row(raw) for path in paths for raw in read_own_rows(path)]
        return {key_of(raw.values): raw for raw in raws}

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
        rows.append({**dict.fromkeys(MAY_BE_NULL), **_check_row(raw).values})  # which a reader of any data leaves out
    if not rows:
        raise SafeSpecError(f"No rows in {path}: nothing to report.")
    return rows


def to_reply(row: Row) -> Reply:
    """What a row says, as far as other methods need it."""
    return Reply(
        text=row["answer"], tokens=list(row["tokens"]), finish_reason=row["finish_reason"], seconds=row["seconds"]
    )


def read_keyed(path: Path, field: str, kind: type | tuple[type, ...]) -> dict[str, dict[str, Any]]:
    """JSON lines by their `key`, after cutting off one that a kill left incomplete; none where there is no file.

    Args:
        path (`Path`): What results are kept in, so that nothing is asked twice.
        field (`str`), kind (`type`): What a row must have. A damaged one counts as missing.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    rows = map(_load, complete.splitlines())
    return {row["key"]: row for row in rows if isinstance(row.get("key"), str) and isinstance(row.get(field), kind)}


def _load(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _check_row(raw: RawRow) -> RawRow:
    """The row itself, if `safespec evaluate` wrote it."""
    row = raw.values
    bad = [field for field, kind in FIELDS.items() if not isinstance(row.get(field), kind)]
    bad += [field for field, kind in MAY_BE_NULL.items() if not isinstance(row.get(field), (kind, type(None)))]
    bad += [] if bad or all(isinstance(event, dict) for event in row["events"]) else ["events"]
    if bad:
        raise raw.error(bad[0], "missing, or of another type: this is no row that `safespec evaluate` wrote")
    return raw


def _check_parts(settings: Any, file: Path) -> dict[str, Any]:
    """Settings as they are kept: an object for each part, and for each method, its policy and set in there."""
    is_sound = isinstance(settings, dict) and all(isinstance(settings.get(part, {}), dict) for part in PARTS)
    named = [one for part in PARTS[1:] for one in settings.get(part, {}).values()] if is_sound else []
    policies = [one.get("policy", {}) for one in named if isinstance(one, dict)]
    if not is_sound or not all(isinstance(one, dict) for one in [*named, *policies]):
        raise DataFileError(
            str(file), "not what `safespec evaluate` keeps beside its answers. Give another file for the answers."
        )
    return dict(settings)


def _to_line(row: Row) -> str:
    # NaN and infinities, as of candidates that were never finished, become null: other readers refuse them
    finite = json.loads(json.dumps(row), parse_constant=lambda _: None)
    return json.dumps(finite, ensure_ascii=False) + "\n"
