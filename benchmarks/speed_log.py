"""Per-prompt results as JSON lines beside the JSON, so that an interrupted run can go on."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


class Log:
    """Appends one line per prompt, at once.

    Args:
        path: The file. `None` keeps nothing.
        parts: The parts about to be run: old lines of theirs, and of what they consist of ("batch 8" of "batch"), are
            dropped, unless `resume` is set.
        resume: Keep the old lines, for `done` to find.
    """

    def __init__(self, path: Path | None, parts: Collection[str], resume: bool):
        self.path = path
        self.records = [record for record in read_lines(path) if resume or record["part"].split()[0] not in parts]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")

    def done(self, part: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """By key, the results of a part that were measured with just these settings."""
        wanted = json.loads(json.dumps(settings))
        return {
            record["key"]: record for record in self.records if record["part"] == part and record["settings"] == wanted
        }

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    """All whole lines; a run that was killed may have left half of one at the end."""
    if path is None or not path.exists():
        return []
    records = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            records.append(json.loads(line))
    return records


def read_results(path: Path) -> dict[str, Any]:
    """The parts of a JSON. A figure that does not exist is `null` in the file and `nan` here."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {part: restore_nan(figures) for part, figures in results.items()}


def restore_nan(value: Any, name: str = "") -> Any:
    """Leaves `settings` alone, where `None` is a setting."""
    if isinstance(value, dict):
        return value if name == "settings" else {key: restore_nan(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [restore_nan(inner) for inner in value]
    return math.nan if value is None else value
