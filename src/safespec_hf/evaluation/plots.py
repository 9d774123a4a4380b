"""The pictures of an evaluation's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.plots import plain_name, save_drawings


def draw_all(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Draws every picture that the results have figures for, and returns the file names."""
    points = [
        row for row in results["overview"] if not math.isnan(row["ASR"]) and not math.isnan(row["time, attacked"])
    ]
    drawings: dict[str, Callable[[Any], None]] = {}
    if points:
        drawings["asr_against_latency.png"] = lambda axes: _draw_trade_off(points, axes)
    if results["recovery"]:
        drawings["recovery_at_k.png"] = lambda axes: _draw_recovery(results["recovery"], axes)
    return save_drawings(drawings, folder)


def _short(name: str) -> str:
    return plain_name(name[:40])


def _draw_trade_off(points: Sequence[Mapping[str, Any]], axes: Any) -> None:
    for point in points:
        axes.scatter(point["time, attacked"], point["ASR"])
        axes.annotate(_short(point["method"]), (point["time, attacked"], point["ASR"]), fontsize=7)
    axes.set(
        xlabel="time of an attacked answer, against the target alone",
        ylabel="attack success rate",
        ylim=(-0.02, 1.02),
        title="Attack success against latency",
    )


def _draw_recovery(tables: Mapping[str, Any], axes: Any) -> None:
    for method, table in tables.items():
        counts = [row["k"] for row in table["by_k"]]
        (line,) = axes.plot(counts, [row["measured"] for row in table["by_k"]], marker="o", label=_short(method))
        independent = [row["independent"] for row in table["by_k"]]
        axes.plot(counts, independent, linestyle="--", color=line.get_color(), linewidth=1)
    axes.set(
        xlabel="K candidates (dashed: independent ones)",
        ylabel="one of them is safe",
        ylim=(-0.02, 1.02),
        title="Recovery success",
    )
    axes.legend(fontsize=7)
