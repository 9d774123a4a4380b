"""Runs an exported model in code that does not know us, and compares with what the target says alone.

    pip install -e ".[surfaces]"
    .venv/bin/python benchmarks/compatibility_surfaces.py             # all, some minutes
    .venv/bin/python benchmarks/compatibility_surfaces.py serve       # those with that in their names
    .venv/bin/python benchmarks/compatibility_surfaces.py --missing   # those without results
    .venv/bin/python benchmarks/compatibility_surfaces.py --write     # none: only the table in docs/compatibility.md

The default target is exported twice, and asked two prompts in every way of `tests/surfaces.py`, greedily in float32:

- *as alone*: with its own head, which stays silent, answers are those of the target alone, without our code;
- *guarded*: with a threshold that every token reaches, each answer is the policy's refusal, and no other token was
  returned or streamed.

What can't be guarded has to be refused. A cell that is neither right nor refused makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pages import update_page
from provenance import write_json
from transformers.utils import logging

from safespec_hf import export_guarded, load_default

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import surfaces
from served import stop_servers
from surfaces import REFUSED, SURFACES, Surface

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compatibility_surfaces.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- surfaces: begin -->\n", "<!-- surfaces: end -->"
CELLS = ("as alone", "guarded")
REFUSAL = "The garden is closed today."
Outcome = dict[str, Any]
UNKNOWN: Outcome = {"cells": {}, "why": "not run yet"}


def check(surface: Surface, silent: Path, closed: Path, alone: Callable[[bool], list[str]]) -> Outcome:
    """The cells of one surface, or why it was not run."""
    if absent := missing(surface):
        return {"cells": {}, "why": f"not run: {absent} is not installed"}
    wanted = {"as alone": alone(surface.is_chat), "guarded": [REFUSAL] * len(surfaces.PROMPTS)}
    cells, notes = {}, []
    for cell, folder in zip(CELLS, (silent, closed), strict=True):
        try:
            found = surface.run(folder)
        except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
        cells[cell] = found == wanted[cell]
        notes += [] if cells[cell] else [f"{cell}: {found}"]
    return {"cells": cells, "why": "; ".join(notes)}


def check_refused(surface: Surface, folder: Path) -> Outcome:
    """Whether a surface is refused, with what is said."""
    if absent := missing(surface):
        return {"cells": {}, "why": f"not run: {absent} is not installed"}
    try:
        why = surfaces.refused(lambda: surface.run(folder))
        return {"cells": {"refused": True}, "why": why.replace(str(folder), "owner/guarded")}
    except (AssertionError, LookupError, RuntimeError, TypeError) as error:
        return {"cells": {"refused": False}, "why": f"{type(error).__name__}: {error}"}


def missing(surface: Surface) -> str:
    return ", ".join(name for name in surface.needs if importlib.util.find_spec(name) is None)


def run(names: list[str], results: dict[str, Outcome]) -> None:
    """Runs these surfaces, and keeps what came out as it comes."""
    answers: dict[bool, list[str]] = {}

    def alone(is_chat: bool) -> list[str]:
        if is_chat not in answers:
            answers[is_chat] = surfaces.expected(silent, is_chat)
        return answers[is_chat]

    def keep(name: str, found: Outcome) -> None:
        results[name] = found
        order = [*SURFACES, *REFUSED]
        write_json(RESULTS, {name: results[name] for name in order if name in results})
        print(f"{name:60} {found['cells']} {' '.join(found['why'].split())[:200]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model, _, draft = load_default()
        silent = export_guarded(model, Path(folder) / "guarded", draft=draft)
        closed = surfaces.close_the_garden(silent, Path(folder) / "closed", REFUSAL)
        del model, draft
        for name in names:
            if name in SURFACES:
                keep(name, check(SURFACES[name], silent, closed, alone))
            else:
                keep(name, check_refused(REFUSED[name], silent))


def table(results: dict[str, Outcome]) -> str:
    """The part of the page that says what came out."""
    lines = [f"| surface | {' | '.join(CELLS)} |", f"|---|{'---|' * len(CELLS)}"]
    for name in SURFACES:
        found = results.get(name, UNKNOWN)
        marks = [{True: "yes", False: "**no**"}.get(found["cells"].get(cell), found["why"]) for cell in CELLS]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    lines += ["", "| refused | why |", "|---|---|"]
    for name in REFUSED:
        found = results.get(name, UNKNOWN)
        words = " ".join(found["why"].split()).replace("|", "/")
        why = words[:160] + ("..." if len(words) > 160 else "")
        lines.append(f"| {name} | {why if found['cells'].get('refused', True) else '**not refused**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="An exported model in code that does not know us.")
    parser.add_argument("words", nargs="*", help="surfaces with one of these in their names; default: all")
    parser.add_argument("--missing", action="store_true", help="only those without a result")
    parser.add_argument("--write", action="store_true", help="run none, only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    results: dict[str, Outcome] = {}
    if options.words or options.missing or options.write:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if RESULTS.exists() else {}
    names = [
        name for name in (*SURFACES, *REFUSED) if not options.words or any(word in name for word in options.words)
    ]
    if options.missing:
        names = [name for name in names if not results.get(name, {}).get("cells")]
    if not options.write:
        try:
            run(names, results)
        finally:
            stop_servers()
    update_page(PAGE, BEGIN, table(results), END)
    return int(any(not all(found["cells"].values()) for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
