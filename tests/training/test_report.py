import dataclasses
import json
import math
import os
import sys

import pytest
import torch
from samples import make_examples

from safespec_hf import SafeSpecError
from safespec_hf.heads.card import measured_sources, to_table
from safespec_hf.training.metrics import ScoredAnswers
from safespec_hf.training.report import layers_table, provenance, write_report


@pytest.fixture
def scored():
    """One source of both classes, and one that is safe only."""
    examples = [*make_examples(20), *(e for e in make_examples(6, source="chat") if e.label == 0)]
    return ScoredAnswers(examples, [torch.rand(3 + index % 5) for index in range(len(examples))])


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def test_a_report_is_json_for_every_reader_with_null_for_what_has_no_figure(scored, tmp_path):
    write_report(scored, 0.5, tmp_path)
    results = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)["results"]
    assert results["sources"]["chat"]["recall"] is None
    assert results["mean_risk_along"]["safe"][-1] is None


@pytest.mark.parametrize("num", [1, 2, 12])
@pytest.mark.parametrize(
    ("label", "said"),
    [
        (0, ["AUROC: not", "ROC: not", "Precision and recall: not", "Reliability: not", "Recall: not"]),
        (1, ["AUROC: not", "ROC: not", "Reliability: not", "False alarms and trade-off: not"]),
    ],
)
def test_answers_of_one_class_say_what_they_cannot_tell(tmp_path, num, label, said):
    chosen = [example for example in make_examples(2 * num) if example.label == label]
    write_report(ScoredAnswers(chosen, [torch.rand(9) for _ in chosen]), 0.5, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert all(sentence in text for sentence in said)
    assert {path.name for path in tmp_path.glob("*.png")} == {"risk_along_answers.png"}
    assert json.loads((tmp_path / "report.json").read_text())["results"]["reliability"] is None


def test_two_sources_of_one_class_each_have_no_curves_but_a_trade_off(tmp_path):
    chosen = [*(e for e in make_examples(8) if e.label), *(e for e in make_examples(8, source="chat") if not e.label)]
    write_report(ScoredAnswers(chosen, [torch.rand(9) for _ in chosen]), 0.5, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"risk_along_answers.png", "trade_off.png", "reliability.png"}


def test_safe_answers_that_all_refuse_are_measured(tmp_path):
    refusals = [dataclasses.replace(e, response="I can't do that.", label=0) for e in make_examples(4)]
    report = write_report(ScoredAnswers(refusals, [torch.rand(3) for _ in refusals]), 0.5, tmp_path)
    assert report["results"]["sources"]["garden"]["auroc_non_refusal"] is None


def test_a_full_report_lacks_nothing(scored, tmp_path):
    report = write_report(scored, 0.5, tmp_path)
    assert report["results"]["missing"] == []
    assert "can't tell" not in (tmp_path / "report.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_any_name_of_a_source_can_be_drawn(tmp_path):
    examples = [e for name in ("_hidden", r"$\frac$", "a|b") for e in make_examples(4, source=name)]
    write_report(ScoredAnswers(examples, [torch.rand(9) for _ in examples]), 0.5, tmp_path)


@pytest.mark.parametrize("risks", [[0.5, float("nan")], [1.5], []], ids=str)
def test_risks_that_are_none_are_refused_with_the_answer(tmp_path, risks):
    examples = make_examples(2)
    with pytest.raises(SafeSpecError, match=r"Risks of answer 'garden:1' must be in \[0, 1\]"):
        write_report(ScoredAnswers(examples, [torch.rand(3), torch.tensor(risks)]), 0.5, tmp_path)
    with pytest.raises(SafeSpecError, match="no answers"):
        write_report(ScoredAnswers([], []), 0.5, tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused(scored, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SafeSpecError, match="can be written to"):
        write_report(scored, 0.5, tmp_path / "file")


def test_provenance_keeps_files_of_one_name_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(folder)
    data = provenance([tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl", "owner/corpus"])["data"]
    assert list(data) == ["a/x.jsonl", "b/x.jsonl", "corpus"]
    assert data["a/x.jsonl"] != data["b/x.jsonl"]


def test_a_report_reads_back_with_the_same_tables(scored, tmp_path):
    written = write_report(scored, 0.5, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    assert list(measured_sources(read)) == list(measured_sources(written)) == ["garden"]
    tables = [to_table(list(report["results"]["sources"].values())) for report in (written, read)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("{folder}", "head"),
        ("{folder}/", "head"),
        ("{folder}/test.jsonl", "test.jsonl"),
        ("--out={folder}", "--out=head"),
        ("../elsewhere/missing.csv", "missing.csv"),
        ("--benign", "--benign"),
        ("12,18,24", "12,18,24"),
        (".", "."),
        ("", ""),
    ],
)
def test_provenance_tells_base_names_of_paths_only(argument, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{tmp_path}/bin/safespec", argument.format(folder=tmp_path / "head")])
    assert provenance()["argv"] == ["safespec", said]


def test_provenance_of_data_names_no_folder(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    assert os.sep not in "".join(provenance([tmp_path / "test.jsonl", "owner/corpus"])["data"])


def tried(layers, pooling, auroc):
    return {"hidden_layers": layers, "reading": [pooling, "answer"], "auroc": auroc, "partial_auroc": 0.5}


SWEEP = [tried([4], "mean", 0.9), tried([2], "mean", 0.7), tried([2], "last", 0.8), tried([2, 4], "mean", 0.95)]


def test_a_sweep_is_a_table_of_single_layers_by_reading():
    first, second = layers_table(SWEEP)
    assert first == {"layer": 2, "last-answer": 0.8, "mean-answer": 0.7, "best": 0.8}
    assert (second["layer"], second["mean-answer"], second["best"]) == (4, 0.9, 0.9)
    assert math.isnan(second["last-answer"])
    assert layers_table([]) == []


def test_a_report_on_a_swept_head_shows_what_each_layer_tells(scored, tmp_path):
    write_report(scored, 0.5, tmp_path, training={"sweep": SWEEP})
    text = (tmp_path / "report.md").read_text()
    assert "## Validation AUROC by layer" in text
    assert "| 4 | – | 0.900 | 0.900 |" in text
    assert (tmp_path / "layers_by_pooling.png").exists()
    write_report(scored, 0.5, tmp_path)
    assert "by layer" not in (tmp_path / "report.md").read_text()
