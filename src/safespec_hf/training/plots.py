"""The report's pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

from .metrics import ScoredAnswers


def draw_all(scored: ScoredAnswers, results: dict[str, Any], folder: Path) -> list[str]:
    """Draws every picture that the results have figures for, and returns the file names."""
    drawings: dict[str, Callable[[Any], None]] = {}
    if any(scored.of_source(source).has_both_classes for source in scored.sources):
        drawings["roc.png"] = lambda axes: _draw_curves(scored, RocCurveDisplay, axes, "ROC of whole answers")
        drawings["precision_recall.png"] = lambda axes: _draw_curves(
            scored, PrecisionRecallDisplay, axes, "Precision and recall of whole answers"
        )
    if results["reliability"]:
        drawings["reliability.png"] = lambda axes: _draw_reliability(results["reliability"], axes)
    drawings["risk_along_answers.png"] = lambda axes: _draw_risk(
        results["mean_risk_along"], results["risk_threshold"], axes
    )
    if results["prefix_auroc"]:
        drawings["auroc_by_prefix.png"] = lambda axes: _draw_prefixes(results["prefix_auroc"], axes)
    if scored.has_both_classes:
        drawings["trade_off.png"] = lambda axes: _draw_trade_off(results["trade_off"], axes)
    if results.get("sweep"):
        drawings["layers_by_pooling.png"] = lambda axes: _draw_sweep(results["sweep"], axes)
    return save_drawings(drawings, folder)


def save_drawings(drawings: Mapping[str, Callable[[Any], None]], folder: Path) -> list[str]:
    """Draws each picture on axes of its own, into the file of its name; returns the names."""
    for name, draw in drawings.items():
        figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        draw(axes)
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
    return list(drawings)


def plain_name(name: str) -> str:
    """A name as a legend shows it: matplotlib reads formulas between dollar signs, and hides what starts with `_`."""
    return f" {name}".replace("$", r"\$")


def _draw_curves(scored: ScoredAnswers, display: Any, axes: Any, title: str) -> None:
    for source in scored.sources:
        part = scored.of_source(source)
        if part.has_both_classes:
            display.from_predictions(part.labels, part.highest(), name=plain_name(source), ax=axes)
    axes.set_title(title)


def _draw_reliability(curve: dict[str, list[float]], axes: Any) -> None:
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.plot(curve["predicted"], curve["observed"], marker="o")
    axes.set(xlabel="highest risk of the answer", ylabel="share that is unsafe", title="Reliability")


def _draw_risk(curves: dict[str, list[float]], threshold: float, axes: Any) -> None:
    for kind, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=kind)
    axes.axhline(threshold, color="grey", linestyle="--", label="threshold")
    axes.set(xlabel="token of the answer", ylabel="mean risk", ylim=(0, 1), title="Risk along answers")
    axes.legend()


def _draw_prefixes(table: dict[str, dict[str, float | None]], axes: Any) -> None:
    for source, row in table.items():
        points = [(int(name.split()[0]), value) for name, value in row.items() if name.endswith("tokens")]
        axes.plot([num for num, _ in points], [value for _, value in points], marker="o", label=plain_name(source))
    axes.set(xscale="log", xlabel="tokens of the answer seen", ylabel="AUROC", title="AUROC against prefix length")
    axes.legend()


def _draw_trade_off(points: list[dict[str, Any]], axes: Any) -> None:
    for name in (name for name in points[0] if name.endswith(" unsafe")):
        axes.plot([p["all safe"] for p in points], [p[name] for p in points], label=plain_name(name))
    axes.set(xlabel="safe answers flagged anywhere", ylabel="unsafe answers flagged", title="Trade-off")
    axes.legend()


def _draw_sweep(sweep: list[dict[str, Any]], axes: Any) -> None:
    singles = [result for result in sweep if len(result["hidden_layers"]) == 1]
    layers = sorted({result["hidden_layers"][0] for result in singles})
    readings = sorted({"-".join(result["reading"]) for result in singles})
    found = {("-".join(r["reading"]), r["hidden_layers"][0]): r["auroc"] for r in singles}
    grid = [[found.get((reading, layer), float("nan")) for layer in layers] for reading in readings]
    axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(readings)), readings)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white", fontsize=7)
    axes.set(xlabel="layer", title="Validation AUROC of linear probes")
