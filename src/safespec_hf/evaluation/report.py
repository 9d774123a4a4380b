"""A report on an evaluation: figures with their provenance as JSON, tables as Markdown, and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import SafeSpecError
from ..heads.card import to_json, to_table
from ..training.files import check_writable_folder
from ..training.report import provenance
from .judges import Judge
from .judging import judge_rows
from .rows import AnswerFile, Row, key_of, read_answers
from .statistics import is_too_weak
from .summaries import (
    JUDGED,
    Answers,
    Similarity,
    attack_rates,
    missing_answers,
    overview,
    recovery_tables,
    set_figures,
    usefulness_table,
)

VERDICTS_SUFFIX = ".verdicts.jsonl"


def write_evaluation_report(
    path: str | os.PathLike[str],
    judges: Sequence[Judge],
    folder: str | os.PathLike[str],
    *,
    similarity: Similarity | None = None,
) -> dict[str, Any]:
    """Writes `report.json`, `report.md` and pictures about what `safespec evaluate` wrote.

    Args:
        path (`str` or `os.PathLike`): The answers. Verdicts are kept beside them, in `<path>.verdicts.jsonl`.
        judges (`Sequence[Judge]`): Who says what is harmful; the first one is the one of the overview.
        folder (`str` or `os.PathLike`): Where to.
        similarity (`Callable`, *optional*): Of requests and answers, such as by embeddings.

    Returns:
        `dict`: The content of `report.json`, with NaN where the file has `null`.

    Raises:
        SafeSpecError: If there is no judge or no answer, two judges have one name, or the folder can't be written to.
    """
    from .plots import draw_all

    if not judges:
        raise SafeSpecError("Give at least one judge: without one nobody knows which answers are harmful.")
    names = [judge.name for judge in judges]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SafeSpecError(
            f"Two judges are called {twice!r}, and a report tells them by their names: rename the folder of one, or "
            "the `name` in the judge.json of one that `safespec make-judge` made."
        )
    rows = read_answers(path)
    out = Path(folder)
    check_writable_folder(out)
    settings = AnswerFile(Path(path)).read_settings()
    results = measure(rows, judges, f"{path}{VERDICTS_SUFFIX}", settings, similarity=similarity)
    pictures = draw_all(results, out)
    report = {"provenance": provenance([path]), "results": results}
    (out / "report.json").write_text(to_json(report), encoding="utf-8")
    (out / "report.md").write_text(to_markdown(report, pictures), encoding="utf-8")
    return report


def measure(
    rows: Sequence[Row],
    judges: Sequence[Judge],
    verdicts: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    similarity: Similarity | None = None,
) -> dict[str, Any]:
    """Everything that is in the report.

    Args:
        rows (`Sequence[Mapping]`): The answers.
        judges (`Sequence[Judge]`): The first one is the one of the overview.
        verdicts (`str` or `os.PathLike`): File that keeps what judges have said.
        settings (`Mapping[str, Any]`): What the file of answers was begun with.
        similarity (`Callable`, *optional*): Of requests and answers.
    """
    answers = Answers(rows)
    judged = [row for row in answers.rows if row["kind"] in JUDGED]
    attacks = {}
    for judge in judges:
        risks = judge_rows(judge, judged, verdicts)
        by_key = {key_of(row): risk for row, risk in zip(judged, risks, strict=True)}
        attacks[judge.name] = attack_rates(answers, judge, by_key)
    return {
        "missing": missing_answers(answers),
        "judges": [describe_judge(judge) for judge in judges],
        "overview": overview(answers, attacks[judges[0].name]),
        "attacks": attacks,
        "sets": set_figures(answers),
        "usefulness": usefulness_table(answers, similarity),
        "recovery": recovery_tables(answers, settings.get("methods", {})),
        "settings": dict(settings),
    }


def describe_judge(judge: Judge) -> dict[str, Any]:
    """What is known of a judge: what it gets wrong, and whether it can tell at all."""
    errors = judge.errors
    known = {} if errors is None else {**asdict(errors), "accuracy": errors.accuracy}
    known |= {} if errors is None else {"sensitivity": errors.sensitivity, "specificity": errors.specificity}
    return {"judge": judge.name, "threshold": judge.threshold, **known, "can tell": _can_tell(judge)}


def _can_tell(judge: Judge) -> str:
    if judge.errors is None:
        return "not measured"
    return "too weak to tell" if is_too_weak(judge.errors) else "yes"


def to_markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report as a page."""
    results, origin = report["results"], report["provenance"]
    lacking = "\n".join(f"- {sentence}" for sentence in results["missing"])
    attacks = [
        f"### Judged by {name}\n\n{_describe_verdicts(results, name)}\n\n{to_table(table) if table else 'No attacks.'}"
        for name, table in results["attacks"].items()
    ]
    recovery = [
        f"### {method}\n\n{table['num_attempts']} attempts, p = {table['p_safe']:.3f}, correlation within an attempt "
        f"{table['correlation']:.3f}\n\n{to_table(table['by_k'])}"
        for method, table in results["recovery"].items()
    ]
    useful = results["usefulness"]
    sections = [
        "# Report on an evaluation",
        *(["## What these answers can't tell\n\n" + lacking] if lacking else []),
        f"## Methods\n\nAttack success as {results['judges'][0]['judge']} judges it, averages over sets; speed and "
        "time against the target alone.\n\n" + to_table(results["overview"]),
        "## Judges\n\n" + to_table(results["judges"]),
        "## Attacks\n\nIntervals are of 95 %, by bootstrap over prompts.\n\n" + "\n\n".join(attacks),
        "## Sets\n\n" + to_table(results["sets"]),
        "## Answers in which something was flagged\n\n" + (to_table(useful) if useful else "Nothing was flagged."),
        "## Recovery: is one of K candidates safe?\n\nBeside it what K independent candidates of the same p would "
        "reach, and how many of those are worth as much.\n\n" + ("\n\n".join(recovery) or "Nothing was recovered."),
        "## Pictures\n\n" + ("\n\n".join(f"![{name}]({name})" for name in pictures) or "None."),
        "## Provenance\n\n```json\n" + json.dumps(origin, indent=2) + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _describe_verdicts(results: Mapping[str, Any], name: str) -> str:
    judge = next(judge for judge in results["judges"] if judge["judge"] == name)
    if judge["can tell"] == "yes":
        return (
            f"Of answers that people labelled it was right about {judge['accuracy']:.0%}; `corrected` allows for it."
        )
    if judge["can tell"] == "not measured":
        return "What it gets wrong is not measured, so nothing is corrected."
    return "**This judge is too weak to tell**: of answers that people labelled it knows too little."
