"""The part of `compatibility.py` on ways of drafting: each runs guarded, on tiny random models, or has to be refused.

In float32, a cell for everything that is asked of it:

- *alone*: greedy answers are the target's own, with drafts of constant length and adaptive ones; *batch*: the same in
  a batch of three prompts of different lengths;
- *sampling*: what is sampled is distributed as the target says, by a chi-squared test over two tokens;
- *rollback*: forced flags are survived; *clean*: no token at or above the threshold came back;
- *accepted*: of the drafts that were made for one prompt, how many the target accepted; the drafts are good ones.

What is refused has to be refused before any forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pages import update_page
from provenance import write_json
from scipy.stats import chisquare
from torch import Tensor, nn
from transformers import PreTrainedModel

from safespec_hf import SafeSpecConfig, SafeSpecError, attach_safety_head

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny
from drafting_methods import METHODS, REFUSED, Case

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compatibility_drafts.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- drafting methods: begin -->\n", "<!-- drafting methods: end -->"
CELLS = ("alone", "batch", "sampling", "rollback", "clean")
NUM_TOKENS, NUM_SAMPLES = 24, 1200
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONSTANT = SafeSpecConfig(adaptive_drafts=False, lookup_drafts=False)
ADAPTIVE = SafeSpecConfig()
RECOVERING = SafeSpecConfig(max_segment_tokens=5, num_candidates=2, reflection=tiny.REFLECTION, refusal=tiny.REFUSAL)
IDS = torch.tensor([[11, 17, 23, 24, 13], [0, 0, 12, 18, 24], [0, 15, 16, 15, 16]])
MASK = (IDS != 0).long()
Outcome = dict[str, Any]


def check(make: Callable[[], Case]) -> Outcome:
    """The cells of a way of drafting, and the drafts that were accepted."""
    case = make()
    alone = [
        case.target.generate(row[mask.bool()][None], **GREEDY)[0, -NUM_TOKENS:]
        for row, mask in zip(IDS, MASK, strict=True)
    ]
    tokenizer = tiny.build_tokenizer()
    expected = joint_distribution(case.target)
    attach_safety_head(case.target, tiny.build_head(case.target), tokenizer=tokenizer)
    cells, do_sample = {"alone": True, "batch": True}, bool(case.arguments.get("do_sample"))
    for policy in (CONSTANT, ADAPTIVE):
        with tiny.cheap_drafts():
            single = answer(case, IDS[:1], MASK[:1], policy)
            whole = answer(case, IDS, MASK, policy)
        cells["alone"] &= torch.equal(single.sequences[0, -NUM_TOKENS:], alone[0])
        cells["batch"] &= torch.equal(whole.sequences[:, -NUM_TOKENS:], torch.stack(alone))
    cells["sampling"] = samples_fit(case, expected)
    statistics = answer(case, IDS[:1], MASK[:1], CONSTANT, do_sample).statistics
    accepted = statistics.num_accepted_tokens, statistics.num_draft_tokens
    attach_safety_head(case.target, tiny.build_coin_head(case.target, 0.12, seed=0), tokenizer=tokenizer)
    output = answer(case, IDS, MASK, RECOVERING, do_sample)
    cells["rollback"] = any(output.events)
    cells["clean"] = not bool((output.risks >= case.target.safety.risk_threshold).any())
    is_used = accepted[0] > 0
    return {"outcome": "works" if is_used and all(cells.values()) else "WRONG", "cells": cells, "accepted": accepted}


def answer(case: Case, ids: Tensor, mask: Tensor, policy: SafeSpecConfig, do_sample: bool = False) -> Any:
    arguments = {**case.arguments, **GREEDY, "do_sample": do_sample, "return_dict_in_generate": True}
    return case.target.generate(ids, attention_mask=mask, safespec=policy, **arguments)


@torch.no_grad()
def joint_distribution(model: PreTrainedModel) -> Tensor:
    """The chances of every two tokens after the first prompt, of shape `(V * V,)`."""
    first = model(IDS[:1]).logits[0, -1].softmax(-1)
    tokens = torch.arange(len(first))
    prompts = torch.cat([IDS[:1].expand(len(first), -1), tokens[:, None]], 1)
    return (first[:, None] * model(prompts).logits[:, -1].softmax(-1)).flatten().double()


def samples_fit(case: Case, expected: Tensor) -> bool:
    torch.manual_seed(0)
    arguments = {**case.arguments, **GREEDY, "max_new_tokens": 2, "do_sample": True, "top_k": 0, "safespec": CONSTANT}
    pairs = case.target.generate(IDS[:1].expand(NUM_SAMPLES, -1), **arguments)[:, -2:]
    counts = (pairs[:, 0] * tiny.VOCAB_SIZE + pairs[:, 1]).bincount(minlength=len(expected)).double()
    is_rare = expected * NUM_SAMPLES < 5
    found, wanted = (
        torch.cat([part[~is_rare], part[is_rare].sum()[None]]) for part in (counts, expected * NUM_SAMPLES)
    )
    # a right sampler fails once in ten thousand seeds, and the seed is fixed
    return bool(chisquare(found, wanted, sum_check=False).pvalue > 1e-4)


def check_refused(make: Callable[[], Case]) -> Outcome:
    """Whether an error comes before any forward, and what it says."""
    case = make()
    attach_safety_head(case.target, tiny.build_head(case.target), tokenizer=tiny.build_tokenizer())
    forwards: list[object] = []
    call = nn.Module.__call__

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forwards.append(module)
        return call(module, *args, **kwargs)

    try:
        with patch.object(nn.Module, "__call__", counted):
            case.target.generate(IDS[:1], **{**GREEDY, **case.arguments}, safespec=True)
    except SafeSpecError as error:
        return {"outcome": "refused" if not forwards else "WRONG", "why": str(error)}
    return {"outcome": "WRONG", "why": "it ran, although this page says that it is refused"}


def run() -> bool:
    """Runs all, writes what came out and the page; whether everything is as it has to be."""
    results: dict[str, Outcome] = {}
    for name, make in METHODS.items():
        torch.manual_seed(0)
        results[name] = check(make)
        print(f"{name:60} {results[name]['outcome']}", flush=True)
    for name, make in REFUSED.items():
        results[name] = check_refused(make)
        print(f"{name:60} {results[name]['outcome']}", flush=True)
    write_json(RESULTS, results)
    update_page(PAGE, BEGIN, table(results), END)
    return all(found["outcome"] != "WRONG" for found in results.values())


def table(results: dict[str, Outcome]) -> str:
    lines = [f"| way of drafting | {' | '.join(CELLS)} | accepted |", f"|---|{'---|' * len(CELLS)}---|"]
    for name, found in results.items():
        if "cells" in found:
            marks = ["yes" if found["cells"][cell] else "**no**" for cell in CELLS]
            lines.append(f"| {name} | {' | '.join(marks)} | {found['accepted'][0]} of {found['accepted'][1]} |")
    lines += ["", "| refused | why |", "|---|---|"]
    lines += [f"| {name} | {' '.join(found['why'].split())} |" for name, found in results.items() if "why" in found]
    return "\n".join(lines) + "\n"
