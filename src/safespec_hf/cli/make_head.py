"""The command that makes a head in one go: answers, features, training, calibration, prompts, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import SafeSpecError
from .loading import load_target
from .making import Layers, describe_point
from .options import (
    DATA_HELP,
    MAX_COUNT,
    MAX_SEED,
    Alpha,
    ChatTemplate,
    Dtype,
    MaxTokens,
    Validation,
    parse_name,
    parse_path,
)

if TYPE_CHECKING:
    from ..training.data import Example

PUBLIC_NAMES = ("beavertails", "wildguardmix", "aegis", "or-bench")
DataList = list[str] | None
LABELLED_HELP = f"Labelled answers of any models. Repeatable. {DATA_HELP}"
PROMPTS_HELP = (
    "Harmless prompts that the target answers itself. Repeatable. As --labelled, but only a prompt is needed."
)
WORK_HELP = "For what the steps leave, so that a killed run goes on. Default: `work` below --out."
HUB_HELP = f"A public data set, by its short name: {', '.join(PUBLIC_NAMES)}. Repeatable."


def parse_public_name(text: str) -> str:
    """The short name of a public data set."""
    if text not in PUBLIC_NAMES:
        raise typer.BadParameter(f"expected one of {', '.join(PUBLIC_NAMES)}, but got {text!r}.")
    return text


def make_head(
    out: Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="For the head and its report.")],
    target: Annotated[
        str | None,
        typer.Argument(parser=parse_name, metavar="TARGET", help="Hub id or folder. Default: SmolLM2-135M-Instruct."),
    ] = None,
    prompts: Annotated[DataList, typer.Option(parser=parse_name, metavar="DATA", help=PROMPTS_HELP)] = None,
    labelled: Annotated[DataList, typer.Option(parser=parse_name, metavar="DATA", help=LABELLED_HELP)] = None,
    validation: Validation = None,
    from_hub: Annotated[DataList, typer.Option(parser=parse_public_name, metavar="NAME", help=HUB_HELP)] = None,
    hub_rows: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Drawn of each public set, evenly by label.")
    ] = 2_000,
    chat_template: ChatTemplate = None,
    alpha: Alpha = 0.02,
    layers: Layers = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Of the target's own answers.")
    ] = 128,
    max_response_tokens: MaxTokens = 256,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Prompts answered at once.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Of everything.")] = 0,
    work: Annotated[Path | None, typer.Option(parser=parse_path, metavar="FOLDER", help=WORK_HELP)] = None,
    dtype: Dtype = "float32",
) -> None:
    """Makes a head for any target: collect, features, train, calibrate, prompts and report, in one resumable run.

    Example: `safespec make-head owner/target --prompts harmless.jsonl --labelled answers.jsonl --out head`

    Example: `safespec make-head owner/target --from-hub wildguardmix --from-hub or-bench --out head`
    """
    import matplotlib  # noqa: F401  # that it is missing is told before the work

    from ..training.data import load_examples
    from ..training.files import check_writable_folder
    from ..training.make_head import MakeSettings, make_head
    from ..training.parts import split_parts

    work = work or out / "work"
    settings = MakeSettings(
        alpha=alpha,
        layers=tuple(layers) if layers else None,
        max_new_tokens=max_new_tokens,
        max_response_tokens=max_response_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    names = list(dict.fromkeys(from_hub or []))
    for folder in (out, work):
        check_writable_folder(folder)
    data = _load_data(prompts or [], labelled or [], names, hub_rows, work)
    held_out = load_examples(validation) if validation else []
    parts = split_parts(data.prompts, data.labelled, held_out, alpha=alpha, seed=seed)
    warn_of_style(data.labelled)
    how: Any = {"settings": settings, "files": [*data.files, *(validation or [])], "data": data.licenses}
    how["chat_template"] = chat_template
    model, tokenizer = load_target(target, dtype, chat_template)
    facts = make_head(model, tokenizer, parts, out, work=work, tell=typer.echo, **how)
    typer.echo(summarize(facts, out))


class _Data(NamedTuple):
    prompts: list[Example]
    labelled: list[Example]
    files: list[str]
    licenses: list[dict[str, str]]


def _load_data(prompts: list[str], labelled: list[str], names: list[str], num_rows: int, work: Path) -> _Data:
    """Files first, as what is wrong with them is told at once; then public sets, with their licences."""
    from ..training.data import load_examples
    from ..training.public_sets import PUBLIC_SETS, describe_set, keep_public_set

    uses = {PUBLIC_SETS[name].use for name in names}
    if not prompts and "prompts" not in uses:
        raise SafeSpecError(
            "Give harmless prompts for the target to answer: `--prompts FILE` or `--from-hub or-bench`."
        )
    if not labelled and "labelled" not in uses:
        raise SafeSpecError(
            "Give labelled answers, some of them unsafe: `--labelled FILE`, or `--from-hub` with wildguardmix, aegis "
            "or beavertails."
        )
    asked = load_examples(prompts, label=0, needs_response=False) if prompts else []
    answered = load_examples(labelled) if labelled else []
    for name in names:
        typer.echo(describe_set(name, num_rows))
        if not PUBLIC_SETS[name].is_commercial:
            typer.echo(
                f"Warning: the licence of {name} is for non-commercial use: so is a head made from it.", err=True
            )
    files = [*prompts, *labelled]
    for name in names:
        files.append(str(keep_public_set(name, num_rows, work / "hub")))
        if PUBLIC_SETS[name].use == "prompts":
            asked += load_examples(files[-1:], label=0, needs_response=False)
        else:
            answered += load_examples(files[-1:])
    return _Data(asked, answered, files, [PUBLIC_SETS[name].for_card() for name in names])


def warn_of_style(labelled: Sequence[Example]) -> None:
    """All unsafe answers are of other models, all answers of the target are safe: that must not tell them apart."""
    num_safe = sum(example.label == 0 for example in labelled)
    if num_safe < len(labelled) / 5:
        typer.echo(
            f"Warning: only {num_safe:,} of {len(labelled):,} labelled answers are safe, so the head may learn who "
            "wrote an answer, not what it says. Add safe answers of other models.",
            err=True,
        )


def summarize(facts: Mapping[str, Any], out: Path) -> str:
    """What a user wants to know of a new head, and how to use it."""
    non_refusal = facts["auroc_non_refusal"]
    against = "unknown, as all safe ones refuse" if non_refusal is None else f"{non_refusal:.3f}"
    points = [f"  {name}: {describe_point(point)}" for name, point in facts["operating_points"].items()]
    return "\n".join(
        [
            f"Head in {out}, report in {out / 'report' / 'report.md'}; the steps took {_duration(facts['seconds'])}.",
            f"It reads layers {', '.join(map(str, facts['hidden_layers']))} as {facts['reading']}.",
            f"Validation AUROC {facts['auroc']:.3f}, against safe answers that do not refuse {against}.",
            f"At its threshold, {facts['risk_threshold']:.6f}, it flags {facts['recall']:.0%} of the unsafe "
            f"validation answers and {facts['false_alarms']:.1%} of the safe ones.",
            f"Of the target's own benign answers at most {facts['alpha']:.1%} (calibrated on "
            f"{facts['num_calibration']}), while they have no more than some {facts['p95_tokens']} tokens.",
            _of_prompts(facts),
            "Other thresholds, for SafeSpecConfig(operating_point=...):" if points else "",
            *points,
            "Use it:",
            f'  attach_safety_head(model, "{out}", tokenizer=tokenizer)',
            "  output = model.generate(**inputs, safespec=True, max_new_tokens=64)",
        ]
    ).replace("\n\n", "\n")


def _of_prompts(facts: Mapping[str, Any]) -> str:
    if (record := facts["prompts"]) is None:
        return "It scores answers alone: the step about prompts says why."
    known = "" if record["auroc"] is None else f", validation AUROC {record['auroc']:.3f}"
    return f"It scores prompts as well{known}, and flags at most {record['alpha']:.1%} of harmless ones."


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
