"""Speed of guarded decoding beside the target alone and transformers' own assisted decoding; exits with 1 below a bar.

    python benchmarks/speed.py --data DATA --json out.json                 # everything; hours on 2 cores
    python benchmarks/speed.py --data DATA --json out.json --only recovery # one part; the others in out.json stay
    python benchmarks/speed.py --data DATA --json out.json --resume        # goes on with an interrupted run
    python benchmarks/speed.py --tokens 32                                 # a short look, without data

DATA holds benign/spec_bench_even.jsonl. All arms of a part are interleaved prompt by prompt, in a shuffled order, so
that a machine that gets slower or faster meets all of them. Ratios are per prompt, in returned tokens per second of
whole calls, prefill included; medians come with a bootstrap 95 % interval over prompts. Parts:

real         (a) target.generate, (b) transformers' prompt lookup and assisted decoding, each with the best of some
             settings on other prompts, (c) ours with the head off, (d) ours with the head on, and (d) without
             packed weights, which is what speculation alone gives; greedy, `--dtype`.
fp32, sampled  the same in float32, and sampled at `--temperature`.
parity       float32, a head that never fires: token-identical to (a)?
recovery     the head is made to fire 1 to 4 times per answer.
compiled     ours through torch.compile; what compiling takes is reported apart.
hopeless     a draft of random weights; prompt lookup that never matches.
batch        batches of 1 to 16 mixed prompts, beside `generate` with the same batch.
raw          raw forwards of 1 to 17 tokens: whether the CPU multiplies bfloat16 numbers by itself.
measuring    what measuring the costs of forwards takes, in the first call on a machine and in later ones.
constructed  larger targets and drafts of random weights with a chosen agreement: see constructed.py.

Engine efficiency = measured speedup / the speedup of raw forwards: see EFFICIENCY_FORMULA in speed_statistics.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import constructed
import speed_machine
import speed_parts
import speed_plots
import torch
from provenance import provenance, write_json
from rich.console import Console
from rich.table import Table
from speed_log import Log, read_results
from speed_parts import Target
from speed_statistics import Bar
from transformers.utils import logging

BARS_ACCEPTANCE = 0.75
SEVERAL_FOR_ONE = 1.8  # times of one token that five take at most where the CPU multiplies bfloat16 numbers by itself
Results = dict[str, Any]
REAL_PARTS: dict[str, Callable[[Target, Log], Results]] = {
    "real": lambda target, log: speed_parts.measure_real(target, log, "real"),
    "fp32": lambda target, log: speed_parts.measure_real(target, log, "fp32"),
    "sampled": lambda target, log: speed_parts.measure_real(
        target, log, "sampled", do_sample=True, temperature=target.options.temperature, top_k=0
    ),
    "parity": speed_parts.measure_parity,
    "recovery": speed_parts.measure_recovery,
    "hopeless": speed_parts.measure_hopeless,
    "compiled": speed_parts.measure_compiled,
    "batch": speed_machine.measure_batch,
    "raw": speed_machine.measure_raw,
    "measuring": speed_machine.measure_measuring,
}
PARTS = [*REAL_PARTS, "constructed"]


def run_constructed(options: argparse.Namespace, log: Log) -> Results:
    settings = constructed.Settings(
        sizes=options.sizes.split(","),
        acceptances=[float(value) for value in options.acceptances.split(",")],
        gammas=[0 if value == "auto" else int(value) for value in options.gammas.split(",")],
        tokens=options.constructed_tokens,
        starts=options.starts,
        vocab_size=options.vocab_size,
        dtype=getattr(torch, options.dtype),
        device=options.device,
    )
    return {"settings": constructed.described(settings, options.sizes), "sizes": constructed.measure(settings, log)}


def has_bfloat16(results: Results) -> bool:
    """Whether the CPU multiplies bfloat16 numbers by itself: elsewhere each of a few tokens takes as long again."""
    seconds = results["raw"]["seconds"]["as it is"]
    return bool(seconds["5"] < SEVERAL_FOR_ONE * seconds["1"])


def bars_of(results: Results) -> list[Bar]:
    """The bars, as far as parts have been run; those that depend on the machine by its raw forwards."""
    bars: list[Bar] = []
    if "real" in results and results["real"]["settings"]["dtype"] == "bfloat16":
        bars += real_bars(results["real"], has_bfloat16(results) if "raw" in results else None)
    if "fp32" in results:
        bars.append(Bar("fp32", "(d)/(a)", results["fp32"]["on_over_plain"]["median"], 1.73))
    if "sampled" in results:
        bars.append(Bar("sampled", "(d)/(a)", results["sampled"]["on_over_plain"]["median"], 1.6))
        bars.append(Bar("sampled", "not packed", results["sampled"]["unpacked_over_plain"]["median"], 1.1))
    if "parity" in results:
        part = results["parity"]
        bars.append(
            Bar("parity", "share of float32 answers identical", part["num_identical"] / part["num_prompts"], 1)
        )
    if "recovery" in results:
        part = results["recovery"]
        bars.append(Bar("recovery", "prompts with 1 to 4 flags", part["num_prompts"], 40))
        bars.append(Bar("recovery", "(d)/(a), tokens per second", part["ratio_tokens_per_second"]["median"], 1.0))
        bars.append(
            Bar("recovery", "(a)/(d), seconds per answer", part["ratio_seconds_per_answer"]["median"], 1.0, True)
        )
    for name, arm in results.get("hopeless", {"arms": {}})["arms"].items():
        bars.append(Bar("hopeless", f"{name} / plain", arm["ratio"]["median"], 0.97))
    batches = results.get("batch", {"sizes": {}})["sizes"]
    if {"1", "8"} <= batches.keys():
        rates = [batches[size]["arms"]["ours"]["tokens_per_second"]["median"] for size in ("8", "1")]
        bars.append(Bar("batch", "8 rows / one row, ours", rates[0] / rates[1], 3.0))
    for size, figures in batches.items():
        limit = {"1": 1.0, "8": 1.15}.get(size, 0.97)
        bars.append(Bar("batch", f"{size} rows, ours / plain", figures["ours_over_plain"]["median"], limit))
    if "measuring" in results:
        first, *later = results["measuring"]["seconds"]
        bars.append(Bar("measuring", "1 - seconds of the first call", 1 - first, 0))
        bars.append(Bar("measuring", "- seconds of later calls", -max(later), 0))
    for size, figures in results.get("constructed", {"sizes": {}})["sizes"].items():
        bars += constructed_bars(size, figures)
    return bars


def real_bars(part: Results, has_own: bool | None) -> list[Bar]:
    """`has_own`: whether the CPU multiplies bfloat16 numbers by itself; `None` if that is not known."""
    efficiency = part["efficiency"]["engine_efficiency"]["median"]
    on, least = part["on_over_plain"]["median"], part["least_on_over_plain"]
    own = [Bar("real", "not packed", part["unpacked_over_plain"]["median"], 2.06)] if has_own else []
    return [
        Bar("real", "(d)/(a)", on, 1.3 if has_own is False else 2.35),
        *own,
        Bar("real", "(d)/(a) of the slowest prompt", least, 0.95),
        Bar("real", f"(d)/(b), {part['best_of_theirs']}", part["on_over_best_of_theirs"]["median"], 1.15),
        Bar("real", "(d)/(c)", part["on_over_off"]["median"], 0.98),
        Bar("real", "engine efficiency", efficiency, 0.93),
        Bar("real", "tokens per round", part["arms"]["ours, head on"]["tokens_per_round"], 2.6, True),
    ]


def constructed_bars(size: str, figures: Results) -> list[Bar]:
    """At the acceptance of the bar: the best gamma's speedup, and the gamma that is farthest from theory."""
    points = [point for point in figures["points"] if point["acceptance"] == BARS_ACCEPTANCE]
    if not points:
        return []
    fastest = max(points, key=lambda point: point["speedup"]["median"])
    farthest = max(points, key=lambda point: abs(point["measured_over_theory"]["median"] - 1))
    distance = abs(farthest["measured_over_theory"]["median"] - 1)
    cost = f"draft at {figures['draft_cost']:.1%} of the target"
    is_as_asked = 0.05 <= figures["draft_cost"] <= 0.10
    return [
        Bar(
            "constructed", f"{size} B, gamma {fastest['gamma'] or 'auto'}, {cost}", fastest["speedup"]["median"], 2.06
        ),
        Bar(
            "constructed", f"{size} B, 1 - distance to theory, gamma {farthest['gamma'] or 'auto'}", 1 - distance, 0.93
        ),
        *([] if is_as_asked else [Bar("constructed", f"{size} B, draft at 5-10 %", math.nan, 0.05, True)]),
    ]


def show(results: Results, bars: Sequence[Bar]) -> None:
    console = Console(width=118)
    for part in ("real", "fp32", "sampled", "compiled"):
        if part in results:
            console.print(arms_table(part, results[part]))
    if "raw" in results:
        console.print(raw_table(results["raw"]))
    table = Table("part", "bar", "at least", "measured", "", title="bars")
    for bar in bars:
        missed = "[yellow]goal missed" if bar.is_goal else "[red]FAIL"
        table.add_row(
            bar.part, bar.name, f"{bar.limit:g}", f"{bar.measured:.3f}", "[green]PASS" if bar.passes else missed
        )
    console.print(table)


def raw_table(part: Results) -> Table:
    widths = list(next(iter(part["seconds"].values())))
    table = Table("tokens", *widths, title=f"raw forwards, {part['dtype']}, ms")
    for name, seconds in part["seconds"].items():
        table.add_row(name, *(f"{1000 * seconds[width]:.0f}" for width in widths))
    return table


def arms_table(part: str, results: Results) -> Table:
    table = Table("arm", "tokens/s", "ratio to plain [95 %]", "acceptance", "tokens/round", "same text", title=part)
    is_sampled = results["settings"]["generate"].get("do_sample", False)
    for name, arm in results["arms"].items():
        speed, ratio = arm["tokens_per_second"], arm["ratio"]
        table.add_row(
            name,
            f"{speed['median']:.1f}",
            f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
            "" if math.isnan(arm["acceptance_rate"]) else f"{arm['acceptance_rate']:.0%}",
            f"{arm['tokens_per_round']:.2f}",
            "" if is_sampled else f"{arm['num_identical_to_plain']}/{arm['num_prompts']}",
        )
    return table


def run_parts(options: argparse.Namespace, parts: Sequence[str]) -> Results:
    """Runs the parts, writing the JSON after each of them."""
    log_path = None if options.json is None else options.json.with_suffix(".jsonl")
    log = Log(log_path, parts, options.resume)
    results: Results = {}
    if options.json is not None and options.json.exists():
        results = read_results(options.json)
    targets: dict[str, Target] = {}
    for part in parts:
        if part == "constructed":
            targets.clear()
            results[part] = run_constructed(options, log)
        else:
            dtype = "float32" if part in ("fp32", "parity") else options.dtype
            if dtype not in targets:
                targets[dtype] = Target(options, dtype)
                speed_parts.smoke(targets[dtype])
            results[part] = REAL_PARTS[part](targets[dtype], log)
        results[part]["provenance"] = provenance()
        if options.json is not None:
            write_json(options.json, results)
    as_read: Results = json.loads(json.dumps(results))  # what is shown is what the file's readers get
    return as_read


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder with benign/spec_bench_even.jsonl; without it, a few prompts of our own")
    add("--json", type=Path, help="figures go here, and per-prompt results beside it as .jsonl")
    add("--resume", action="store_true", help="keep the per-prompt results of an interrupted run")
    add("--only", help=f"comma-separated, of {','.join(PARTS)}; default: all, or real,parity without data")
    add("--per-category", type=int, default=5, help="prompts of each category")
    add("--prompts", type=int, default=4, help="how many of our own prompts, without --data")
    add("--tuning-prompts", type=int, default=3, help="other prompts, on which transformers' settings are chosen")
    add("--tokens", type=int, default=128, help="new tokens per answer")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    add("--device", default="cpu")
    add("--temperature", type=float, default=1.0, help="of the part `sampled`")
    add("--draft", default="default", help="default, none, lookup, truncated:N, or a folder")
    add("--no-lookup", action="store_true", help="our draft model alone, without the lookup beside it")
    add("--no-adaptive", action="store_true", help="always as many drafts, whatever they are worth")
    add("--draft-tokens", type=int, help="drafts per round of ours; default: as the engine chooses")
    add("--lookup-tokens", type=int, default=5, help="prompt_lookup_num_tokens of ours, where it looks up")
    add("--their-drafts", default="2:2,20:3", help="LAYERS:TOKENS of truncated drafts for transformers' own decoding")
    add("--recovery-prompts", type=int, default=40, help="at least so many")
    add("--hopeless-prompts", type=int, default=6)
    add("--hopeless-tokens", type=int, default=256)
    add("--hopeless-layers", type=int, default=2)
    add("--batch-prompts", type=int, default=32, help="that batches of each size are made of")
    add("--batch-tokens", type=int, default=64)
    add("--sizes", default="0.1,0.4,1.5", help=f"of constructed targets, of {','.join(constructed.SIZES)}")
    add("--acceptances", default="0.75")
    add("--gammas", default="3,5,8", help="drafts per round on constructed pairs; `auto` leaves it to the engine")
    add("--constructed-tokens", type=int, default=128)
    add("--starts", type=int, default=3, help="answers per constructed pair")
    add("--vocab-size", type=int, default=8192, help="of constructed pairs")
    add("--plots", type=Path, help="also draw the figures into this folder")
    options = parser.parse_args(arguments)
    options.only = options.only or ",".join(["real", "parity"] if options.data is None else PARTS)
    if unknown := [part for part in options.only.split(",") if part not in PARTS]:
        parser.error(f"--only takes {','.join(PARTS)}, not {','.join(unknown)}")
    return options


def main() -> int:
    options = parse()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    parts = options.only.split(",")
    results = run_parts(options, parts)
    # the bars are about Spec-Bench: a short look at other prompts is judged by parity alone
    is_judged = ["parity", "constructed"] if options.data is None else PARTS
    bars = [bar for bar in bars_of(results) if bar.part in parts]
    show(results, bars)
    if options.plots is not None:
        speed_plots.draw(results, options.plots)
    return 0 if all(bar.passes or bar.is_goal or bar.part not in is_judged for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
