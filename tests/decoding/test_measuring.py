"""Costs are measured once, by forwards that run as the call's own do, and nothing else of the call changes."""

import pytest
import torch
from tiny import build_draft_head, build_head, build_model, perturb

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.decoding import drafts
from safespec_hf.decoding.measuring import MeasuredCosts, measure_costs
from safespec_hf.drafting.draft_length import DraftLength
from safespec_hf.engine import packing, speeds
from safespec_hf.engine.speeds import BlockSeconds

PROMPT = torch.tensor([[12, 18, 24, 13]])


@pytest.fixture(autouse=True)
def _all_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFESPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(speeds, "MIN_TIMED_WEIGHTS", 0)
    speeds.forget()


def measured(model, assistant=None, num_rows=1, **how):
    return measure_costs(model, assistant, num_rows=num_rows, num_context=100, layers=[], how=how)


def test_costs_are_counted_in_plain_steps_of_the_rows_there_are():
    costs = MeasuredCosts(
        target=BlockSeconds(((1, 0.04), (8, 0.06), (32, 0.12))), drafter=BlockSeconds(((1, 0.004), (8, 0.012)))
    )
    one, eight = costs.of_rows(1), costs.of_rows(8)
    assert (one.draft, one.block(1), one.block(8)) == pytest.approx((0.1, 1.0, 1.5))
    assert (eight.draft, eight.block(1), eight.block(4)) == pytest.approx((0.2, 1.0, 2.0))
    assert one.block(100) == pytest.approx(costs.target.at(100) / 0.04)


@pytest.mark.parametrize("build", [lambda _: None, perturb, build_draft_head])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_target_and_draft_can_be_measured(build, num_rows, kind):
    model = build_model(kind)
    costs = measured(model, build(model), num_rows)
    assert costs.block(1) == 1
    assert costs.block(9) >= costs.block(2) >= 1
    assert (costs.draft > 0) is (build(model) is not None)


def test_a_model_is_measured_once_for_each_way_to_run_it(target, monkeypatch):
    forwards = []
    target.register_forward_pre_hook(lambda *_: forwards.append(1))
    for how in ({"compile": False}, {"compile": True}):
        measured(target, **how)
        assert forwards
        forwards.clear()
        measured(target, **how)
        speeds.forget()
        measured(target, **how)
        assert not forwards


def answer(model, **arguments):
    return model.generate(PROMPT, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, **arguments)


def test_measuring_is_shown_once_and_changes_nothing(target, draft, never, tokenizer):
    expected = target.generate(PROMPT, max_new_tokens=24, do_sample=False)
    attach_safety_head(target, never, tokenizer=tokenizer)
    first, second = (answer(target, assistant_model=draft, safespec=True) for _ in range(2))
    assert first.statistics.measuring_seconds > 0 == second.statistics.measuring_seconds
    assert torch.equal(first.sequences, expected)
    assert torch.equal(second.sequences, expected)


@pytest.mark.parametrize(
    "policy", [SafeSpecConfig(costs="weights"), SafeSpecConfig(adaptive_drafts=False, pack_weights=False)], ids=str
)
def test_who_wants_nothing_measured_gets_that(target, draft, never, tokenizer, policy, monkeypatch):
    for module in (drafts, packing):
        name = "measure_costs" if module is drafts else "fastest_layouts"
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured"))
    attach_safety_head(target, never, tokenizer=tokenizer)
    output = answer(target, assistant_model=draft, safespec=policy)
    assert output.statistics.measuring_seconds == output.statistics.num_watch_pauses == 0


class Part(torch.nn.Parameter):
    """As tensor parallelism and FSDP leave behind."""


@pytest.mark.parametrize(
    ("num_processes", "is_part", "is_timed"), [(1, True, True), (2, False, True), (2, True, False)]
)
def test_processes_that_share_a_model_go_by_no_clock(target, monkeypatch, num_processes, is_part, is_timed):
    monkeypatch.setattr(speeds.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(speeds.dist, "get_world_size", lambda: num_processes)
    if is_part:
        target.lm_head.weight = Part(target.lm_head.weight.data)
    assert speeds.is_timed(target, 10**9) is is_timed


def test_without_anything_to_draft_there_is_nothing_to_decide(target, tokenizer):
    attach_safety_head(target, build_head(target), tokenizer=tokenizer)
    assert answer(target, safespec=SafeSpecConfig(pack_weights=False)).statistics.measuring_seconds == 0


@pytest.mark.parametrize(
    ("after_one", "after_many", "expected"), [(0.041, 0.05, 8), (0.08, 0.30, 0), (0.075, 0.08, 8)]
)
def test_flat_costs_draft_much_and_steep_ones_nothing(after_one, after_many, expected):
    costs = MeasuredCosts(target=BlockSeconds(((1, 0.04), (2, after_one), (8, after_many))))
    length = DraftLength(costs.of_rows(1), is_free=True)
    for _ in range(50):
        length.record([7], [0])
    for _ in range(50):
        length.record([7, 7], [0, 1])
    for _ in range(20):
        length.record([7, 7], [0])
    assert length.num_worthwhile([7] * 8) == expected
