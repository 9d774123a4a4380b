"""Runs guarded decoding on a tiny random model of every causal architecture and compares with plain `generate`.

    .venv/bin/python benchmarks/compatibility.py              # all, about half an hour on one core
    .venv/bin/python benchmarks/compatibility.py llama gpt2   # some
    .venv/bin/python benchmarks/compatibility.py "gemma3 with images"
    .venv/bin/python benchmarks/compatibility.py --missing    # those without results, such as after an interrupt
    .venv/bin/python benchmarks/compatibility.py --write      # none: only the table in docs/compatibility.md
    .venv/bin/python benchmarks/compatibility.py --only drafting   # ways of drafting instead, a minute

For each, in float32, a cell for everything that is asked of it:

- *alone*: greedy without drafts is what the model says alone; *lookup* and *draft*: the same with prompt lookup, with
  a draft model in chains and, where the model takes them, in trees;
- *batch*: all of that in a batch of three prompts of different lengths, each row as the model alone says it;
- *sampling*: what is sampled with a seed is the same with drafts and without;
- *rollback*: forced flags are survived; *clean*: no token at or above the threshold came back.

An architecture `with images` has one in each prompt: what it says must be what plain `generate` says.

What can't be guarded has to be refused when a head is attached: what fails later, or says something else, is WRONG.
All of it is written to `benchmarks/results/compatibility.json` as it comes, and from there to docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compatibility_drafts
import torch
from pages import update_page
from provenance import write_json
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from safespec_hf import SafeSpecConfig, SafeSpecError, attach_safety_head
from safespec_hf.decoding.proof import FAILURES
from safespec_hf.decoding.support import check_model
from safespec_hf.engine.cache import takes_trees
from safespec_hf.engine.mixers import mixers_of
from safespec_hf.engine.traits import reads_alone

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny
from architectures import NAMES, build_architecture
from vision import VISION, build_vision, look

ROOT = Path(__file__).parent.parent

THEIRS = (*FAILURES, ImportError, OSError)
"""What the code of a model raises that can't be built small, or answer: that says nothing about us."""
PROMPT_LENGTHS, NUM_TOKENS = (10, 7, 4), 16
IMAGES = " with images"
SECONDS, PATIENCE = 300, 10
"""Of the processor that an architecture may take; and how many times as long, if others want it as well."""
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- architectures: begin -->\n", "<!-- architectures: end -->"
CELLS = ("alone", "lookup", "draft", "batch", "sampling", "rollback", "clean")
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONSTANT = SafeSpecConfig(adaptive_drafts=False)
RECOVERING = SafeSpecConfig(max_segment_tokens=5, num_candidates=2, reflection=tiny.REFLECTION, refusal=tiny.REFUSAL)
Outcome = dict[str, Any]


Inputs = dict[str, Tensor]


def build(name: str) -> tuple[PreTrainedModel, Inputs, list[Inputs]]:
    """A model, a batch of prompts for it, and each of them alone."""
    if name.endswith(IMAGES):
        kind, lengths = name.removesuffix(IMAGES), [length + 6 for length in PROMPT_LENGTHS]
        whole = look(kind, lengths)
        parts = [{key: value.chunk(len(lengths))[row] for key, value in whole.items()} for row in range(len(lengths))]
        for part in parts:  # without the padding
            is_real = part["attention_mask"][0].bool()
            part |= {key: value[:, is_real] for key, value in part.items() if value.shape[1:] == is_real.shape}
        return build_vision(kind), whole, parts
    model = build_architecture(name)
    ids = torch.randint(10, tiny.VOCAB_SIZE, (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)))
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - length for length in PROMPT_LENGTHS]).long()
    pairs = zip(ids, PROMPT_LENGTHS, strict=True)
    parts = [{"input_ids": row[-num:][None], "attention_mask": torch.ones(1, num).long()} for row, num in pairs]
    return model, {"input_ids": ids * mask, "attention_mask": mask}, parts


def answers(model: PreTrainedModel, inputs: Inputs, **arguments: Any) -> Tensor:
    text: Tensor = model.generate(**inputs, **GREEDY, **arguments)
    return text[:, inputs["input_ids"].shape[1] :]


def check(name: str, outcomes: Any) -> Outcome:
    """What came of an architecture: `identical`, `refused`, `skipped` or `WRONG`, why, and its cells.

    Leaves in `outcomes` what is to be said if it never returns: until ours runs, that is no fault of ours.
    """
    outcomes[name] = outcome("skipped", f"not built, or no plain answer, within {SECONDS} s")
    try:
        model, whole, parts = build(name)
        draft, leafy = tiny.perturb(model), tiny.perturb(model, 0.03)
        alone = [answers(model, part)[0] for part in parts]
    except THEIRS as error:
        return outcome("skipped", f"not built, or plain generate fails: {type(error).__name__}: {error}")
    outcomes[name] = outcome("WRONG", f"guarded decoding crashed, or took more than {SECONDS} s")
    try:
        check_model(model)
        attach_safety_head(model, tiny.build_head(model), tokenizer=tiny.build_tokenizer())
    except SafeSpecError as error:
        return outcome("refused", str(error))
    cells = compare(model, whole, parts[0], alone, {"draft": draft, "trees": leafy}) | recover(model, whole, draft)
    wrong = [cell for cell in CELLS if not cells[cell]]
    return outcome("WRONG" if wrong else "identical", ", ".join(wrong) or how(model), cells)


def outcome(what: str, why: str, cells: dict[str, bool] | None = None) -> Outcome:
    return {"outcome": what, "why": why, "cells": cells or {}}


def how(model: PreTrainedModel) -> str:
    """How its drafts are verified, and its states taken back."""
    if reads_alone(model):
        return "chains; rows one by one, copied"
    mixers = mixers_of(model)
    states = "" if mixers is None else "; recurrent, read in " + ("parts" if mixers.reads_blocks else "single tokens")
    return ("trees" if takes_trees(model) else "chains") + states


def compare(
    model: PreTrainedModel, whole: Inputs, first: Inputs, alone: list[Tensor], drafts: dict[str, PreTrainedModel]
) -> dict[str, bool]:
    """Guarded answers in every way of drafting, with what the model says to each prompt alone."""
    cells = dict.fromkeys(CELLS[:4], True)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("alone", {"safespec": True}),
        ("draft", {"assistant_model": drafts["draft"], "safespec": CONSTANT}),
        ("draft", {"assistant_model": drafts["trees"], "safespec": SafeSpecConfig(lookup_drafts=False)}),
        ("lookup", {"prompt_lookup_num_tokens": 3, "safespec": CONSTANT}),
    ]
    for cell, extra in ways:
        # or else adaptive decoding finds that a draft as large as its target does not pay
        with tiny.cheap_drafts():
            single, batch = answers(model, first, **extra), answers(model, whole, **extra)
        cells[cell] &= torch.equal(single[0], alone[0])
        cells["batch"] &= all(torch.equal(*pair) for pair in zip(batch, alone, strict=True))
    sampled = []
    for extra in ({}, {"prompt_lookup_num_tokens": 3}):
        torch.manual_seed(1)
        arguments = GREEDY | {"do_sample": True, "safespec": CONSTANT, **extra}
        sampled.append(model.generate(**first, **arguments))
    return cells | {"sampling": torch.equal(*sampled)}


def recover(model: PreTrainedModel, whole: Inputs, draft: PreTrainedModel) -> dict[str, bool]:
    """Whether forced flags are survived, and nothing flagged comes back."""
    attach_safety_head(model, tiny.build_coin_head(model, 0.12, seed=0), tokenizer=tiny.build_tokenizer())
    arguments: dict[str, Any] = {**GREEDY, "safespec": RECOVERING, "return_dict_in_generate": True}
    output = model.generate(**whole, assistant_model=draft, **arguments)
    threshold = model.safety.risk_threshold
    return {"rollback": any(output.events), "clean": not bool((output.risks >= threshold).any())}


def run(name: str, outcomes: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    torch.manual_seed(0)
    try:
        outcomes[name] = check(name, outcomes)
    except THEIRS as error:  # what `check` does not name comes from guarded decoding
        outcomes[name] = outcome("WRONG", f"{type(error).__name__}: {error}")


def run_all(names: list[str], save: Callable[[str, Outcome], None]) -> None:
    fork = multiprocessing.get_context("fork")  # a process for each, as some would take down or hold up the others
    with fork.Manager() as manager:
        shared = manager.dict()
        for number, name in enumerate(names, 1):
            process = fork.Process(target=run, args=(name, shared))
            process.start()
            process.join(PATIENCE * SECONDS)
            process.kill()
            found = shared.get(name, outcome("WRONG", "the process ended before it began"))
            save(name, found)
            why = " ".join(found["why"].split())[:200]
            print(f"{number:3}/{len(names)} {name:26} {found['outcome']:10} {why}", flush=True)


def table(results: dict[str, Outcome]) -> str:
    """The part of the page that says what came out."""
    counts = Counter(found["outcome"] for found in results.values())
    lines = [
        f"Of {len(results)} architectures {counts['identical']} are guarded, {counts['refused']} refused when a head "
        f"is attached, {counts['WRONG']} wrong, and {counts['skipped']} could not be built small or not answer by "
        "themselves.",
        "",
        f"| architecture | {' | '.join(CELLS)} | drafts and states |",
        f"|---|{'---|' * len(CELLS)}---|",
    ]
    guarded = {name: found for name, found in sorted(results.items()) if found["outcome"] in ("identical", "WRONG")}
    for name, found in guarded.items():
        marks = [{True: "yes", False: "**no**"}.get(found["cells"].get(cell), "") for cell in CELLS]
        lines.append(f"| {name} | {' | '.join(marks)} | {found['why']} |")
    lines += ["", "| refused or not measured | why |", "|---|---|"]
    others = {name: found for name, found in sorted(results.items()) if name not in guarded}
    reasons: dict[str, list[str]] = {}
    for name, found in others.items():
        reasons.setdefault(shortened(found["why"]), []).append(name)
    lines += [f"| {', '.join(names)} | {why} |" for why, names in reasons.items()]
    return "\n".join(lines) + "\n"


def shortened(why: str) -> str:
    """A reason in which only the kind of model that it is about is told."""
    words = " ".join(why.split()).replace("|", "/")
    first, _, rest = words.partition(" ")
    is_class = first.endswith(("LM", "Model", "Generation", "ForCausalLM.forward", "LMHeadModel.forward"))
    is_class = is_class or first.endswith(".forward")
    text = rest if is_class else words
    return text[:160] + ("..." if len(text) > 160 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description="Guarded decoding on tiny models of all architectures.")
    parser.add_argument("names", nargs="*", help="architectures; default: all")
    parser.add_argument("--missing", action="store_true", help="only those without a result")
    parser.add_argument("--write", action="store_true", help="run none, only write the table")
    parser.add_argument("--only", choices=["architectures", "drafting"], help="one part; default: all of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if options.only == "drafting":
        return int(not compatibility_drafts.run())
    is_partial = bool(options.names) or options.missing or options.write
    results: dict[str, Outcome] = {}
    if is_partial:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    names = [] if options.write else options.names or [*NAMES, *(kind + IMAGES for kind in VISION)]
    if options.missing:
        names = [name for name in names if name not in results or needs_run(results[name])]

    def save(name: str, found: Outcome) -> None:
        results[name] = found
        write_json(RESULTS, dict(sorted(results.items())))

    run_all(names, save)
    update_page(PAGE, BEGIN, table(results), END)
    is_right = all(found["outcome"] != "WRONG" for found in results.values())
    if not is_partial and options.only is None:
        is_right &= compatibility_drafts.run()
    return int(not is_right)


def needs_run(found: Outcome) -> bool:
    return "cells" not in found or (found["outcome"] == "identical" and len(found["cells"]) < len(CELLS))


if __name__ == "__main__":
    sys.exit(main())
