"""Runs transformers' own generation tests guarded, and counts what becomes of their calls.

    .venv/bin/python benchmarks/peer.py                          # a dozen models, about ten minutes on two cores
    .venv/bin/python benchmarks/peer.py llama gpt2 generation    # some; `generation` is tests/generation/test_utils.py
    .venv/bin/python benchmarks/peer.py --tests ~/transformers   # the tests of a checkout, at the installed version
    .venv/bin/python benchmarks/peer.py --again                  # what was run before with the same code, too

Every call of `generate` that reaches a decoder-only model runs plain and then guarded, by a head that flags nothing,
with prompt lookup where the call says nothing about drafts (`tests/peer/guarding.py`). A call is

- *guarded* if it ran as it is written and said the same; what is sampled is not compared;
- *refused* if it got a clear error before the first forward, by reason;
- *differed* if greedy tokens, scores, logits, hidden states or attentions are others; or *crashed*.

The tests are those of the installed version: of a checkout, of the source distribution on PyPI, or, since that holds
only a part of them, of the tag on GitHub. They are kept in `~/.cache/safespec-hf/peer`, never here. Without them and
without a network nothing is run, and nothing is written. An interrupted run goes on where it was, with the same code.

Tests run without the Hub. Nearly all of `generation` load their models from there, so they fail before any call; what
it shares with all models' tests runs in theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from provenance import digest_of, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peer.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safespec-hf" / "peer"
GENERATION = "generation"
MODELS = (
    *("llama", "gpt2", "gpt_neox", "gpt_neo", "opt", "gemma", "gemma2", "gemma3", "qwen2", "qwen3", "mistral"),
    *("mixtral", "phi3", "bloom", "codegen", "deepseek_v3", "qwen3_next", "bamba", "mamba2", "falcon_h1"),
)
ARCHIVE = "https://github.com/huggingface/transformers/archive/refs/tags/v{}.tar.gz"
HELPERS = {"parameterized": "parameterized", "timeout_decorator": "timeout-decorator"}
"""What the tests import beside what we do: modules, and the packages that they are in."""
MIN_GUARDED = 0.70
SECONDS = 1200
OUTCOMES = ("guarded", "refused", "differed", "crashed")
REASONS = {
    r"generation mode='beam|generation mode='group": "beam search",
    r"generation mode='(\w+)'": "another search mode",
    r"Right padding": "right padding, with recurrent layers or sliding windows",
    r"Padding inside of a prompt": "padding inside of a prompt, with recurrent layers or sliding windows",
    r"inputs_embeds": "inputs_embeds",
    r"can't be guarded|state can't be rolled back": "the model can't be guarded",
    r"cache_implementation='(\w+)'": "an offloaded or quantized cache",
    r"`(past_key_values|cache)`|static cache": "a cache of another kind, or with recurrent states",
    r"attention_mask` must have the shape": "a mask of another length than the prompt",
    r"(assistant_early_exit|use_mtp|speculation_type|assistant_ensemble_weight|prefill_chunk_size|token_healing)": "",
    r"takes token ids only, but got (\[[^]]*\])": "",
    r"custom_generate": "custom_generate",
    r"ClassifierFreeGuidance|SynthID": "a processor that keeps state",
    r"assistant|draft": "a draft with another vocabulary or tokenizer",
}


def has_tests(folder: Path) -> bool:
    return (folder / "tests" / "generation" / "test_utils.py").is_file()


def version_of(folder: Path) -> str | None:
    """That of a checkout, if it says so."""
    package = folder / "src" / "transformers" / "__init__.py"
    text = package.read_text(encoding="utf-8") if package.is_file() else ""
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return None if found is None else found.group(1)


def find_tests(given: Path | None) -> Path | None:
    """The folder whose `tests` are transformers' own; `None` where they can't be had."""
    version = transformers.__version__
    known = [given] if given else [Path(transformers.__file__).parents[2], CACHE / f"transformers-{version}"]
    for folder in known:
        if has_tests(folder):
            if (theirs := version_of(folder)) not in (None, version):
                print(f"These tests are of transformers {theirs}, and {version} is installed: some may not load.")
            return folder
    if given:
        raise SystemExit(f"{given} has no tests/generation/test_utils.py. Name a checkout of transformers {version}.")
    for fetch in (_from_pypi, _from_github):
        print(f"looking for the tests of transformers {version}: {fetch.__name__.strip('_').replace('_', ' ')} ...")
        if fetch(version) and has_tests(known[-1]):
            return known[-1]
    return None


def _from_pypi(version: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", folder, f"transformers=={version}"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        return any(map(_unpack, Path(folder).glob("*.tar.gz")))


def _from_github(version: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "tag.tar.gz"
        try:
            with urllib.request.urlopen(ARCHIVE.format(version), timeout=60) as answer:
                archive.write_bytes(answer.read())
        except (urllib.error.URLError, TimeoutError) as error:
            print(f"  not there: {error}")
            return False
        return _unpack(archive)


def _unpack(archive: Path) -> bool:
    CACHE.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
        opened.extractall(CACHE, filter="data")
    return True


def find_helpers() -> list[str]:
    """Where the packages are that the tests import and ours don't."""
    needed = {module: package for module, package in HELPERS.items() if importlib.util.find_spec(module) is None}
    target = CACHE / "packages"
    if missing := [package for module, package in needed.items() if not (target / module).is_dir()]:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*command, *missing], check=True)
    return [str(target)] if needed else []


def test_file(name: str) -> str:
    return "tests/generation/test_utils.py" if name == GENERATION else f"tests/models/{name}/test_modeling_{name}.py"


def run(folder: Path, name: str, out: Path) -> str:
    """Runs the generation tests of one file; returns what pytest said last."""
    paths = [str(ROOT / "src"), str(ROOT / "tests" / "peer"), *find_helpers(), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PEER_CALLS": str(out),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "guarding", "-W", "ignore", "--log-disable", "transformers", test_file(name)]
    command += [] if name == GENERATION else ["-m", "generate"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS} s"
    return (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1].strip("= ")


def reason(why: str) -> str:
    for pattern, label in REASONS.items():
        if found := re.search(pattern, why):
            return label or found.group(1)
    return why[:80]


def summarize(parts: dict[str, Any]) -> dict[str, Any]:
    calls = [call for part in parts.values() for call in part["calls"]]
    counts = Counter(call["outcome"] for call in calls)
    refused = Counter(reason(call["why"]) for call in calls if call["outcome"] == "refused")
    return {
        "calls": len(calls),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "guarded_share": counts["guarded"] / len(calls) if calls else 0.0,
        "refused_by_reason": dict(refused.most_common()),
        "faults": sorted({f"{c['test']}: {c['why']}" for c in calls if c["outcome"] in ("differed", "crashed")}),
    }


def show(parts: dict[str, Any], summary: dict[str, Any]) -> None:
    print(f"\n{'tests':16}{'calls':>7}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES) + "   pytest")
    for name, part in parts.items():
        counts = Counter(call["outcome"] for call in part["calls"])
        cells = "".join(f"{counts[outcome]:>10}" for outcome in OUTCOMES)
        print(f"{name:16}{len(part['calls']):>7}{cells}   {part['pytest']}")
    cells = "".join(f"{summary[outcome]:>10}" for outcome in OUTCOMES)
    print(f"{'all':16}{summary['calls']:>7}{cells}   {summary['guarded_share']:.1%} guarded as written\n\nrefused for")
    for why, num in summary["refused_by_reason"].items():
        print(f"{num:>7}  {why}")
    for fault in summary["faults"]:
        print(f"FAULT {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs transformers' own generation tests guarded.")
    parser.add_argument("names", nargs="*", default=[*MODELS, GENERATION], help="models, or `generation`")
    parser.add_argument("--tests", type=Path, help="a checkout of transformers; default: found or downloaded")
    parser.add_argument("--again", action="store_true", help="run what has results of this version and code, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default: {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    folder = find_tests(options.tests)
    if folder is None:
        print("transformers' own tests can't be had here: nothing was run. Name a checkout with --tests.")
        return 0
    before = CACHE / f"parts-{transformers.__version__}"
    before.mkdir(parents=True, exist_ok=True)
    parts, code = dict[str, Any](), digest_of(ROOT / "src", ROOT / "tests" / "peer", ROOT / "tests" / "tiny.py")
    for number, name in enumerate(options.names, 1):
        part, calls = before / f"{name}.json", before / f"{name}.jsonl"
        if options.again or not part.is_file() or json.loads(part.read_text(encoding="utf-8")).get("code") != code:
            print(f"[{number}/{len(options.names)}] {name} ...", flush=True)
            calls.unlink(missing_ok=True)
            said = run(folder, name, calls)
            lines = calls.read_text(encoding="utf-8").splitlines() if calls.is_file() else []
            part.write_text(json.dumps({"code": code, "pytest": said, "calls": [json.loads(line) for line in lines]}))
        parts[name] = json.loads(part.read_text(encoding="utf-8"))
    summary = summarize(parts)
    show(parts, summary)
    said = {name: part["pytest"] for name, part in parts.items()}
    write_json(options.out, {**summary, "pytest": said})
    not_loaded = [name for name, last_line in said.items() if re.search(r"\berrors?\b", last_line)]
    if not_loaded:
        print(f"NOT LOADED: {', '.join(not_loaded)}. Their tests say why.")
    has_failed = summary["guarded_share"] < MIN_GUARDED or summary["differed"] or summary["crashed"] or not_loaded
    return int(bool(has_failed))


if __name__ == "__main__":
    raise SystemExit(main())
