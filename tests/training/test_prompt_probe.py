"""The part of a head that scores prompts: trained, calibrated and saved with the head."""

import dataclasses
import json
import random

import pytest
import tiny
import torch
from samples import make_examples, run, write_lines

from safespec_hf import SafeSpecError, SafetyHead
from safespec_hf.training.calibrate import calibrate_head
from safespec_hf.training.chat_template import PLAIN_TEMPLATE
from safespec_hf.training.data import Example
from safespec_hf.training.hidden import render_prompt
from safespec_hf.training.metrics import ScoredAnswers
from safespec_hf.training.prompt_probe import (
    check_prompts,
    fit_probe,
    prompt_thresholds,
    read_prompts,
    train_prompts,
    with_probe,
)

HARMFUL, HARMLESS = 38, 12


def prompts(word, num, start=0, **fields):
    """Prompts that end with a word, whose labels so can be learned."""
    numbers = range(start, start + num)
    return [{"id": f"{word} {i}", "prompt": f"w{10 + i % 25} w{10 + i // 25} w{word}", **fields} for i in numbers]


def example(text, label=0):
    return Example(id=text, messages=({"role": "user", "content": text},), label=label)


@pytest.fixture
def files(tmp_path):
    rows = {
        "harmful": prompts(HARMFUL, 40, label=1),
        "harmless": prompts(HARMLESS, 40),
        "calm": prompts(HARMLESS, 30, start=100),
        "new": prompts(HARMFUL, 10, start=200, label=1) + prompts(HARMLESS, 10, start=130, label=0),
    }
    return {name: write_lines(tmp_path / f"{name}.jsonl", of_one) for name, of_one in rows.items()}


def test_from_prompts_to_a_head_that_knows_them(target_folder, tmp_path, files, tokenizer):
    target = tiny.build_model()
    head = tmp_path / "head"
    tiny.build_head(target, 0.4, tokenizer=tokenizer).save_pretrained(head)
    before = SafetyHead.from_pretrained(head)
    command = ["train-prompts", head, files["harmful"], "--benign", files["harmless"], "--validation", files["new"]]
    command += ["--calibration", files["calm"], "--alpha", 0.1, "--target", target_folder, "--cache", tmp_path]
    run(*command)
    after, record = SafetyHead.from_pretrained(head), json.loads((head / "training.json").read_text())["prompts"]
    assert 0 < after.config.prompt_threshold < 1
    assert after.config.risk_threshold == before.config.risk_threshold
    features = torch.randn(5, before.config.num_features)
    assert torch.equal(after.risk(features), before.risk(features))  # of answers nothing changes
    assert record["num_disguises"] == 3
    assert record["num_prompts"] == {"train": 80 + 2 * 40 + 40 * 2, "calibration": 30, "validation": 20 + 10 + 10}
    assert record["flagged"]["new, unsafe"]["share"] >= 0.8
    assert {"new, disguised, unsafe", "new, disguised, safe"} <= record["flagged"].keys()
    assert record["flagged"]["new, safe"]["share"] <= 0.2
    assert record["auroc"] > 0.9
    assert sorted(record["provenance"]["data"]) == ["calm.jsonl", "harmful.jsonl", "harmless.jsonl", "new.jsonl"]
    card = (head / "README.md").read_text()
    assert "## Prompts" in card
    assert "new, unsafe" in card
    run(*command)  # a second time on top
    assert torch.equal(SafetyHead.from_pretrained(head).prompt_probe.weight, after.prompt_probe.weight)


def test_what_is_read_is_what_decoding_reads(target, tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN_TEMPLATE
    examples = [example("w11 w12"), example("w13 w14 w15 w16"), example("w11 w12")]
    states = read_prompts(target, tokenizer, [1, 2], examples, tmp_path)
    for of_one, states_F in zip(examples, states, strict=True):
        ids = tokenizer(render_prompt(tokenizer, of_one), add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = target(ids, output_hidden_states=True).hidden_states
        assert torch.allclose(states_F, torch.cat([hidden[1][0, -1], hidden[2][0, -1]]), atol=1e-5)


def test_classes_weigh_the_same_however_many_there_are():
    states = torch.cat([torch.randn(200, 3), torch.randn(10, 3) + 3])
    weight, bias = fit_probe(states, [0] * 200 + [1] * 10)
    risks = torch.sigmoid(states @ weight + bias)
    assert (risks[200:] > 0.5).float().mean() >= 0.9
    assert (risks[:200] > 0.5).float().mean() <= 0.1


def test_a_head_with_a_probe_survives_saving(target, tmp_path):
    head = with_probe(tiny.build_head(target), torch.arange(32.0), -0.5, 0.25)
    head.save_pretrained(tmp_path)
    loaded = SafetyHead.from_pretrained(tmp_path)
    states = torch.randn(3, 32)
    assert torch.equal(loaded.prompt_risk(states), head.prompt_risk(states))
    assert loaded.config.prompt_threshold == 0.25


def test_the_bound_holds_for_the_saved_head_of_a_head_in_16_bits(target, tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN_TEMPLATE
    binding = {"tokenizer": tokenizer, "hidden_layers": [1, 2]}
    tiny.build_head(target, 0.4, **binding).bfloat16().save_pretrained(tmp_path / "head")
    draw = random.Random(0)
    texts = {" ".join(f"w{draw.randrange(10, 38)}" for _ in range(6)) for _ in range(400)}
    asked = [example(text, index % 2) for index, text in enumerate(sorted(texts))]
    calm = [dataclasses.replace(one, label=0) for one in asked[100:]]
    train_prompts(target, tokenizer, tmp_path / "head", asked[:100], calm, alpha=0.02, cache_dir=tmp_path)
    saved = SafetyHead.from_pretrained(tmp_path / "head")
    risks = saved.prompt_risk(read_prompts(target, tokenizer, [1, 2], calm, tmp_path))
    assert saved.dtype == torch.float32
    assert (risks >= saved.config.prompt_threshold).float().mean() <= 0.02


def test_each_operating_point_gets_a_threshold_of_prompts_that_answers_leave_alone(target):
    points = {name: {"risk_threshold": 0.5, "prompt_threshold": 0.1} for name in ("strict", "permissive", "mine")}
    risks = [index / 1000 for index in range(300)]
    found = prompt_thresholds(risks, 0.01, points)
    assert list(found) == ["strict"]  # `permissive` would take 399 prompts, and `mine` is nobody's
    head = with_probe(tiny.build_head(target, operating_points=points), torch.arange(32.0), 0.0, 0.9, found)
    assert head.config.prompt_thresholds == found
    assert head.config.prompt_threshold_at("permissive") == 0.9
    safe = [dataclasses.replace(one, label=0) for one in make_examples(30)]
    benign = ScoredAnswers(safe, [torch.rand(9) / 2 for _ in safe])
    calibrate_head(head, benign, None, alpha=0.1)
    assert list(head.config.operating_points) == ["strict"]
    assert head.config.prompt_thresholds == found


def test_a_harmless_prompt_of_risk_one_costs_only_the_point_that_would_have_to_flag_it():
    risks = [index / 1000 for index in range(498)] + [1.0, 1.0]
    found = prompt_thresholds(risks, 0.01, {"strict": {}, "balanced": {}, "permissive": {}})
    assert list(found) == ["strict", "balanced"]


def test_a_head_without_one_says_so(target):
    with pytest.raises(ValueError, match="answers alone"):
        tiny.build_head(target).prompt_risk(torch.zeros(1, 32))


@pytest.mark.parametrize(
    ("train", "calibration", "named"),
    [
        ([example("a")], [example(str(i)) for i in range(9)], "harmful prompts"),
        ([example("a"), example("b", 1)], [example("c")], "at least 9 harmless"),
        ([example("a"), example("b", 1)], [example("a")] + [example(str(i)) for i in range(9)], "both trained"),
    ],
)
def test_prompts_that_teach_nothing_are_refused(train, calibration, named):
    with pytest.raises(SafeSpecError, match=named):
        check_prompts(train, calibration, alpha=0.1)


@pytest.mark.parametrize("text", ["a", "3"])
def test_prompts_to_measure_on_are_others(text):
    train, calibration = [example("a"), example("b", 1)], [example(str(i)) for i in range(9)]
    with pytest.raises(SafeSpecError, match=f"on and measured on, '{text}' for instance"):
        check_prompts(train, calibration, 0.1, [example("new"), example(text)])
    check_prompts(train, calibration, 0.1, [example("new")])


def test_leaking_prompts_are_refused_before_a_model_is_loaded(tmp_path, files):
    command = ["train-prompts", tmp_path, files["harmful"], "--benign", files["harmless"], "--alpha", 0.1]
    command += ["--calibration", files["calm"], "--validation", files["harmful"], "--target", "no/such-model"]
    with pytest.raises(SafeSpecError, match="40 prompts are both trained on and measured on"):
        run(*command)


@pytest.mark.parametrize(("row", "named"), [({}, "has no label"), ({"label": 1}, "must be harmless")])
def test_labels_are_checked_before_a_model_is_loaded(tmp_path, files, row, named):
    odd = write_lines(tmp_path / "odd.jsonl", [{"prompt": "w11", **row}])
    data, calibration = (files["harmful"], odd) if row else (odd, files["calm"])
    with pytest.raises(SafeSpecError, match=named):
        run("train-prompts", tmp_path, data, "--calibration", calibration, "--target", "no/such-model")
