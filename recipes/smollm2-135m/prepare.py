"""Chooses and splits what the default head is made of. Writes JSON lines that `safespec` reads; see README.md."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safespec_hf.training.refusals import REFUSAL, is_refusal

HERE = Path(__file__).parent
Row = dict[str, Any]
# How many answers per class and wording. HEDGE is wider than a refusal: it finds warnings and disclaimers as well.
NUM_LABELLED = {(0, True): 500, (1, True): 700, (0, False): 128, (1, False): 290}
HEDGE = re.compile(
    r"\b(i'?m sorry|i am sorry|i apologi[sz]e|i can(?:no|')t|i cannot|i am unable|i'm unable|as an ai|not able to"
    r"|unable to|i won'?t|illegal|unethical|not appropriate|inappropriate|against (?:my|the|openai)"
    r"|i must (?:inform|remind)|sorry,)",
    re.IGNORECASE,
)
NUM_PROMPTS = {"borderline": 480, "benign": 300, "gsm8k_train": 60, "self_instruct_seed": 60, "borderline_odd": 1537}
NUM_REFERENCES = {"gsm8k_train": 60, "self_instruct_seed": 100}
NUM_BEGUN = 400
# What labels are worth, by the noise that their table names; sources whose answers are all alike count for less, too.
WEIGHTS = {
    "latent_jailbreak_human": 0.2,
    "drattack_uncensored": 0.7,
    "aisafetylab": 0.8,
    "medsafety": 0.3,
    "orbench_fr_de": 0.6,
}
THRESHOLD_SOURCES = ("arenahard_benign", "korean_orbench")
"""Safe answers of others, of which one half is for choosing by and one for the threshold."""
ONLY_MEASURED = ("gptfuzz_evaluate", "medsafety")
HARMLESS_REQUESTS = ("caia_safe", "orbench_fr_de", "oasst_zh")
"""Sources of the second round in which nobody asks for harm."""
SPEAKER = re.compile(r"\n\s*[\[(*]*[^\n:]{1,24}[\])*]*\s*:")


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file."""
    with path.open(encoding="utf-8") as file:  # not splitlines(), which also splits at rare characters inside of texts
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Rows as a JSON lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def find_unsafe_start(response: str) -> int | None:
    """Where the second voice of an unsafe answer begins: at the speaker's tag after a refusal; `None` if unclear."""
    refusal = REFUSAL.search(response.lower().replace("’", "'"))
    if refusal is None:
        return 0
    tag = next((found for found in SPEAKER.finditer(response) if found.start() >= refusal.end() - 30), None)
    return tag.start() if tag is not None and tag.start() < 0.9 * len(response) else None


def choose_labelled(rows: list[Row]) -> list[Row]:
    """Turns by question, so that none dominates, and every safe answer that has no plain refusal in it."""
    draw, cells = random.Random(0), defaultdict(list)
    for row in rows:
        cells[row["label"], bool(HEDGE.search(row["response"]))].append(row)
    chosen = [row for cell, num in NUM_LABELLED.items() for row in take_in_turns(cells[cell], num, draw)]
    chosen += [row for row in cells[0, True] if row not in chosen and not is_refusal(row["response"])]
    starts = [find_unsafe_start(row["response"]) if row["label"] else 0 for row in chosen]
    return [
        row | {"unsafe_from": start, "group": f"question {row['question_id']}", "source": "gptfuzz_train"}
        for row, start in zip(chosen, starts, strict=True)
        if start is not None
    ]


def take_in_turns(rows: list[Row], num: int, draw: random.Random) -> list[Row]:
    """So many rows at random, one question after the other."""
    draw.shuffle(rows)
    questions: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        questions[row["question_id"]].append(row)
    chosen: list[Row] = []
    while len(chosen) < min(num, len(rows)):
        chosen += [questions[question].pop() for question in list(questions) if questions[question]]
    return chosen[:num]


def sample(rows: list[Row], num: int) -> list[Row]:
    """So many rows, in their order."""
    return [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), num))]


def split(rows: list[Row]) -> dict[str, list[Row]]:
    """Shuffled parts for training, for choosing by, and for the threshold. Prompts are not repeated across parts."""
    rows = random.Random(1).sample(rows, len(rows))
    ends = [round(len(rows) * share) for share in (0, 0.6, 0.7, 1)]
    names = ("train", "validation", "calibration")
    return {name: rows[start:end] for name, start, end in zip(names, ends[:-1], ends[1:], strict=True)}


def choose_prompts(benign: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Harmless prompts, every source split alike."""
    parts: dict[str, list[Row]] = defaultdict(list)
    for source, num in NUM_PROMPTS.items():
        prompts = [
            {
                "id": f"{source} {i}",
                "prompt": row["prompt"],
                "category": row.get("category"),
                "source": "own " + source,
            }
            for i, row in enumerate(sample(benign[source], num))
        ]
        for name, rows in split(prompts).items():
            parts[name] += rows
    return parts


def read_second_round(folder: Path) -> list[Row]:
    """The rows of a folder: every turn in its context, the label is of the last answer."""
    rows: list[Row] = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read(file)):
            turns = row.get("turns") or [{"role": "user", "content": row["prompt"]}, {}]
            rows.append(
                {
                    "id": f"{file.stem} {number}",
                    "messages": turns[:-1],
                    "response": row["response"],
                    "label": row["label"],
                    "category": row.get("category") or "",
                    "source": file.stem,
                    "weight": WEIGHTS.get(file.stem, 1.0),
                    "group": row["prompt"],
                }
            )
    return rows


def divide(rows: list[Row]) -> dict[str, list[Row]]:
    """Answers to choose by, and safe ones for the threshold; no prompt is on both sides."""
    parts: dict[str, list[Row]] = {"validation": [], "calibration": []}
    for row in rows:
        is_odd = int(hashlib.sha256(row["group"].encode()).hexdigest(), 16) % 2
        parts["calibration" if row["source"] in THRESHOLD_SOURCES and is_odd else "validation"].append(row)
    return parts


def choose_references(benign: dict[str, list[Row]]) -> list[Row]:
    """Answers of others to prompts that are used nowhere else."""
    references: list[Row] = []
    for source, num in NUM_REFERENCES.items():
        taken = {row["prompt"] for row in sample(benign[source], NUM_PROMPTS[source])}
        free = [row for row in benign[source] if row["prompt"] not in taken and row["response"].strip()]
        references += [
            {"prompt": row["prompt"], "response": row["response"], "label": 0, "source": f"reference {source}"}
            for row in sample(free, num)
        ]
    return references


def choose_begun(rows: list[Row]) -> dict[str, list[Row]]:
    """Harmful prompts whose answers begin with consent: the target goes on from there."""
    begun = [
        {"id": f"begun {i}", "prompt": row["prompt"], "response": row["target"], "source": "own begun"}
        for i, row in enumerate(sample(rows, NUM_BEGUN))
    ]
    parts = split(begun)
    return {"train": parts["train"] + parts["validation"], "validation": parts["calibration"]}


def choose_requests(
    harmful: dict[str, list[str]], harmless: dict[str, list[Row]], second: list[Row], others: list[Row]
) -> dict[str, list[Row]]:
    """Prompts by what is asked for, whatever was answered: harmful ones for training and to measure on."""
    parts: dict[str, list[Row]] = {name: [row | {"label": 0} for row in rows] for name, rows in harmless.items()}
    for source, prompts in harmful.items():
        for number, prompt in enumerate(dict.fromkeys(prompts)):
            is_held_out = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 5 == 0 or source in ONLY_MEASURED
            row = {"id": f"{source} {number}", "prompt": prompt, "label": 1, "source": source}
            parts["validation" if is_held_out else "train"].append(row)
    for name, rows, sources in (("train", second, HARMLESS_REQUESTS), ("calibration", others, THRESHOLD_SOURCES)):
        known = {row["group"]: row for row in rows if row["source"] in sources}
        parts[name] += [
            {"id": row["id"], "messages": row["messages"], "label": 0, "source": row["source"]}
            for row in known.values()
        ]
    return parts


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with labelled/, benign/ and prompts/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    benign = {name: read(HERE / f"{name}_prompts.jsonl") for name in ("borderline", "benign")}
    benign |= {name: read(arguments.data / "benign" / f"{name}.jsonl") for name in NUM_REFERENCES}
    labelled = read(arguments.data / "labelled" / "gptfuzz_train.jsonl")
    write(arguments.out / "labelled.jsonl", choose_labelled(labelled))
    write(arguments.out / "references.jsonl", choose_references(benign))
    begun = choose_begun(read(arguments.data / "prompts" / "advbench_no_jbb.jsonl"))
    held_out = {row["prompt"] for row in begun["validation"]}
    second = [row for row in read_second_round(arguments.data / "v2" / "train") if row["group"] not in held_out]
    write(arguments.out / "second_round.jsonl", second)
    benign["borderline_odd"] = read(arguments.data / "v2" / "prompts" / "borderline_odd.jsonl")
    own = {row["prompt"] for row in benign["borderline_odd"]}
    others = [row for row in read_second_round(arguments.data / "v2" / "choose") if row["group"] not in own]
    for name, rows in divide(others).items():
        write(arguments.out / f"others_{name}.jsonl", rows)
    for name, rows in choose_prompts(benign).items():
        write(arguments.out / f"safe_prompts_{name}.jsonl", rows)
    for name, rows in begun.items():
        write(arguments.out / f"begun_prompts_{name}.jsonl", rows)
    evaluate = read(arguments.data / "labelled" / "gptfuzz_evaluate.jsonl")
    sources = {
        "advbench": read(arguments.data / "prompts" / "advbench_no_jbb.jsonl"),
        "gptfuzz": labelled,
        "aisafetylab": [row for row in read(arguments.data / "v2" / "train" / "aisafetylab.jsonl") if row["label"]],
        "gptfuzz_evaluate": evaluate,
        "medsafety": read(arguments.data / "v2" / "train" / "medsafety.jsonl"),
    }
    harmful = {source: [row["prompt"] for row in rows] for source, rows in sources.items()}
    for name, rows in choose_requests(harmful, choose_prompts(benign), second, others).items():
        write(arguments.out / f"requests_{name}.jsonl", rows)


if __name__ == "__main__":
    main()
