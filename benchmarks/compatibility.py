"""Runs guarded decoding on a tiny random model of every causal architecture and compares with plain `generate`.

    .venv/bin/python benchmarks/compatibility.py              # all, about fifteen minutes on one core
    .venv/bin/python benchmarks/compatibility.py llama gpt2   # some

For each: greedy, float32, one prompt alone and a batch of three of different lengths, with a draft model in chains and
in trees (where the model takes them), with prompt lookup and without drafts; every row must equal what the model alone
says to that prompt. Then forced flags must be survived. What can't be guarded has to be refused when a head is
attached: what fails later, or says something else, is WRONG. All of it is written to
`benchmarks/results/compatibility.json`, where a run of some replaces their lines.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from provenance import write_json
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from safespec_hf import SafeSpecConfig, SafeSpecError, attach_safety_head
from safespec_hf.decoding.proof import FAILURES
from safespec_hf.decoding.support import check_model
from safespec_hf.engine.cache import takes_trees

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny
from architectures import NAMES, build_architecture

THEIRS = (*FAILURES, ImportError, OSError)
"""What the code of a model raises that can't be built small, or answer: that says nothing about us."""
PROMPT_LENGTHS, NUM_TOKENS = (10, 7, 4), 16
SECONDS = 120
RESULTS = Path(__file__).parent / "results" / "compatibility.json"
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONSTANT = SafeSpecConfig(adaptive_drafts=False)
RECOVERING = SafeSpecConfig(max_segment_tokens=5, num_candidates=2, reflection=tiny.REFLECTION, refusal=tiny.REFUSAL)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(10, tiny.VOCAB_SIZE, (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)))
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - length for length in PROMPT_LENGTHS]).long()
    return ids * mask, mask


def answers_alone(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    prompts = [row[-length:][None] for row, length in zip(ids, PROMPT_LENGTHS, strict=True)]
    return [
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)[0, prompt.shape[1] :]
        for prompt in prompts
    ]


def check(name: str, outcomes: Any) -> tuple[str, str]:
    """`identical`, `refused`, `skipped` or `WRONG`, and why.

    Leaves in `outcomes` what is to be said if it never returns: until ours runs, that is no fault of ours.
    """
    outcomes[name] = "skipped", f"not built, or no plain answer, within {SECONDS} s"
    try:
        model = build_architecture(name)
        (ids, mask), draft, leafy = batch(), tiny.perturb(model), tiny.perturb(model, 0.03)
        alone = answers_alone(model, ids)
    except THEIRS as error:
        return "skipped", f"not built, or plain generate fails: {type(error).__name__}: {error}"
    outcomes[name] = "WRONG", f"guarded decoding crashed, or took more than {SECONDS} s"
    try:
        check_model(model)
        attach_safety_head(model, tiny.build_head(model), tokenizer=tiny.build_tokenizer())
    except SafeSpecError as error:
        return "refused", str(error)
    return compare(model, ids, mask, alone, {"draft": draft, "trees": leafy})


def compare(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, alone: list[Tensor], drafts: dict[str, PreTrainedModel]
) -> tuple[str, str]:
    """Guarded answers in every way of drafting, with what the model says to each prompt alone."""
    for label, extra in {
        "plain": {"safespec": True},
        "draft": {"assistant_model": drafts["draft"], "safespec": CONSTANT},
        "trees": {"assistant_model": drafts["trees"], "safespec": SafeSpecConfig(lookup_drafts=False)},
        "lookup": {"prompt_lookup_num_tokens": 3, "safespec": CONSTANT},
    }.items():
        # or else adaptive decoding finds that a draft as large as its target does not pay
        with tiny.cheap_drafts():
            single = model.generate(ids[:1], attention_mask=mask[:1], **GREEDY, **extra)[:, ids.shape[1] :]
            whole = model.generate(ids, attention_mask=mask, **GREEDY, **extra)[:, ids.shape[1] :]
        if not torch.equal(single[0], alone[0]):
            return "WRONG", f"one row differs ({label})"
        if not all(torch.equal(*pair) for pair in zip(whole, alone, strict=True)):
            return "WRONG", f"a batch differs ({label})"
    attach_safety_head(model, tiny.build_coin_head(model, 0.08, seed=0), tokenizer=tiny.build_tokenizer())
    model.generate(ids, attention_mask=mask, safespec=RECOVERING, assistant_model=drafts["draft"], **GREEDY)
    return "identical", "with trees" if takes_trees(model) else "in chains"


def run(name: str, outcomes: Any) -> None:
    torch.manual_seed(0)
    try:
        outcomes[name] = check(name, outcomes)
    except THEIRS as error:  # what `check` does not name comes from guarded decoding
        outcomes[name] = ("WRONG", f"{type(error).__name__}: {error}")


def main() -> int:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    fork = multiprocessing.get_context("fork")  # a process for each, as some would take down or hold up the others
    outcomes: dict[str, tuple[str, str]] = {}
    with fork.Manager() as manager:
        shared = manager.dict()
        for name in sys.argv[1:] or NAMES:
            process = fork.Process(target=run, args=(name, shared))
            process.start()
            process.join(SECONDS)
            process.kill()
            outcomes[name] = shared.get(name, ("WRONG", "the process ended before it began"))
            print(f"{name:26} {outcomes[name][0]:10} {' '.join(outcomes[name][1].split())[:220]}", flush=True)
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if sys.argv[1:] else {}
    write_json(RESULTS, before | {name: {"outcome": found, "why": why} for name, (found, why) in outcomes.items()})
    return int(any(outcome == "WRONG" for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
