"""Takes a part of what ../smollm2-135m/prepare.py wrote, and gptfuzz_evaluate in halves by question; see README.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEPT = ("labelled", "references", "begun_prompts_train")
HALVED = ("safe_prompts_train", "safe_prompts_validation", "safe_prompts_calibration")
FIRST_HELD_OUT_QUESTION = 90  # of 80 to 99


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[Row]) -> None:
    """Rows as a JSON lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with labelled/")
    parser.add_argument("--prepared", type=Path, required=True, help="folder with what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    for name in KEPT:
        write(arguments.out / f"{name}.jsonl", read(arguments.prepared / f"{name}.jsonl"))
    for name in HALVED:  # every second one keeps the shares of the sources
        write(arguments.out / f"{name}.jsonl", read(arguments.prepared / f"{name}.jsonl")[::2])
    evaluate = read(arguments.data / "labelled" / "gptfuzz_evaluate.jsonl")
    held_out = [row for row in evaluate if int(row["question_id"]) >= FIRST_HELD_OUT_QUESTION]
    write(arguments.out / "validation.jsonl", [row for row in evaluate if row not in held_out][::2])
    write(arguments.out / "held_out.jsonl", held_out)


if __name__ == "__main__":
    main()
