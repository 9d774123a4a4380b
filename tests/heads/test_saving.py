"""A head is saved whole or not at all, with its report, and shown with it."""

import json
import os

import pytest
import torch
from hub_server import TOKEN

from safespec_hf import HeadFileError, SafetyHead
from safespec_hf.heads.hub import push_head, save_head, show_head

# huggingface_hub 2.4 uploads LFS files with an argument that its HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ID = "owner/head"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read(folder):
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_saved_head_is_whole(folder, head, report):
    expected = [".eval_results", "README.md", CONFIG, WEIGHTS, "report.json"]
    assert sorted(file.name for file in folder.iterdir()) == expected
    assert same_weights(SafetyHead.from_pretrained(folder), head)
    assert json.loads((folder / "report.json").read_text())["data"] == report["data"]


def test_what_was_measured_on_a_former_head_goes(folder, head):
    save_head(head, folder)
    assert not (folder / "report.json").exists()
    assert list((folder / ".eval_results").iterdir()) == []
    assert "No evaluation is recorded" in (folder / "README.md").read_text()


@pytest.mark.parametrize("num_moves", range(5))
def test_an_interrupted_save_leaves_no_weights(folder, head, report, monkeypatch, num_moves):
    moves, replace = [], os.replace

    def stop_after(source, place):
        if len(moves) == num_moves:
            raise KeyboardInterrupt
        moves.append(place)
        replace(source, place)

    head.config.risk_threshold = 0.5
    monkeypatch.setattr(os, "replace", stop_after)
    with pytest.raises(KeyboardInterrupt):
        save_head(head, folder, report)
    with pytest.raises(HeadFileError, match=WEIGHTS):
        SafetyHead.from_pretrained(folder)


# Showing


def test_showing_a_folder_says_what_it_reads_and_how_well_it_does(folder):
    text = show_head(folder)
    for said in ("Hidden states 2 of 2", "32 → 16 → 1", "545 parameters", "0.875", "model_id: owner/target", "0.930"):
        assert said in text


def test_showing_a_head_by_id_fetches_its_report(hub, folder):
    push_head(folder, ID, token=TOKEN)
    assert show_head(ID).splitlines()[1:] == show_head(folder).splitlines()[1:]


def test_showing_a_bare_head_needs_no_report(hub, folder):
    hub.put(ID, read(folder))
    assert "no report beside it" in show_head(ID)


def test_a_report_that_is_no_json_is_named(folder):
    (folder / "report.json").write_text("{")
    with pytest.raises(HeadFileError, match=r"report\.json"):
        show_head(folder)
