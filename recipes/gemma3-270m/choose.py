"""Takes a part of what ../smollm2-135m/prepare.py wrote, and gptfuzz_evaluate in halves by question; see README.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# how many rows of each file; swap.py needs all of them
NUM_ROWS = {
    "labelled": 1000,
    "second_round": 400,
    "references": 160,
    "begun_prompts_train": 100,
    "safe_prompts_train": 220,
    "safe_prompts_validation": 40,
    "safe_prompts_calibration": 110,
}
LEFT_OUT = "own borderline_odd"  # prompts that are harmless as a rule only: a base model refuses none of them
FIRST_HELD_OUT_QUESTION = 90  # of 80 to 99


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[Row]) -> None:
    """Rows as a JSON lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def spread(rows: list[Row], num: int) -> list[Row]:
    """So many rows at even distances, which keeps the shares of sources that lie one after the other."""
    return [rows[index * len(rows) // num] for index in range(num)] if num < len(rows) else rows


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with labelled/")
    parser.add_argument("--prepared", type=Path, required=True, help="folder with what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    for name, num in NUM_ROWS.items():
        rows = [row for row in read(arguments.prepared / f"{name}.jsonl") if row.get("source") != LEFT_OUT]
        write(arguments.out / f"{name}.jsonl", spread(rows, num))
    evaluate = read(arguments.data / "labelled" / "gptfuzz_evaluate.jsonl")
    held_out = [row for row in evaluate if int(row["question_id"]) >= FIRST_HELD_OUT_QUESTION]
    write(arguments.out / "validation.jsonl", [row for row in evaluate if row not in held_out][::2])
    write(arguments.out / "held_out.jsonl", held_out)


if __name__ == "__main__":
    main()
