"""On a tiny random encoder and words of which some count as unsafe."""

import dataclasses
import json
import re

import pytest
import torch
from samples import make_examples, run, write_lines

from safespec_hf import SafeSpecError
from safespec_hf.cli.make_judge import summarize
from safespec_hf.evaluation import judges_offline, judges_training
from safespec_hf.evaluation.judges_embedding import SentenceEmbedder
from safespec_hf.evaluation.judges_loading import load_judge
from safespec_hf.evaluation.judges_offline import OfflineJudge
from safespec_hf.evaluation.judges_training import JudgeSettings, make_judge, measure_judge, split_requests

LABELLED, PEOPLE, NEW = (make_examples(48, seed, source=f"garden{seed}") for seed in range(3))
SETTINGS = JudgeSettings(strengths=(0.01, 0.1))


@pytest.fixture
def judge(embedder):
    return make_judge(LABELLED, PEOPLE, embedder, settings=SETTINGS)


def test_it_tells_answers_apart_that_it_has_not_seen(judge):
    errors = measure_judge(judge, NEW)
    assert errors.auroc > 0.95
    assert (errors.num_unsafe, errors.num_safe) == (24, 24)


def test_its_errors_are_those_of_judges_that_had_not_seen_the_request(judge):
    assert (judge.errors.num_unsafe, judge.errors.num_safe) == (24, 24)
    assert judge.errors.auroc > 0.8
    assert judge.facts["measured"]["accuracy"] == judge.errors.accuracy
    assert set(judge.facts["sources"]) == {"garden0", "garden1"}


def test_labels_that_mean_nothing_are_not_learned_by_heart(embedder):
    # Trained and measured on the same answers it would look right about most: there are more features than answers.
    asked = PEOPLE[0].messages
    shuffled = [
        dataclasses.replace(example, label=index // 2 % 2, messages=asked, group=str(index))
        for index, example in enumerate(make_examples(48, 8))
    ]
    judge = make_judge([], shuffled, embedder, settings=JudgeSettings(strengths=(10.0,)))
    assert judge.facts["measured"]["is_too_weak"]
    assert measure_judge(judge, shuffled).auroc > judge.errors.auroc + 0.2


def test_no_request_is_on_two_sides():
    for train, test in split_requests(LABELLED + PEOPLE, 4):
        groups = [{(LABELLED + PEOPLE)[index].group for index in part} for part in (train, test)]
        assert not groups[0] & groups[1]


def test_made_again_it_is_the_same(judge, embedder):
    again = make_judge(LABELLED, PEOPLE, embedder, settings=SETTINGS)
    assert again.linear.weight_F.equal(judge.linear.weight_F)
    assert again.errors == judge.errors


def test_saved_and_loaded_it_says_the_same(judge, embedder, tmp_path):
    judge.save_pretrained(tmp_path / "judge")
    loaded = OfflineJudge.from_pretrained(tmp_path / "judge", embedder=embedder)
    texts = ["w10 think"] * 3, ["w30 w31", "w11", ""]
    # what a CPU adds up may be rounded otherwise where it lies elsewhere in memory
    assert loaded.judge(*texts) == pytest.approx(judge.judge(*texts), abs=1e-6)
    assert loaded.judge(*texts)[2] == 0
    assert (loaded.errors, loaded.threshold, loaded.name) == (judge.errors, judge.threshold, judge.name)
    assert loaded.facts == json.loads(json.dumps(judge.facts))
    assert sorted(path.name for path in (tmp_path / "judge").iterdir()) == ["judge.json", "judge.safetensors"]


def test_its_identity_is_that_of_its_weights_whatever_its_name(judge, embedder, tmp_path):
    judge.save_pretrained(tmp_path / "judge")
    loaded = OfflineJudge.from_pretrained(tmp_path / "judge", embedder=embedder)
    other = OfflineJudge(judge.linear._replace(bias=judge.linear.bias + 1), embedder, judge.errors, name=judge.name)
    assert loaded.identity == judge.identity != other.identity


def test_it_is_loaded_by_its_path(judge, embedder, tmp_path, monkeypatch):
    judge.save_pretrained(tmp_path / "judge")
    monkeypatch.setattr(judges_offline, "default_embedder", lambda: embedder)
    assert isinstance(load_judge(tmp_path / "judge"), OfflineJudge)


def test_another_encoder_is_refused(judge, encoder, tmp_path):
    judge.save_pretrained(tmp_path / "judge")
    weights = encoder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SafeSpecError, match="trained on another encoder"):
        OfflineJudge.from_pretrained(tmp_path / "judge", embedder=SentenceEmbedder(encoder, device="cpu"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "judge.json").unlink(), "make-judge"),
        (lambda folder: (folder / "judge.json").write_text("{"), "No judge could be read"),
        (lambda folder: (folder / "judge.json").write_text("[]"), "not that of an offline judge"),
        (lambda folder: (folder / "judge.safetensors").write_bytes(b"rose"), "damaged"),
        (lambda folder: (folder / "judge.safetensors").unlink(), "damaged"),
        (
            lambda folder: (folder / "judge.json").write_text(
                re.sub('"num_caught": .*,', "", (folder / "judge.json").read_text())
            ),
            "damaged",
        ),
    ],
)
def test_damaged_files_are_refused(judge, embedder, tmp_path, change, said):
    judge.save_pretrained(tmp_path / "judge")
    change(tmp_path / "judge")
    with pytest.raises(SafeSpecError, match=said):
        OfflineJudge.from_pretrained(tmp_path / "judge", embedder=embedder)


def test_weights_that_are_no_numbers_are_refused(judge, embedder, tmp_path):
    bad = judge.linear._replace(bias=torch.tensor(float("nan")))
    OfflineJudge(bad, embedder, judge.errors).save_pretrained(tmp_path / "judge")
    with pytest.raises(SafeSpecError, match="not finite"):
        OfflineJudge.from_pretrained(tmp_path / "judge", embedder=embedder)


def test_answers_of_one_class_are_refused_before_they_are_read(embedder, monkeypatch):
    monkeypatch.setattr(embedder, "embed", lambda *_, **__: pytest.fail("read"))
    safe = [example for example in PEOPLE if example.label == 0]
    with pytest.raises(SafeSpecError, match="both classes"):
        make_judge(LABELLED, safe, embedder)
    with pytest.raises(SafeSpecError, match="one class is missing"):
        make_judge([], safe, embedder)
    with pytest.raises(SafeSpecError, match="5 folds need as many requests, but there are 2"):
        make_judge([], PEOPLE[:2], embedder)


def test_the_command_makes_a_judge_and_says_what_it_gets_wrong(encoder, tmp_path):
    files = [
        write_lines(tmp_path / f"{name}.jsonl", [example.to_json() for example in examples])
        for name, examples in (("labelled", LABELLED), ("people", PEOPLE))
    ]
    out = tmp_path / "judge"
    arguments = ["--labelled", files[0], "--measured-on", files[1], "--embedder", encoder, "--out", out]
    said = run("make-judge", *arguments)
    assert "trained on 96 answers" in said
    assert "24 unsafe and 24 safe answers that people labelled: AUROC" in said
    config = json.loads((out / "judge.json").read_text())
    assert set(config["provenance"]["data"]) == {"labelled.jsonl", "people.jsonl"}
    assert OfflineJudge.from_pretrained(out, embedder=SentenceEmbedder(encoder)).errors.num_safe == 24


def test_what_can_not_be_measured_is_null_and_said(embedder, tmp_path):
    refusing = [
        dataclasses.replace(example, response=example.response + " sorry") if example.label == 0 else example
        for example in PEOPLE
    ]
    unsafe = [dataclasses.replace(example, label=1, source="thorns") for example in make_examples(12, 5)]
    unsafe = [dataclasses.replace(example, id=f"thorns:{index}") for index, example in enumerate(unsafe)]
    judge = make_judge([*LABELLED, *unsafe], refusing, embedder, settings=SETTINGS)
    judge.save_pretrained(tmp_path)
    content = (tmp_path / "judge.json").read_text()
    assert json.loads(content, parse_constant=lambda name: pytest.fail(name))["sources"]["thorns"]["auroc"] is None
    said = summarize(judge.facts, tmp_path)
    assert "do not refuse: unknown, as all safe ones refuse" in said
    assert re.search(r"thorns: flags [\d.]+% of 12 unsafe ones$", said, re.MULTILINE)


def test_the_command_refuses_a_file_given_twice(tmp_path, monkeypatch):
    data = write_lines(tmp_path / "x.jsonl", [example.to_json() for example in PEOPLE])
    monkeypatch.setattr(judges_training, "make_judge", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(SafeSpecError, match="occurs twice"):
        run("make-judge", "--labelled", data, "--measured-on", data, "--out", tmp_path / "judge")
