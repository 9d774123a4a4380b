"""The parts of the speed benchmark that are about the machine: batches, raw forwards, and what measuring takes."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from prompts import PROMPTS
from speed_arms import Arm, Prompt, run_arm, time_blocks
from speed_log import Log
from speed_parts import Target, load_prompts
from speed_statistics import bootstrap_median, ratios, summarise_arm

from safespec_hf.engine import speeds
from safespec_hf.engine.fusing import fast_layers

BATCH_SIZES = (1, 2, 4, 8, 16)
RAW_WIDTHS = (1, 2, 5, 9, 17)


def measure_batch(target: Target, log: Log) -> dict[str, Any]:
    """Batches of mixed prompts, ours beside `generate` with the same. A round costs as much as its widest row."""
    options = target.options
    prompts = load_prompts(options, options.per_category)
    random.Random(0).shuffle(prompts)
    arms = [Arm("plain"), target.ours("ours")]
    target.tokenizer.padding_side = "left"
    sizes = {}
    for size in BATCH_SIZES:
        starts = range(0, min(options.batch_prompts, len(prompts) - size + 1), size)
        if not starts:  # fewer prompts than rows
            continue
        groups = [prompts[start : start + size] for start in starts]
        bench = target.bench(log, f"batch {size}", options.batch_tokens)
        bench.encode = target.encode_batch
        texts = [json.dumps([prompt.text for prompt in group]) for group in groups]
        records = bench.interleave(arms, [Prompt(f"{size} x {n}", str(size), text) for n, text in enumerate(texts)])
        sizes[size] = {
            "num_batches": len(records),
            "arms": {arm.name: summarise_arm(records, arm.name, "plain") for arm in arms},
            "ours_over_plain": bootstrap_median(ratios(records, "ours", "plain"))._asdict(),
            "least": min(ratios(records, "ours", "plain")),
        }
    return {"settings": target.bench(log, "batch", options.batch_tokens).settings, "sizes": sizes}


def measure_raw(target: Target, _: Log) -> dict[str, Any]:
    """Raw forwards, which say what the machine can do: of the model as it is, and with packed weights."""
    ids = target.encode(PROMPTS[0])["input_ids"]
    seconds = {}
    for name, is_packed in (("as it is", False), ("packed", True)):
        with torch.inference_mode(), fast_layers([target.model], is_packed):
            seconds[name] = time_blocks(target.model, ids, RAW_WIDTHS, repeats=5)
    return {"seconds": seconds, "dtype": target.dtype}


def measure_measuring(target: Target, _: Log) -> dict[str, Any]:
    """What measuring costs a first call, on a machine that has nothing on disk, and the calls after it."""
    arm, inputs = target.ours("ours"), target.encode(PROMPTS[0])
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, SAFESPEC_CACHE=folder):
        speeds.forget()
        seconds = []
        for number in range(3):
            run, _ = run_arm(target.model, arm, inputs, do_sample=False, max_new_tokens=16)
            assert run.engine is not None
            seconds.append(run.engine["measuring_seconds"])
            if number == 1:
                speeds.forget()  # as a later process does: the third call reads what the first has written
        files = [json.loads(path.read_text()) for path in sorted(Path(folder).rglob("*.json"))]
    speeds.forget()
    return {
        "seconds": seconds,
        "results": [{"kind": file["about"]["kind"], "found": file["result"]} for file in files],
    }
