"""The pure parts of the speed benchmark, and the pairs that it constructs."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import constructed
import tiny
from speed_log import Log, read_results
from speed_parts import ForcedHead, told_of_recoveries
from speed_statistics import (
    bootstrap_median,
    count_rounds,
    engine_efficiency,
    expected_tokens_per_round,
    ours_raw_seconds,
    plain_raw_seconds,
    ratios,
    theoretical_speedup,
)

from safespec_hf.decoding.safety_mode import SafetyMode


def test_tokens_per_round_is_the_sum_of_the_chances_to_get_that_far():
    assert expected_tokens_per_round(0.5, 2) == 1 + 0.5 + 0.25
    assert expected_tokens_per_round(1, 3) == 4
    assert expected_tokens_per_round(0, 3) == 1


def test_theory_divides_by_the_cost_of_a_round_in_target_steps():
    assert theoretical_speedup(0.5, 2, draft_cost=0.25) == pytest.approx(1.75 / 1.5)
    assert theoretical_speedup(0.5, 2, draft_cost=0.25, verify_cost=1.25) == pytest.approx(1.75 / 1.75)


def test_a_round_ends_at_a_disagreement_or_after_all_drafts():
    # right right wrong | right right (right is the target's own) | right
    assert count_rounds([True, True, False, True, True, True, True], num_drafts=2) == 3
    assert count_rounds([False] * 4, num_drafts=3) == 4


def test_rounds_of_independent_agreement_come_near_the_formula():
    agreed = (torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < 0.75).tolist()
    # the standard error of 20,000 draws is about 0.5 %
    assert len(agreed) / count_rounds(agreed, 5) == pytest.approx(expected_tokens_per_round(0.75, 5), rel=0.02)


def test_the_interval_holds_the_median_and_narrows_with_more_prompts():
    few, many = (bootstrap_median(torch.linspace(1, 2, num).tolist(), 500) for num in (9, 99))
    assert few.median == pytest.approx(1.5)
    assert few.low < few.median < few.high
    assert many.high - many.low < few.high - few.low


def test_what_was_not_measured_has_no_median():
    assert bootstrap_median([1.0, math.nan]).num == 1
    assert math.isnan(bootstrap_median([]).median)


def test_raw_seconds_follow_the_formula():
    blocks = {1: 0.5, 4: 0.75}
    assert plain_raw_seconds(9, prefill=1.0, blocks=blocks) == 5.0
    assert ours_raw_seconds({4: 2, 1: 1}, prefill=1.0, blocks=blocks, draft=0.25) == 3.25


def test_an_engine_without_overhead_has_efficiency_one():
    raw_speedup = (9 / 3.25) / (9 / 5.0)
    assert engine_efficiency(measured_speedup=5.0 / 3.25, raw_speedup=raw_speedup) == pytest.approx(1)


def test_ratios_are_in_tokens_per_second_or_in_seconds_per_answer():
    record = {"arms": {"plain": {"num_tokens": 10, "seconds": 5.0}, "ours": {"num_tokens": 5, "seconds": 2.0}}}
    assert ratios([record], "ours", "plain") == [1.25]
    assert ratios([record], "ours", "plain", "seconds") == [2.5]


def test_a_killed_run_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "out.jsonl"
    Log(path, ["real"], resume=False).append({"part": "real", "key": "one", "settings": {"tokens": 8}})
    with path.open("a") as file:
        file.write('{"part": "real", "key": "tw')
    assert list(Log(path, ["real"], resume=True).done("real", {"tokens": 8})) == ["one"]
    assert Log(path, ["real"], resume=True).done("real", {"tokens": 9}) == {}
    assert Log(path, ["real"], resume=False).records == []
    for part in ("batch 8", "real tuning"):
        Log(path, [], resume=True).append({"part": part, "key": "one", "settings": {}})
    assert [record["part"] for record in Log(path, ["batch"], resume=False).records] == ["real tuning"]


def test_what_does_not_exist_in_the_file_is_nan_but_for_settings(tmp_path):
    path = tmp_path / "out.json"
    path.write_text('{"results": {"real": {"settings": {"draft_tokens": null}, "arms": [{"acceptance": null}]}}}')
    part = read_results(path)["real"]
    assert math.isnan(part["arms"][0]["acceptance"])
    assert part["settings"]["draft_tokens"] is None


@pytest.fixture(scope="module")
def text():
    return constructed.make_text(256)


def greedy(model, first: int, num: int) -> list[int]:
    ids = torch.tensor([[first]])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False)[0].tolist()


def test_a_constructed_target_walks_along_the_cycle(text):
    target = constructed.build_model(64, 2, constructed.successors(text), torch.float32)
    stretch = text.stretch(250, 40)  # across the end of the cycle
    assert greedy(target, stretch[0], 39) == stretch


def test_a_constructed_draft_is_right_after_just_the_tokens_it_should_be(text):
    draft = constructed.build_model(64, 1, constructed.successors(text, 0.75), torch.float32)
    with torch.no_grad():
        says = draft(text.cycle[:, None]).logits[:, -1].argmax(-1)
    is_right = (says == text.cycle.roll(-1)).tolist()
    assert is_right == text.agreements(text.cycle.tolist(), 0.75)
    assert sum(is_right) / len(is_right) == pytest.approx(0.75, abs=0.08)  # three standard errors of 256 draws


def test_wrong_successors_are_still_one_each(text):
    following = constructed.successors(text, 0.5)
    assert sorted(following.tolist()) == list(range(256))


def test_constructed_layers_do_work(text):
    target = constructed.build_model(64, 2, constructed.successors(text), torch.float32)
    assert all(weight.abs().mean() > 1e-5 for weight in target.parameters())


def test_a_forced_head_flags_in_its_rounds_and_never_a_candidate():
    head = ForcedHead(tiny.build_head(tiny.build_model(), 0.5).config).eval()
    head.force([2, 3])
    flags = []
    for head.is_recovering in (False, False, True, True, False, True, False):
        flags.append((head.risk(torch.zeros(3, 32)) >= 0.5).tolist())
    no_flag, flag = [False] * 3, [True, False, False]
    assert flags == [no_flag, flag, no_flag, no_flag, flag, no_flag, no_flag]


def test_a_forced_head_is_told_of_recoveries(monkeypatch):
    head, seen = ForcedHead(tiny.build_head(tiny.build_model(), 0.5).config), []
    monkeypatch.setattr(SafetyMode, "recover", lambda *_: seen.append(head.is_recovering))
    head.force([])
    with told_of_recoveries(head):
        SafetyMode.recover(None, 0, None, None)
    SafetyMode.recover(None, 0, None, None)
    assert seen == [True, False]
