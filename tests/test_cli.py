import dataclasses
import json
import runpy
import sys

import pytest
from samples import make_examples, run, write_lines

from safespec_hf import SafetyHead
from safespec_hf.cli import main
from safespec_hf.errors import SafeSpecError

COMMANDS = ["collect", "features", "train", "calibrate", "report", "distill-draft", "push", "show"]


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
    assert capsys.readouterr().err.startswith("safespec: ")


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_told_with_how_to_install_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "safespec_hf.cli")
    with pytest.raises(SystemExit, match=r"pip install safespec-hf\[train\]"):
        runpy.run_module("safespec_hf.cli")
