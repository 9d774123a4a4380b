import dataclasses
import json
import os
import re
import subprocess
import sys

import datasets
import pytest
import torch
from samples import make_examples, run, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from safespec_hf import SafeSpecError, SafetyHead, attach_safety_head
from safespec_hf.cli import run as run_command
from safespec_hf.training import files, make_head, plots, prompt_probe, steps
from safespec_hf.training.chat_template import PLAIN_TEMPLATE
from safespec_hf.training.make_head import STEPS, MakeSettings, install_head
from safespec_hf.training.record import read_record

HOW = ["--alpha", "0.1", "--layers", "1,2", "--max-new-tokens", "6"]


@pytest.fixture
def ask(target_folder, tmp_path):
    """The command line of a head for the tiny target."""
    labelled = write_lines(
        tmp_path / "labelled.jsonl", [example.to_json() for example in make_examples(120, num_groups=100)]
    )
    prompts = [{"prompt": f"w{10 + index % 20} w{10 + index // 20} no"} for index in range(60)]
    asked = write_lines(tmp_path / "prompts.jsonl", prompts)
    return ["make-head", target_folder, "--prompts", asked, "--labelled", labelled, "--out", tmp_path / "head", *HOW]


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(plots, "draw_all", lambda *_: [])


def taken(output):
    """The steps that were taken, not found."""
    lines = re.findall(r"Step \d of 6: (\w+), (.*)", output)
    assert [name for name, _ in lines] == list(STEPS)
    return [name for name, what in lines if not what.endswith("done before")]


def weights(folder):
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


def assert_alike(folder, other):
    """The same head, up to roundings: what another run read of an answer may have been read in another batch."""
    states = torch.randn(64, SafetyHead.from_pretrained(folder).config.num_features)
    risks, expected = (SafetyHead.from_pretrained(place).risk(states) for place in (folder, other))
    torch.testing.assert_close(risks, expected, rtol=1e-2, atol=1e-3)
    configs = [SafetyHead.from_pretrained(place).config for place in (folder, other)]
    assert configs[0].risk_threshold == pytest.approx(configs[1].risk_threshold, abs=1e-3)
    assert configs[0].hidden_layers == configs[1].hidden_layers
    assert configs[0].pooling == configs[1].pooling


def test_one_command_makes_a_head_that_the_two_lines_it_prints_attach(ask, target_folder, tmp_path):
    output = run(*ask)
    assert taken(output) == list(STEPS)
    names = {path.name for path in (tmp_path / "head").iterdir()}
    texts = {"README.md", "training.json", "report.json"}
    assert names == {"config.json", "model.safetensors", "report", "work", *texts}
    assert len(list((tmp_path / "head" / "report").glob("*.png"))) == 7
    for said in (
        "Validation AUROC 0.",
        "against safe answers that do not refuse 0.",
        "calibrated on 18",
        "It scores prompts as well",
        "strict",
    ):
        assert (said in output) == (said != "strict")  # which would take 19 answers
    config = SafetyHead.from_pretrained(tmp_path / "head").config
    assert 0 < config.prompt_threshold < 1
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    names = {"attach_safety_head": attach_safety_head, "model": target}
    names |= {"tokenizer": AutoTokenizer.from_pretrained(target_folder), "inputs": {"input_ids": torch.tensor([[10]])}}
    for line in output.split("Use it:\n")[1].splitlines():
        exec(line.strip().replace("max_new_tokens=64", "max_new_tokens=4"), names)
    assert names["output"].shape == (1, 5)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("change", "again"),
    [
        ([], []),
        (["--alpha", "0.2"], ["calibrate", "prompts", "report"]),
        (["--layers", "2"], STEPS[1:]),
        (["--max-new-tokens", "5"], STEPS),
        (["--seed", "1"], STEPS),
        (["--dtype", "bfloat16"], STEPS),
    ],
    ids=str,
)
def test_only_what_a_change_touches_is_done_again_and_gives_what_a_fresh_run_gives(ask, tmp_path, change, again):
    run(*ask)
    assert taken(run(*ask, *change)) == list(again)
    run(*ask, *change, "--out", tmp_path / "fresh")
    assert_alike(tmp_path / "head", tmp_path / "fresh")
    assert taken(run(*ask)) == []
    run(*ask, "--out", tmp_path / "as first")
    assert weights(tmp_path / "head") == weights(tmp_path / "as first")


@pytest.mark.usefixtures("without_pictures")
def test_with_few_prompts_a_head_scores_answers_alone_and_says_so(ask, tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"w{10 + index} no"} for index in range(40)])
    output = run(*ask)
    assert "not scored: 32 of each kind needed" in output
    assert "It scores answers alone" in output
    assert SafetyHead.from_pretrained(tmp_path / "head").config.prompt_threshold is None


@pytest.mark.usefixtures("without_pictures")
def test_harmless_prompts_of_risk_one_cost_the_probe_and_not_the_head(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_probe, "fit_probe", lambda states_NF, _: (torch.zeros(states_NF.shape[1]), 99.0))
    output = run(*ask)
    assert "Prompts are not scored: " in output
    assert SafetyHead.from_pretrained(tmp_path / "head").config.prompt_threshold is None


@pytest.mark.usefixtures("without_pictures")
def test_other_labelled_answers_need_no_other_answers_of_the_target(ask, tmp_path):
    run(*ask)
    shared = [dataclasses.replace(e, group="w10 w10 no") if e.group == "g3" else e for e in make_examples(110)]
    write_lines(tmp_path / "labelled.jsonl", [example.to_json() for example in shared])
    assert taken(run(*ask)) == list(STEPS[1:])


@pytest.mark.usefixtures("without_pictures")
def test_a_base_model_answers_anew_in_another_format_and_the_head_says_which(ask, target_folder, tmp_path):
    (target_folder / "chat_template.jinja").unlink()
    own = tmp_path / "own.jinja"
    own.write_text("{% for message in messages %}{{ message.content }} {% endfor %}think")
    run(*ask, "--chat-template", "plain")
    assert read_record(tmp_path / "head")["chat_template"] == PLAIN_TEMPLATE
    assert taken(run(*ask, "--chat-template", own)) == list(STEPS)
    record = read_record(tmp_path / "head")
    assert record["chat_template"] == record["calibration"]["chat_template"] == own.read_text()


@pytest.mark.usefixtures("without_pictures")
def test_another_target_in_the_same_folder_has_nothing_of_the_first(ask, target_folder, tmp_path):
    run(*ask)
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    with torch.no_grad():
        target.lm_head.weight.mul_(-1)
    target.save_pretrained(target_folder)
    assert taken(run(*ask)) == list(STEPS)
    found = weights(tmp_path / "head")
    run(*ask, "--out", tmp_path / "fresh")
    assert found == weights(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("--prompts", "Give harmless prompts.*--from-hub or-bench"),
        ("--labelled", "Give labelled answers, some of them"),
    ],
)
def test_what_is_missing_is_told_before_a_model_is_loaded(ask, drop, said):
    place = ask.index(drop)
    with pytest.raises(SafeSpecError, match=said):
        run("make-head", "no/such-model", *ask[2:place], *ask[place + 2 :])


def test_too_few_prompts_are_told_before_a_model_is_loaded(ask):
    with pytest.raises(SafeSpecError, match="at least 164 harmless prompts"):
        run("make-head", "no/such-model", *ask[2:], "--alpha", "0.02")


def test_a_second_run_in_the_same_folder_is_refused(ask, tmp_path):
    with steps.only_one(tmp_path / "head" / "work"), pytest.raises(SafeSpecError, match="Another run is at work"):
        run(*ask)


def test_a_target_that_says_nothing_is_told(ask, target_folder):
    config = GenerationConfig(eos_token_id=list(range(40)), pad_token_id=0)
    config.save_pretrained(target_folder)
    with pytest.raises(SafeSpecError, match=r"alpha=0\.1 needs 9 benign answers.*0 of 60"):
        run(*ask)


def test_nearly_no_safe_answers_of_others_are_warned_of(ask, tmp_path, capsys, monkeypatch):
    rows = [e.to_json() for e in make_examples(120) if e.label == 1 or e.group == "g0"]
    write_lines(tmp_path / "labelled.jsonl", rows)
    monkeypatch.setattr(make_head, "make_head", interrupt)
    assert run_command(list(map(str, ask))) == 130
    errors = capsys.readouterr().err
    assert "only " in errors
    assert "who wrote an answer" in errors
    assert "the same command goes on" in errors


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("without_pictures")
def test_public_sets_need_no_files_and_their_licences_are_told_and_recorded(ask, tmp_path, monkeypatch):
    rows = {
        "PKU-Alignment/BeaverTails": [
            {
                "prompt": e.messages[0]["content"],
                "response": e.response,
                "is_safe": e.label == 0,
                "category": {"a": True},
            }
            for e in make_examples(120)
        ],
        "bench-llm/or-bench": [{"prompt": f"w{10 + i} no", "category": "c"} for i in range(29)],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: datasets.Dataset.from_list(rows[name]))
    monkeypatch.setattr(files, "is_hub_reachable", lambda: True)
    hub = ["--from-hub", "beavertails", "--from-hub", "or-bench", "--hub-rows", "100", "--alpha", "0.11"]
    output = run(*ask[:2], *ask[6:], *hub)
    assert "PKU-Alignment/BeaverTails:30k_train, licence cc-by-nc-4.0, up to 100 labelled answers" in output
    assert "Warning: the licence of beavertails is for non-commercial use" in output
    assert "or-bench: bench-llm/or-bench:or-bench-80k:train, licence cc-by-4.0, up to 100 prompts" in output
    card = (tmp_path / "head" / "README.md").read_text()
    assert "| PKU-Alignment/BeaverTails | cc-by-nc-4.0 | training: labelled |" in card
    assert len((tmp_path / "head" / "work" / "hub" / "beavertails-100.jsonl").read_text().splitlines()) == 100
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert taken(run(*ask[:2], *ask[6:], *hub)) == []


@pytest.mark.usefixtures("without_pictures")
def test_what_make_head_leaves_is_published_without_its_work(ask, tmp_path):
    run(*ask)
    output = run("push", tmp_path / "head", "owner/name", "--license", "mit", "--dry-run")
    assert "work" not in output.split("README.md:\n")[0]


def test_a_kill_while_a_head_is_put_in_place_leaves_none(tmp_path, monkeypatch):
    for name, what in [("old", "a"), ("new", "b")]:
        (tmp_path / name / "report").mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "report.json", "step.json", f"report/{what}.png"):
            (tmp_path / name / file).write_text(what)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            install_head(tmp_path / "new", tmp_path / "old")
    assert not (tmp_path / "old" / "model.safetensors").exists()
    install_head(tmp_path / "new", tmp_path / "old")
    assert {path.read_text() for path in (tmp_path / "old").rglob("*") if path.is_file()} == {"a", "b"}
    assert (tmp_path / "old" / "model.safetensors").read_text() == "b"
    assert [path.name for path in (tmp_path / "old" / "report").iterdir()] == ["b.png"]


def test_a_head_that_is_in_place_is_left_alone(tmp_path):
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors", "README.md"):
            (tmp_path / name / file).write_text(name if file == "README.md" else "same")
    install_head(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "out"


@pytest.mark.parametrize("fields", [{"alpha": 1.0}, {"seed": -1}, {"max_new_tokens": 0}, {"batch_size": 0}], ids=str)
def test_a_setting_out_of_range_is_named(fields):
    with pytest.raises(SafeSpecError, match=f"`{next(iter(fields))}` must"):
        MakeSettings(**fields)


# A child of this process makes the head and is killed: at a moment by the clock, or when it touches a file for the
# n-th time. Children are forked, so that the imports are done once; nothing has started a thread by then.
KILLS = """
import json, os, random, signal, sys, time
import sklearn.metrics, torch
torch.set_num_threads(1)
from safespec_hf.cli import run
from safespec_hf.training import make_head, plots
plots.draw_all = lambda *_: []
root, *command = sys.argv[1:]

def attempt(out, num_touches=None, seconds=None):
    child = os.fork()
    if child == 0:
        touched = 0
        def watch(event, arguments):
            nonlocal touched
            if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(arguments[0]).startswith(root + "/"):
                touched += 1
                if touched == num_touches:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        status = run([*command, "--out", out])
        with open(root + ".touched", "w") as file:
            file.write(str(touched))
        os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

start = time.monotonic()
assert attempt(root + "/whole") == 0
seconds, draw = time.monotonic() - start, random.Random(0)
with open(root + ".touched") as file:
    num_touches = int(file.read())
for trial in range(6):
    out = f"{root}/killed{trial}"
    for _ in range(2):
        by_clock, by_touch = {"seconds": draw.uniform(0, seconds)}, {"num_touches": draw.randrange(num_touches)}
        status = attempt(out, **(by_clock if trial % 2 else by_touch))
        print("killed" if status == -signal.SIGKILL else "done")
    assert attempt(out) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_at_any_moment_and_started_again_it_gives_the_same_head(ask, tmp_path):
    root = tmp_path / "heads"
    root.mkdir()
    place = ask.index("--out")
    command = [sys.executable, "-c", KILLS, root, *ask[:place], *ask[place + 2 :]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines().count("killed") >= 6
    whole = weights(root / "whole")
    assert [weights(root / f"killed{trial}") == whole for trial in range(6)] == [True] * 6
    assert SafetyHead.from_pretrained(root / "killed0").config.risk_threshold < 1
    record = json.loads((root / "killed0" / "training.json").read_text())
    assert record["calibration"]["num_answers"] == 18
