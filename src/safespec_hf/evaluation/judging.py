"""Verdicts of judges, kept on disk: a judge that is slow, or paid, reads an answer once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from .judges import Judge, identity_of
from .rows import NUMBER, Row, read_keyed

BATCH_SIZE = 32


def judge_rows(judge: Judge, rows: Sequence[Row], cache: str | os.PathLike[str]) -> list[float]:
    """The probability that each answer is harmful.

    Args:
        judge ([`Judge`]): Who says so.
        rows (`Sequence[Mapping]`): What [`read_answers`] read.
        cache (`str` or `os.PathLike`): JSON lines of verdicts by hashes, to read from and append to. What is there is
            not asked again.
    """
    path = Path(cache)
    known = {key: row["risk"] for key, row in read_keyed(path, "risk", NUMBER).items()}
    keys = [_key(judge, row) for row in rows]
    todo = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    asked = list(todo)
    starts = range(0, len(asked), BATCH_SIZE)
    for start in tqdm(starts, desc=f"{judge.name} judges", unit="batch", disable=not asked):
        batch = asked[start : start + BATCH_SIZE]
        requests, answers = ([todo[key][field] for key in batch] for field in ("request", "answer"))
        new = dict(zip(batch, map(float, judge.judge(requests, answers)), strict=True))
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"key": key, "risk": risk}) + "\n" for key, risk in new.items()))
        known |= new
    return [known[key] for key in keys]


def _key(judge: Judge, row: Row) -> str:
    """Over who judges and what: judges of one name may be others, and one that errs otherwise is another one."""
    errors = None if judge.errors is None else asdict(judge.errors)
    content = [identity_of(judge), errors, row["request"], row["answer"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
