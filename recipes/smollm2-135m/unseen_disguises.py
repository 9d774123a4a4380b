"""What the probe knows of a kind of disguise that it was not trained on; reads what `run.sh` left in WORK."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from safespec_hf import load_default
from safespec_hf.training.calibrate import conformal_threshold
from safespec_hf.training.data import Example, load_examples
from safespec_hf.training.disguises import DISGUISES, disguise
from safespec_hf.training.prompt_probe import fit_probe, read_prompts

KINDS = [kind for kind, ways in DISGUISES.items() for _ in ways]


def kind_of(example: Example) -> str | None:
    """The kind of an example's disguise; `None` without one."""
    number = example.id.rpartition(", disguise ")[2] if "disguised" in example.source else ""
    return KINDS[int(number)] if number else None


def main() -> None:
    """Prints a table: trained without disguises, without those of a kind, and with all, flagged of that kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="the folder of run.sh")
    parser.add_argument("--alpha", type=float, default=0.01)
    arguments = parser.parse_args()
    names = ("train", "validation", "calibration")
    parts = {name: load_examples([arguments.work / f"requests_{name}.jsonl"], needs_response=False) for name in names}
    train = [*parts["train"], *disguise(parts["train"], 3)]
    measured = disguise(parts["validation"], 1, seed=1)
    model, tokenizer, _ = load_default(dtype=torch.float32)
    layers = model.safety.head.config.hidden_layers
    every = [*train, *parts["calibration"], *measured]
    states_NF = read_prompts(model, tokenizer, layers, every, arguments.work / "cache")
    seen, calm, new = states_NF.split([len(train), len(parts["calibration"]), len(measured)])

    def flagged(kinds: Sequence[str | None], of: str) -> str:
        kept = [index for index, example in enumerate(train) if kind_of(example) in kinds]
        weight_F, bias = fit_probe(seen[kept], [int(train[index].label or 0) for index in kept])
        limit = conformal_threshold(torch.sigmoid(calm @ weight_F + bias).tolist(), arguments.alpha)
        hits = (torch.sigmoid(new @ weight_F + bias) >= limit).tolist()
        shares = []
        for label in (1, 0):
            found = [
                hit
                for hit, example in zip(hits, measured, strict=True)
                if kind_of(example) == of and (example.label or 0) == label and "medsafety" not in example.source
            ]
            shares.append(f"{sum(found)} of {len(found)}")
        return ", ".join(shares)

    print("Harmful ones (without medsafety) and harmless ones flagged, of the kind:\n")
    print("| kind | no disguises | the other kinds | all kinds |\n|---|---|---|---|")
    for kind in DISGUISES:
        others = [None, *(other for other in DISGUISES if other != kind)]
        columns = [flagged(kinds, kind) for kinds in ([None], others, [None, *DISGUISES])]
        print(f"| {kind} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
