"""The parts of the safety benchmark: which methods answer which prompts, and the offline guard that they use."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from head_words import BagOfWords
from prompts import PROMPTS

from safespec_hf.evaluation.judges import Judge
from safespec_hf.evaluation.prompts import Kind, Prompt, load_prompt_sets
from safespec_hf.evaluation.statistics import JudgeErrors
from safespec_hf.training.data import Example, load_examples

ATTACKS = ("AttentionShift", "CodeChameleon", "DeepInception", "ReNeLLM")
PLAIN_ATTACK, BORDERLINE = "harmbench_standard", "xstest_even"
CHAT, SUMS = "spec_bench_even", "gsm8k_test_first300"
OWN = "own prompts"
FILES: dict[Kind, tuple[str, ...]] = {
    "attacks": (f"prompts/{PLAIN_ATTACK}.jsonl", *(f"attacks/{name}.jsonl" for name in ATTACKS)),
    "borderline": (f"prompts/{BORDERLINE}.jsonl",),
    "benign": (f"benign/{CHAT}.jsonl",),
    "tasks": (f"benign/{SUMS}.jsonl",),
}
GUARD_TRAINED_ON = ("labelled/gptfuzz_train.jsonl", "v2/train/caia_safe.jsonl")
GUARD_CALM = "v2/choose/arenahard_benign.jsonl"
GUARD_FALSE_ALARMS = 0.02  # as of the shipped head
OURS = "safespec"
METHODS = (
    "target",
    "assisted",
    OURS,
    "refuse",
    "self_reminder",
    "safespec+self_reminder",
    "guard_finished",
    "guard_every_n:every=16",
)
# what each part of the method is worth, on attacks and borderline prompts
ABLATIONS = (
    "safespec:policy=recover_single",
    "safespec:policy=recover_unreflected",
    "safespec:rollback_segments=0",
    "safespec:candidate_choice=likeliest_safe",
    "safespec:false_alarm_margin=null",
    "safespec:screen_prompts=false",
    "safespec:recovery_temperature=0.7",
    "safespec:reflection_scope=recovery",
)
SENSITIVITY = (
    "safespec:num_candidates=20",
    "safespec:operating_point=strict",
    "safespec:operating_point=permissive",
)
SINGLY = ("target", OURS)  # for speed, one prompt at a time
SEARCHED = ("target", OURS, "refuse")  # against a suffix that was searched for with the head at hand
NUM_SEARCHED = 16
# against what the target says alone, word for word: in bfloat16 drafts change roundings, and now and then a word
EXACT, EXACT_FILE = "float32", "exact"
# what a false alarm costs, by how the answer goes on
FORCED = (
    "forced",
    "forced:policy=recover_unreflected",
    "forced:candidate_choice=likeliest_safe",
    "forced:false_alarm_margin=null",
    "forced:reflection_scope=recovery",
)
# the paper's own acceptance, which takes a draft that is a language model; a trained one is not at hand
SEGMENTS = ("specreason", "safespec:verification=segment")
DRAFT_LAYERS = 20  # of the target's 30, as in segment_mode.py


class Part(NamedTuple):
    """Some methods on some sets, in one file of answers."""

    name: str
    file: str
    methods: tuple[str, ...]
    sets: dict[str, list[Prompt]]
    batch_size: int
    draft: str | None = None
    """A language model that drafts instead of the default draft."""
    has_suffixes: bool = False
    """Whether the requests get suffixes that are searched for with the target and its head."""
    dtype: str | None = None
    """Of target and draft, where it is not that of the others."""


class WordGuard:
    """A guard model that knows words alone, so that one is there without a network. It never judges.

    Its threshold lets so many of long harmless answers be stopped as the shipped head may flag.
    """

    errors: JudgeErrors | None = None
    threshold = 0.5

    def __init__(self, data: Path):
        examples = load_examples([data / path for path in GUARD_TRAINED_ON], label=0)
        self._words = BagOfWords(examples)
        calm = self._words.risks(load_examples([data / GUARD_CALM], label=0))
        self._limit = float(np.quantile(calm, 1 - GUARD_FALSE_ALARMS))
        self.name = f"words alone, {len(examples)} answers, limit {self._limit:.4f}"

    def judge(self, requests: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Of the answers alone; 1 at or above its limit, else 0."""
        risks = self._words.risks([Example(id="", messages=(), response=answer) for answer in answers])
        return [float(risk >= self._limit) for risk in risks]


def load_guard(options: argparse.Namespace) -> Judge | None:
    return None if options.data is None else WordGuard(options.data)


def load_sets(options: argparse.Namespace) -> dict[str, list[Prompt]]:
    """Those of the data; without data only harmless prompts of our own, to see that everything runs."""
    if options.data is not None:
        files: dict[Kind, list[Path]] = {
            kind: [options.data / name for name in names] for kind, names in FILES.items()
        }
        return load_prompt_sets(files, limit=options.limit)
    file = options.work / f"{OWN}.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return load_prompt_sets({"benign": [file]}, limit=options.limit)


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """What is run, the most telling first."""
    sets = load_sets(options)

    def of(*kinds: Kind, limit: int | None = None) -> dict[str, list[Prompt]]:
        return {name: prompts[:limit] for name, prompts in sets.items() if prompts[0].kind in kinds}

    def part(
        name: str, methods: Sequence[str], chosen: dict[str, list[Prompt]], file: str = "answers", **others: Any
    ) -> Part:
        settings = {"batch_size": options.batch_size} | others
        return Part(name, f"{file}.jsonl", chosen_of(methods), chosen, **settings)

    def chosen_of(methods: Sequence[str]) -> tuple[str, ...]:
        known = [spec for spec in methods if options.data is not None or not spec.startswith("guard")]
        return tuple(spec for spec in known if not options.method or spec in options.method)

    expert = [] if options.expert is None else ["safedecoding:" + json.dumps({"expert": options.expert})]
    yield part("methods", [*METHODS, *expert], sets)
    yield part("agreement", SINGLY, of("benign", "tasks"), EXACT_FILE, dtype=EXACT)
    yield part("a forced flag", FORCED, of("benign"), EXACT_FILE, dtype=EXACT)
    if attacked := of("attacks", "borderline"):
        yield part("ablations", [*ABLATIONS, *SENSITIVITY], attacked)
    # files of their own: what goes together in a batch is part of an answer's settings
    singly = of("attacks", "benign", limit=options.single)
    yield part("singly", SINGLY, singly, "singly", batch_size=1)
    if plain := {name: prompts[:NUM_SEARCHED] for name, prompts in sets.items() if name == PLAIN_ATTACK}:
        yield part("suffix", SEARCHED, plain, "suffix", has_suffixes=True)
    if attacked:
        yield part("segments", SEGMENTS, sets, draft=options.segment_draft)
