"""A report on a head: figures with their provenance as JSON, tables as Markdown, and pictures."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..heads.card import to_json, to_table
from . import metrics
from .data import base_names
from .files import check_writable_folder, distinct_names, hash_file
from .metrics import ScoredAnswers

PACKAGES = ("safespec-hf", "torch", "transformers", "scikit-learn", "safetensors", "numpy")


def provenance(files: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """Where figures come from: command, source, versions, and hashes of the data.

    Args:
        files (`Sequence[str]`, *optional*): Data files; what is no file, such as a Hub id, is named without a hash.

    Example:

        >>> from safespec_hf.training.report import provenance
        >>> sorted(provenance())
        ['argv', 'data', 'git_sha', 'platform', 'time', 'versions']
    """
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    sha = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "argv": base_names(sys.argv),
        "git_sha": sha or None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "data": {
            name: hash_file(file) if os.path.isfile(file) else None
            for name, file in zip(distinct_names(files), files, strict=True)
        },
    }


def evaluate(scored: ScoredAnswers, risk_threshold: float) -> dict[str, Any]:
    """Every figure of a report.

    Args:
        scored ([`ScoredAnswers`]): Answers and their risks.
        risk_threshold (`float`): The head's.

    Returns:
        `dict`: What a set of one class can't give is `None` or empty, and `missing` has a sentence on it.

    Raises:
        SafeSpecError: If there is no answer, or a risk is none, such as NaN.
    """
    metrics.check_risks(scored)
    return {
        "risk_threshold": risk_threshold,
        "missing": metrics.missing_figures(scored),
        "sources": metrics.summarize_sources(scored, risk_threshold),
        "categories": metrics.summarize_categories(scored, risk_threshold),
        "prefix_auroc": metrics.prefix_auroc(scored),
        "reliability": metrics.reliability(scored),
        "mean_risk_along": metrics.mean_risk_along(scored),
        "trade_off": metrics.trade_off(scored),
    }


def write_report(
    scored: ScoredAnswers,
    risk_threshold: float,
    folder: str | os.PathLike[str],
    *,
    files: Sequence[str | os.PathLike[str]] = (),
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `report.json`, `report.md` and pictures.

    Args:
        scored ([`ScoredAnswers`]): Answers and their risks; with one class only, the report says what it lacks.
        risk_threshold (`float`): The head's.
        folder (`str` or `os.PathLike`): Where to.
        files (`Sequence[str]`, *optional*): The data, for its hashes.
        training (`dict`, *optional*): The head's `training.json`: its sweep is drawn, its calibration is shown.

    Returns:
        `dict`: The content of `report.json`, with NaN where the file has `null`.

    Raises:
        SafeSpecError: If the folder can't be written to, there is no answer, or a risk is none, such as NaN.
    """
    from .plots import draw_all

    path = Path(folder)
    check_writable_folder(path)
    training = training or {}
    results = evaluate(scored, risk_threshold) | {key: training.get(key) for key in ("sweep", "calibration")}
    pictures = draw_all(scored, results, path)
    report = {"provenance": provenance(files), "results": results}
    (path / "report.json").write_text(to_json(report))
    (path / "report.md").write_text(_to_markdown(report, pictures))
    return report


def layers_table(sweep: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How much each hidden state tells by itself: a row for each layer, a column for each way of reading it.

    Args:
        sweep (`Sequence[Mapping]`): What [`sweep_readings`] returned; what reads several layers is left out.

    Returns:
        `list[dict]`: `layer`, the AUROC of each reading, `nan` where it was not tried, and `best`, the highest.

    Example:

        >>> tried = {"hidden_layers": [2], "reading": ["mean", "answer"], "auroc": 0.75, "partial_auroc": 0.5}
        >>> layers_table([tried])
        [{'layer': 2, 'mean-answer': 0.75, 'best': 0.75}]
    """
    found = {
        (one["hidden_layers"][0], "-".join(one["reading"])): one for one in sweep if len(one["hidden_layers"]) == 1
    }
    readings = sorted({reading for _, reading in found})
    rows = []
    for layer in sorted({layer for layer, _ in found}):
        row = {name: found[layer, name]["auroc"] if (layer, name) in found else math.nan for name in readings}
        best = max(value for value in row.values() if not math.isnan(value))
        rows.append({"layer": layer, **row, "best": best})
    return rows


def _to_markdown(report: dict[str, Any], pictures: Sequence[str]) -> str:
    results, origin = report["results"], report["provenance"]
    threshold = results["risk_threshold"]
    sources = [{"source": name, **row} for name, row in results["sources"].items()]
    benign = [
        {"source": row["source"], "answers": row["num_safe"], "flagged anywhere": row["false_alarms"]}
        for row in sources
        if row["num_safe"]
    ]
    prefixes = [{"source": name, **row} for name, row in results["prefix_auroc"].items()]
    points = results["trade_off"]
    lacking = "".join(f"- {sentence}\n" for sentence in results["missing"])
    layers = layers_table(results.get("sweep") or ())
    by_layer = ["## Validation AUROC by layer\n\nOf linear probes on one layer.\n\n" + to_table(layers)]
    missing = ["## What these answers can't tell\n\n" + lacking.strip()] if lacking else []
    sections = [
        "# Report on a safety head",
        f"An answer's score is the highest risk at any of its tokens; it is flagged at {threshold:.4f} or more.",
        *missing,
        "## By source\n\n" + to_table(sources),
        "## False alarms by source of safe answers\n\n" + (to_table(benign) if benign else "No answer is safe."),
        "## By category\n\nThe most often missed ones first.\n\n" + to_table(results["categories"]),
        "## AUROC by how much of the answer was seen\n\n" + (to_table(prefixes) if prefixes else "One class only."),
        *(by_layer if layers else []),
        "## Trade-off\n\n" + (to_table(points[-41::2]) if points else "No answer is safe."),
        "## Pictures\n\n" + "\n\n".join(f"![{name}]({name})" for name in pictures),
        "## Provenance\n\n```json\n" + json.dumps(origin, indent=2) + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
