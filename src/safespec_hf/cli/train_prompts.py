"""The command `safespec train-prompts`: a head that knows harmful requests before they are answered."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import SafeSpecError
from ..training.disguises import NUM_DISGUISES
from .loading import load_target
from .options import (
    DEFAULT_CACHE,
    MAX_SEED,
    Cache,
    ChatTemplate,
    Dtype,
    Head,
    Prompts,
    Target,
    check_share,
    parse_name,
)

Disguises = Annotated[
    int,
    typer.Option(metavar="N", min=0, max=NUM_DISGUISES, help="Also train on harmful prompts in so many disguises."),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Of the disguises.")]


def train_prompts(
    head: Head,
    prompts: Prompts,
    calibration: Annotated[
        list[str],
        typer.Option(parser=parse_name, metavar="PROMPTS", help="Other harmless prompts, for the threshold."),
    ],
    benign: Annotated[
        list[str] | None,
        typer.Option(parser=parse_name, metavar="PROMPTS", help="As PROMPTS, but rows without a label are harmless."),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(parser=parse_name, metavar="PROMPTS", help="Labelled prompts to measure on. Repeatable."),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(metavar="SHARE", callback=check_share, help="Bound on the share of harmless prompts flagged."),
    ] = 0.01,
    disguises: Disguises = 3,
    seed: Seed = 0,
    target: Target = None,
    chat_template: ChatTemplate = None,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Has a head score prompts as well: a linear probe on what it reads of a prompt's last token.

    Labels are those of the prompts: 1 is a request for harm, whatever was answered. So that it learns the request and
    not how that is put, prompts of both labels are also read in disguises. The head is changed in place.

    Example: `safespec train-prompts head harmful.jsonl --benign harmless.jsonl --calibration other_harmless.jsonl`
    """
    from ..training.data import load_examples
    from ..training.files import check_writable_folder
    from ..training.prompt_probe import check_prompts, train_prompts
    from ..training.record import read_record

    train = load_examples(prompts, needs_response=False)
    train += load_examples(benign, label=0, needs_response=False) if benign else []
    held_out = load_examples(calibration, label=0, needs_response=False)
    measured = load_examples(validation, needs_response=False) if validation else []
    if unlabelled := next((example.id for example in [*train, *measured] if example.label is None), None):
        raise SafeSpecError(f"Prompt {unlabelled!r} has no label: add it, or pass the file as `--benign`.")
    if any(example.label for example in held_out):
        raise SafeSpecError("Prompts to calibrate on must be harmless, but some are labelled unsafe.")
    check_prompts(train, held_out, alpha, measured)
    check_writable_folder(head)
    check_writable_folder(cache)
    read_record(head)  # a record that can't be added to is told now
    record = train_prompts(
        *load_target(target, dtype, chat_template),
        head,
        train,
        held_out,
        alpha=alpha,
        cache_dir=cache,
        validation=measured,
        num_disguises=disguises,
        seed=seed,
        files=[*prompts, *(benign or []), *calibration, *(validation or [])],
    )
    typer.echo(f"prompt threshold {record['prompt_threshold']:.6f} from {len(held_out)} harmless prompts")
    for name, flagged in record["flagged"].items():
        typer.echo(f"{name}: {flagged['share']:.1%} of {flagged['num']} flagged")
