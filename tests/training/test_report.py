import json
import os
import sys

import pytest
import torch
from samples import make_examples

from safespec_hf.heads.card import measured_sources, to_table
from safespec_hf.training.metrics import Scored
from safespec_hf.training.report import provenance, write_report


@pytest.fixture
def scored():
    """One source of both classes, and one that is safe only."""
    examples = [*make_examples(20), *(e for e in make_examples(6, source="chat") if e.label == 0)]
    return Scored(examples, [torch.rand(3 + index % 5) for index in range(len(examples))])


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def test_a_report_is_json_for_every_reader_with_null_for_what_has_no_figure(scored, tmp_path):
    write_report(scored, 0.5, tmp_path)
    results = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)["results"]
    assert results["sources"]["chat"]["recall"] is None
    assert results["mean_risk_along"]["safe"][-1] is None


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
