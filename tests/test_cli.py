import dataclasses
import io
import json
import pathlib
import subprocess
import sys

import pytest
import tiny
from command_lines import NO_POLICIES
from samples import make_examples, run, write_lines
from typer.testing import CliRunner

from safespec_hf import SafetyHead, __version__, cli
from safespec_hf.cli import app, main
from safespec_hf.errors import SafeSpecError
from safespec_hf.heads import hub
from safespec_hf.training.chat_template import PLAIN_TEMPLATE
from safespec_hf.training.features import READINGS

COMMANDS = [
    "make-head",
    "collect",
    "features",
    "train",
    "calibrate",
    "train-prompts",
    "report",
    "distill-draft",
    "make-judge",
    "evaluate",
    "report-evaluation",
    "export",
    "push",
    "show",
    "serve",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    assert "Example" in run(command, "--help")


def test_from_labelled_files_to_a_report(target_folder, tmp_path):
    common = ["--target", target_folder, "--cache", tmp_path / "cache"]
    data = write_lines(tmp_path / "labelled.jsonl", [e.to_json() for e in make_examples(120)])
    prompts = [{"prompt": f"w{10 + i % 25} w{10 + i // 25} think"} for i in range(30)]
    asked = write_lines(tmp_path / "prompts.jsonl", prompts)
    answers, head = tmp_path / "answers.jsonl", tmp_path / "head"
    run("collect", asked, "--label", "safe", "--out", answers, "--max-new-tokens", 6, "--target", target_folder)
    run("train", data, "--out", head, "--layers", "1,2", "--width", 4, *common)
    run("calibrate", head, "--benign", answers, "--alpha", 0.1, "--validation", data, *common)
    run("report", head, data, "--benign", answers, "--out", tmp_path / "report", *common)
    assert 0 < SafetyHead.from_pretrained(head).config.risk_threshold <= 1
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["results"]["sources"]) == {"garden", "prompts"}
    assert report["provenance"]["data"]["labelled.jsonl"]
    assert len(list((tmp_path / "report").glob("*.png"))) == 7
    assert "calibration" in json.loads((head / "training.json").read_text())


def test_too_few_benign_answers_are_refused_before_a_model_is_loaded(tmp_path):
    benign = write_lines(tmp_path / "x.jsonl", [dataclasses.replace(e, label=0).to_json() for e in make_examples(9)])
    with pytest.raises(SafeSpecError, match="at least 49"):
        run("calibrate", tmp_path, "--benign", benign, "--target", "no/such-model")


def test_unsafe_answers_to_calibrate_on_are_refused_before_a_model_is_loaded(tmp_path):
    mixed = write_lines(tmp_path / "x.jsonl", [example.to_json() for example in make_examples(100)])
    with pytest.raises(SafeSpecError, match="50 of 100 are labelled unsafe"):
        run("calibrate", tmp_path, "--benign", mixed, "--target", "no/such-model")


@pytest.mark.parametrize("command", ["train x --out y", "make-head --out y", "train-prompts x y --calibration z"])
def test_seeds_of_all_commands_have_one_bound(command):
    result = CliRunner().invoke(app, [*command.split(), "--seed", str(2**31)])
    assert result.exit_code == 2
    assert "2147483647" in result.output


def test_data_is_checked_before_a_model_is_loaded(tmp_path):
    data = write_lines(tmp_path / "x.jsonl", [{"prompt": "a", "response": "b", "label": 3}])
    with pytest.raises(SafeSpecError, match="line 1, field `label`"):
        run("train", data, "--out", tmp_path, "--target", "no/such-model")


def test_leaking_groups_are_refused_before_a_model_is_loaded(tmp_path):
    data = write_lines(tmp_path / "x.jsonl", [example.to_json() for example in make_examples(24)])
    with pytest.raises(SafeSpecError, match="in both training and validation, the one of '"):
        run("train", data, "--validation", data, "--out", tmp_path, "--target", "no/such-model")


def test_an_error_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["safespec", "features", str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(SystemExit, match="1"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("safespec: ")


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "show_head", stop)
    assert cli.run(["show", "head"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "package", "extra"),
    [
        ("train", "sklearn", "train"),
        ("calibrate", "scipy", "train"),
        ("report", "matplotlib", "train"),
        ("distill-draft", "sklearn", "train"),
        ("make-head", "matplotlib", "train"),
        ("report-evaluation", "matplotlib", "train"),
        ("make-judge", "sklearn", "train"),
        ("serve", "vllm", "vllm"),
    ],
)
def test_a_missing_package_is_told_with_how_to_install_it(verb, package, extra, monkeypatch, capsys, tmp_path):
    arguments = {"calibrate": ["head", "--benign", "x"], "report": ["head", "x", "--out", "r"]}
    arguments["make-judge"] = ["--measured-on", "x", "--out", "r"]
    arguments["serve"] = ["x", "--head", "h", "--max-model-len", "8"]
    for name in [
        name
        for name in sys.modules
        if name.startswith((package, "safespec_hf.training", "safespec_hf.dist", "safespec_hf.evaluation"))
        or name.startswith("safespec_hf.vllm")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.run([verb, *arguments.get(verb, ["x", "--out", str(tmp_path)])]) == 1
    assert f'needs {package}, which is not installed: pip install "safespec-hf[{extra}]"' in capsys.readouterr().err


LIGHT = """
import sys, time
start = time.perf_counter()
from safespec_hf.cli import run
assert run(sys.argv[1:]) == 0
print(f"{time.perf_counter() - start:.2f} s", file=sys.stderr)
heavy = {"torch", "transformers", "sklearn", "huggingface_hub", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    subprocess.run([sys.executable, "-c", LIGHT, *arguments], check=True, timeout=60)


def test_the_version_is_told(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"safespec-hf {__version__}\n"


@pytest.mark.parametrize("reading", ["max-answer", "mean+mean-answer", "mean+ewma-segment", "mean"])
def test_a_reading_that_there_is_not_is_told_with_those_that_there_are(tmp_path, reading):
    how = ["--read-layers", "1", "--reading", reading, "--out", tmp_path, "--target", "no/such-model"]
    with pytest.raises(SafeSpecError, match=", ".join(reading.name for reading in READINGS)):
        run("train", "no such file", *how)


def test_a_head_may_be_told_to_read_several_poolings(target_folder, tmp_path):
    data = write_lines(tmp_path / "labelled.jsonl", [e.to_json() for e in make_examples(60)])
    how = ["--read-layers", "1,2", "--reading", "ewma+last-answer", "--target", target_folder]
    run("train", data, "--out", tmp_path / "head", "--cache", tmp_path / "cache", "--width", 4, *how)
    config = SafetyHead.from_pretrained(tmp_path / "head").config
    assert (config.pooling, config.span, config.hidden_layers) == ("ewma+last", "answer", [1, 2])


@pytest.mark.parametrize("policy", ["{", "[1]", "no/such/file.json", "3"])
def test_a_policy_to_serve_with_is_read_before_anything_is_loaded(policy):
    with pytest.raises(SafeSpecError, match="--policy"):
        run("serve", "no/such-model", "--head", "no/such-head", "--policy", policy)


@pytest.mark.parametrize("policy", NO_POLICIES)
def test_no_policy_that_guards_nothing_or_is_none_waits_for_vllm(policy, monkeypatch):
    """Which may not be installed: then that would be told instead."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SafeSpecError, match="policy"):
        run("serve", "no/such-model", "--head", "no/such-head", "--policy", policy)


def test_the_target_to_serve_comes_before_the_options_of_others(capsys):
    assert cli.run(["serve", "--max-model-len", "8", "--head", "head"]) == 2
    assert "the target comes first" in capsys.readouterr().err


def test_every_extra_that_is_named_is_one():
    project = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in cli.EXTRAS.values())


def test_a_report_is_kept_beside_the_head_and_published_with_it(target_folder, head_folder, tmp_path, capsys):
    data = write_lines(tmp_path / "labelled.jsonl", [e.to_json() for e in make_examples(24)])
    common = ["--target", target_folder, "--cache", tmp_path / "cache"]
    assert "No evaluation" in push_text(head_folder, capsys)
    run("report", head_folder, data, "--out", tmp_path / "report", *common)
    assert (head_folder / "report.json").read_text() == (tmp_path / "report" / "report.json").read_text()
    assert "| garden | 12 | 12 |" in push_text(head_folder, capsys)
    assert "roc.png" in push_text(head_folder, capsys, "--report", str(tmp_path / "report"))


def test_a_base_model_is_asked_in_the_template_that_is_given_and_the_head_says_so(target, tmp_path):
    target.save_pretrained(tmp_path / "base")
    tiny.build_tokenizer().save_pretrained(tmp_path / "base")
    data = write_lines(tmp_path / "labelled.jsonl", [e.to_json() for e in make_examples(120)])
    benign = write_lines(
        tmp_path / "x.jsonl", [dataclasses.replace(e, label=0).to_json() for e in make_examples(20, 1)]
    )
    common, head = ["--target", tmp_path / "base", "--cache", tmp_path / "cache"], tmp_path / "head"
    train = ["train", data, "--out", head, "--read-layers", "1", "--width", 0, *common]
    with pytest.raises(SafeSpecError, match="--chat-template plain"):
        run(*train)
    run(*train, "--chat-template", "plain")
    run("calibrate", head, "--benign", benign, "--alpha", 0.1, "--chat-template", "plain", *common)
    record = json.loads((head / "training.json").read_text())
    assert record["chat_template"] == record["calibration"]["chat_template"] == PLAIN_TEMPLATE
    assert f"tokenizer.chat_template = {PLAIN_TEMPLATE!r}\n" in (head / "README.md").read_text()


def push_text(head, capsys, *arguments):
    assert cli.run(["push", str(head), "owner/name", "--license", "mit", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def head_folder(target, chat_tokenizer, tmp_path):
    tiny.build_head(target, 0.5, tokenizer=chat_tokenizer).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_a_licence_is_asked_for(head_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert cli.run(["push", str(head_folder), "owner/name"]) == 1
    assert "--license" in capsys.readouterr().err


def test_a_target_with_random_weights_is_refused(target_folder, tmp_path):
    config = json.loads((target_folder / "config.json").read_text())
    (target_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    data = write_lines(tmp_path / "labelled.jsonl", [e.to_json() for e in make_examples(24)])
    with pytest.raises(SafeSpecError, match="would be random"):
        run("features", data, "--target", target_folder, "--cache", tmp_path)
