"""A head is saved whole or not at all, with its report, and shown with it."""

import json
import os
from functools import partial

import pytest
import torch
from hub_server import TOKEN

from safespec_hf import HeadFileError, SafetyHead
from safespec_hf.heads.hub import push_head, refresh_card, save_head, show_head

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


ROW = {"num_safe": 1, "num_unsafe": 1, "auroc": 0.5}
CALIBRATION = {"risk_threshold": 0.5, "alpha": 0.02, "num_answers": 50}
RESULTS = {"risk_threshold": 0.875, "sources": {"garden!": ROW}, "calibration": CALIBRATION}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("report.json", {"results": None}, "`results` must be an object, but it is None"),
        ("report.json", {"results": 1}, "`results` must be an object, but it is 1"),
        ("report.json", {"results": {**RESULTS, "sources": {"a": None}}}, "`results.sources.a` must be an object"),
        (
            "report.json",
            {"results": {**RESULTS, "sources": {"a": {"auroc": "x"}}}},
            "`results.sources.a.auroc` must be",
        ),
        (
            "report.json",
            {"results": {"sources": {"a": ROW}}},
            "`results.risk_threshold` must be a number, but it is No",
        ),
        ("report.json", {"results": {**RESULTS, "risk_threshold": True}}, "`results.risk_threshold` must be a number"),
        ("report.json", {"provenance": {"data": [1]}}, "`provenance.data` must be an object"),
        ("report.json", {"training": {"data": 1}}, "`training.data` must be a list"),
        ("report.json", {"benchmarks": {"a": {"task_id": "b"}}}, "`benchmarks.a.dataset_id` must be a text"),
        ("training.json", {"calibration": {"alpha": "x"}}, "`calibration.risk_threshold` must be a number"),
        (
            "training.json",
            {"calibration": {**CALIBRATION, "by_source": "x"}},
            "`calibration.by_source` must be an obj",
        ),
        ("training.json", {"data": [1]}, "`data.0.` must be an object, but it is 1"),
        ("training.json", {"sweep": [{}]}, "`sweep.0.` is empty"),
        ("training.json", {"prompts": {"alpha": 0.1}}, "`prompts.num_prompts` must be an object"),
        ("training.json", {"chat_template": ["x"]}, "`chat_template` must be a text"),
    ],
)
def test_what_is_of_another_shape_beside_a_head_is_named_with_its_file(folder, name, content, said):
    (folder / name).write_text(json.dumps(content))
    for command in (show_head, partial(refresh_card, SafetyHead), lambda head: push_head(head, ID, dry_run=True)):
        with pytest.raises(HeadFileError, match=f"`{name}` of .*: {said}"):
            command(folder)


@pytest.mark.parametrize(
    "content",
    [{}, {"results": {}}, {"data": None}, {"results": RESULTS}, {"results": {**RESULTS, "calibration": None}}],
)
def test_what_is_not_known_may_be_missing(folder, content):
    (folder / "report.json").write_text(json.dumps(content))
    (folder / "training.json").write_text(json.dumps({"calibration": None, "prompts": None, "data": None}))
    assert "Safety head" in show_head(folder)
    push_head(folder, ID, dry_run=True)


def test_a_report_that_is_no_json_is_named(folder):
    (folder / "report.json").write_text("{")
    with pytest.raises(HeadFileError, match=r"report\.json"):
        show_head(folder)
