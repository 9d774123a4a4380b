"""The commands as they are run: in processes of their own, several of them, and killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny
from evaluated import KINDS, POLICY, write_sets
from samples import run

from safespec_hf import SafeSpecError

METHODS = ["target", f"safespec:{POLICY}", "self_reminder"]
TIMES = ("seconds", "guard_seconds", "statistics", "processes")
TIMED = ("speed", "time", "second")


@pytest.fixture
def arguments(tmp_path, target_folder, target, chat_tokenizer):
    """All but where the answers go."""
    tiny.build_noisy_head(target).save_pretrained(tmp_path / "head")
    files = write_sets(tmp_path)
    sets = [part for name, path in files.items() for part in (f"--{KINDS[name]}", path)]
    methods = [part for spec in METHODS for part in ("--method", spec)]
    common = ["--target", target_folder, "--head", tmp_path / "head", "--max-new-tokens", 8, "--batch-size", 2]
    return [str(part) for part in (*sets, *methods, *common)]


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def report_of(answers, folder):
    """What a report says, but for the times and where it comes from."""
    run("report-evaluation", answers, "--out", folder)

    def without_times(value):
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if not any(word in k for word in TIMED)}
        return [without_times(item) for item in value] if isinstance(value, list) else value

    return without_times(json.loads((folder / "report.json").read_text())["results"])


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output


def test_a_killed_evaluation_goes_on_and_gives_the_same_report(arguments, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run("evaluate", *arguments, "--out", whole)
    process = start(sys.executable, "-m", "safespec_hf.cli", "evaluate", *arguments, "--out", str(killed))
    num_lines = random.Random(0).randint(5, 25)
    while process.poll() is None and len(killed.read_bytes().splitlines() if killed.exists() else ()) < num_lines:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = len(killed.read_bytes().splitlines())
    assert left < len(rows_of(whole))
    run("evaluate", *arguments, "--out", killed)
    assert rows_of(killed) == rows_of(whole)
    assert report_of(killed, tmp_path / "b") == report_of(whole, tmp_path / "a")


def test_two_processes_give_the_rows_of_one(arguments, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run("evaluate", *arguments, "--out", one)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finish(start(*launch, "-m", "safespec_hf.cli", "evaluate", *arguments, "--out", str(two)))
    assert rows_of(two) == rows_of(one)
    assert list(tmp_path.glob("*.part-*")) == []


def test_attacks_are_asked_with_suffixes_that_were_searched_for(target, target_folder, tmp_path):
    tiny.build_noisy_head(target).save_pretrained(tmp_path / "head")
    asked = [
        "--attacks",
        write_sets(tmp_path)["attack"],
        "--limit",
        1,
        "--attacker",
        "suffix",
        "--suffix-forwards",
        98,
    ]
    common = ["--target", target_folder, "--head", tmp_path / "head", "--max-new-tokens", 4, "--method", "target"]
    run("evaluate", *asked, *common, "--out", tmp_path / "answers.jsonl")
    rows = rows_of(tmp_path / "answers.jsonl")
    assert [row["set"] for row in rows] == ["attack", "attack@suffix"]
    assert rows[0]["request"] == rows[1]["request"]
    found = json.loads((tmp_path / "answers.jsonl.suffixes.jsonl").read_text())
    assert found["num_forwards"] <= 98


@pytest.mark.parametrize("draft", [[], ["--draft", "lookup"], ["--draft", "none"]])
def test_a_head_of_the_draft_needs_a_draft_that_writes(target, target_folder, tmp_path, draft):
    tiny.build_head(target).save_pretrained(tmp_path / "head")
    common = ["--target", target_folder, "--head", tmp_path / "head", "--draft-head", tmp_path / "head", *draft]
    with pytest.raises(SafeSpecError, match="needs a language model that drafts"):
        run("evaluate", "--attacks", write_sets(tmp_path)["attack"], *common, "--out", tmp_path / "answers.jsonl")


def test_what_a_head_of_the_draft_sorts_out_is_counted(target, draft, target_folder, tmp_path):
    tiny.build_noisy_head(target, span="segment").save_pretrained(tmp_path / "head")
    draft.save_pretrained(tmp_path / "draft")
    tiny.build_noisy_head(draft).save_pretrained(tmp_path / "draft head")
    common = ["--target", target_folder, "--head", tmp_path / "head", "--max-new-tokens", 12, "--method", METHODS[1]]
    drafts = ["--draft", tmp_path / "draft", "--draft-head", tmp_path / "draft head"]
    run("evaluate", "--attacks", write_sets(tmp_path)["attack"], *common, *drafts, "--out", tmp_path / "a.jsonl")
    counts = [json.loads(line)["statistics"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sum(one["num_screened_candidates"] for one in counts if one) > 0
    with pytest.raises(SafeSpecError, match="begun with other settings"):
        run("evaluate", "--attacks", tmp_path / "attack.jsonl", *common, *drafts[:2], "--out", tmp_path / "a.jsonl")


def test_another_head_leaves_undefended_answers_as_they_were(target, target_folder, tmp_path):
    sets, out = ["--attacks", write_sets(tmp_path)["attack"]], ["--out", tmp_path / "answers.jsonl"]
    common = ["--target", target_folder, "--max-new-tokens", 4, "--limit", 2]
    undefended = ["--method", "target", "--method", "assisted"]
    for name, build in (("first", tiny.build_noisy_head), ("second", tiny.build_head)):
        build(target).save_pretrained(tmp_path / name)
    run("evaluate", *sets, *common, "--head", tmp_path / "first", *undefended, *out)
    before = (tmp_path / "answers.jsonl").read_bytes()
    of_second = [*sets, *common, "--head", tmp_path / "second", *out]
    run("evaluate", *of_second, *undefended, "--method", METHODS[1])
    now = (tmp_path / "answers.jsonl").read_bytes()
    assert now.startswith(before)
    assert len(now) > len(before)
    with pytest.raises(SafeSpecError, match=r"in methods, 'safespec[^']*' was \{'head': \{"):
        run("evaluate", *sets, *common, "--head", tmp_path / "first", "--method", METHODS[1], *out)
