"""Answers after prompts that they do not belong to, so that a head reads the answer and not only the question."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from prepare import Row, read, write

NUM_SAFE = {"safe_train": 250, "references": 60, "second_round": 250}
NUM_UNSAFE = {"labelled": 250, "begun_train": 80, "second_round": 200}


def text_of(row: Row) -> str:
    """The prompt, however the file gives it."""
    return str(row["messages"][-1]["content"] if "messages" in row else row["prompt"])


def swap(answers: list[Row], prompts: list[str], label: int, draw: random.Random) -> list[dict[str, Any]]:
    """Each answer after a prompt drawn at random; its label is its own."""
    return [
        {
            "id": f"swapped {label} {number}",
            "prompt": draw.choice(prompts),
            "response": row["response"],
            "label": label,
            "unsafe_from": row.get("unsafe_from") or 0,
            "source": f"swapped {'unsafe' if label else 'safe'}",
        }
        for number, row in enumerate(answers)
    ]


def draw_answers(work: Path, counts: dict[str, int], label: int, draw: random.Random) -> list[Row]:
    """So many answers of one class from each file."""
    parts = {name: [row for row in read(work / f"{name}.jsonl") if row["label"] == label] for name in counts}
    return [row for name, num in counts.items() for row in draw.sample(parts[name], min(num, len(parts[name])))]


def main() -> None:
    """Writes `swapped.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder with what prepare.py wrote and `safespec collect` answered")
    work = parser.parse_args().work
    draw = random.Random(2)
    rows = {name: read(work / f"{name}.jsonl") for name in ("labelled", "begun_prompts_train", "safe_prompts_train")}
    prompts = {name: sorted({text_of(row) for row in part}) for name, part in rows.items()}
    harmful = prompts["labelled"] + prompts["begun_prompts_train"]
    safe = swap(draw_answers(work, NUM_SAFE, 0, draw), harmful, 0, draw)
    unsafe = swap(draw_answers(work, NUM_UNSAFE, 1, draw), prompts["safe_prompts_train"], 1, draw)
    write(work / "swapped.jsonl", safe + unsafe)


if __name__ == "__main__":
    main()
