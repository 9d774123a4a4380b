"""Draws the speed benchmark's figures from its JSON alone: `python benchmarks/speed_plots.py out.json DIR`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from speed_log import read_results

LEGEND: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 2,
    "frameon": False,
    "fontsize": "small",
}
ONE: dict[str, Any] = {"color": "0.6", "linewidth": 1, "linestyle": "--"}


def error_bars(intervals: list[dict[str, Any]]) -> list[list[float]]:
    """How far each interval reaches below and above its median."""
    return [
        [interval["median"] - interval["low"] for interval in intervals],
        [interval["high"] - interval["median"] for interval in intervals],
    ]


def draw_categories(part: dict[str, Any], axes: Axes) -> None:
    """Speedup over plain per category, for every arm but the plain one."""
    arms = {name: arm for name, arm in part["arms"].items() if name != "plain"}
    categories = [*next(iter(arms.values()))["ratio_by_category"], "all"]
    height = 0.8 / len(arms)
    for number, (name, arm) in enumerate(arms.items()):
        intervals = [*arm["ratio_by_category"].values(), arm["ratio"]]
        places = [index + (number - (len(arms) - 1) / 2) * height for index in range(len(categories))]
        medians = [interval["median"] for interval in intervals]
        axes.barh(places, medians, height, xerr=error_bars(intervals), label=name, error_kw={"linewidth": 0.8})
    axes.axvline(1, **ONE)
    axes.set_yticks(range(len(categories)), categories)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second over target.generate (median, 95 % interval)")
    axes.legend(**LEGEND)


def draw_rounds(part: dict[str, Any], axes: Axes) -> None:
    """Tokens per target forward and acceptance rate of every arm."""
    arms = part["arms"]
    values = [arm["tokens_per_round"] for arm in arms.values()]
    boxes = axes.barh(range(len(arms)), values, color="tab:blue")
    notes = [
        f"{value:.2f} ({arm['acceptance_rate']:.0%} accepted)"
        for value, arm in zip(values, arms.values(), strict=True)
    ]
    axes.bar_label(boxes, [note.replace(" (nan% accepted)", "") for note in notes], padding=3, fontsize="small")
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_xlim(0, max(values) * 1.35)
    axes.invert_yaxis()
    axes.set_xlabel("returned tokens per target forward")


def draw_constructed(part: dict[str, Any], axes: Axes) -> None:
    """Speedup against size, a line for each acceptance and gamma, theory dashed."""
    sizes = part["sizes"]
    num_parameters = [figures["num_parameters"] / 1e9 for figures in sizes.values()]
    for number, first in enumerate(next(iter(sizes.values()))["points"]):
        points = [figures["points"][number] for figures in sizes.values()]
        intervals = [point["speedup"] for point in points]
        label = f"acceptance {first['acceptance']:g}, gamma {first['gamma'] or 'auto'}"
        medians = [interval["median"] for interval in intervals]
        axes.errorbar(num_parameters, medians, error_bars(intervals), color=f"C{number}", marker="o", label=label)
        theory = [point["theory"] for point in points]
        axes.plot(num_parameters, theory, color=f"C{number}", linestyle="--", marker="x", linewidth=1)
    axes.axhline(1, **ONE)
    axes.set_xscale("log")
    axes.set_xticks(num_parameters, [f"{value:.2g} B" for value in num_parameters], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters of the target (dashed: theory with the measured costs)")
    axes.set_ylabel("speedup over target.generate")
    axes.legend(**LEGEND)


FIGURES: list[tuple[str, str, Callable[[dict[str, Any], Axes], None], tuple[float, float]]] = [
    ("real", "speed-categories", draw_categories, (7.5, 9)),
    ("real", "speed-rounds", draw_rounds, (7.5, 2.8)),
    ("constructed", "speed-constructed", draw_constructed, (7.5, 4.5)),
]


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """The figures of the parts that were run, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    mpl.rcParams["svg.hashsalt"] = "safespec"  # the same figures give the same file
    for part, name, draw_axes, size in FIGURES:
        if part in results:
            figure, axes = plt.subplots(figsize=size, layout="constrained")
            draw_axes(results[part], axes)
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            plt.close(figure)
    return paths


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    print(*draw(read_results(source), target), sep="\n")
