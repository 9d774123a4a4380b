"""In an engine, too, an unsafe prompt is stopped before its first token."""

import numpy as np
import pytest
import tiny
import torch
from fake_engine import FakeEngine, drive, make_guard

from safespec_hf.vllm.entries import Entry, Marks, StepRow
from safespec_hf.vllm.prompts import find_asked, score_prompts
from safespec_hf.vllm.spec import GuardOrder, RiskRecord

GREEDY = {"temperature": 0.0, "max_tokens": 12}
SETTINGS = {"plain": {}, "chunked": {"chunk": 3}, "drafts": {"num_drafts": 3}, "preempted": {"preempts": True}}
PROMPTS = torch.randint(10, 39, (4, 7), generator=torch.Generator().manual_seed(4)).tolist()


def prompt_risks(target, head):
    with torch.no_grad():
        states = target(torch.tensor(PROMPTS), output_hidden_states=True).hidden_states
        return head.prompt_risk(torch.cat([states[layer][:, -1] for layer in head.config.hidden_layers], dim=-1))


@pytest.fixture
def head(target, tokenizer):
    """One that flags the riskier half of the prompts, and no token."""
    head = tiny.build_head(target, tokenizer=tokenizer, prompt_threshold=0.5)
    torch.nn.init.normal_(head.prompt_probe.weight)
    head.config.prompt_threshold = float(prompt_risks(target, head).median()) + 1e-4
    return head


def answer_all(target, head, tokenizer, setting="plain", **policy):
    guard = make_guard(head, tokenizer, **policy)
    engine = FakeEngine(target, head, tokenizer, **SETTINGS[setting])
    return drive(engine, [guard.request(f"a{index}", one, GREEDY) for index, one in enumerate(PROMPTS)])


@pytest.mark.parametrize("setting", SETTINGS)
def test_unsafe_prompts_are_flagged_and_others_are_not(target, head, tokenizer, setting):
    results = answer_all(target, head, tokenizer, setting, false_alarm_margin=None, seed=0)
    risks = prompt_risks(target, head).tolist()
    assert [bool(result.events) for result in results] == [risk >= head.config.prompt_threshold for risk in risks]
    for result, risk in zip(results, risks, strict=True):
        assert result.failure is None
        if result.events:
            event = result.events[0]
            assert (event.is_prompt, event.outcome, event.position) == (True, "recovered", 0)
            assert event.risk == pytest.approx(risk, abs=1e-5)
            assert result.statistics.num_flags == 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_dismissed_flag_changes_nothing(target, head, tokenizer, setting):
    results = answer_all(target, head, tokenizer, setting, seed=0, false_alarm_margin=0.0)
    silent = answer_all(target, head, tokenizer, setting, screen_prompts=False)
    assert [result.token_ids for result in results] == [result.token_ids for result in silent]
    events = [result.events for result in results if result.events]
    assert [[event.outcome for event in of_one] for of_one in events] == [["dismissed"]] * 2
    assert not any(result.events for result in silent)


@pytest.mark.parametrize(("policy", "reason"), [("refuse", "safety_refusal"), ("stop", "safety_stop")])
def test_policies_that_end_answers_end_them_at_once(target, head, tokenizer, policy, reason):
    results = answer_all(target, head, tokenizer, policy=policy)
    ended = [result for result in results if result.events]
    assert [result.finish_reason for result in ended] == [reason] * 2
    assert all((result.token_ids == []) == (policy == "stop") for result in ended)


def test_where_risks_are_only_observed_they_are_reported(target, head, tokenizer):
    results = answer_all(target, head, tokenizer, policy="observe")
    silent = answer_all(target, head, tokenizer, screen_prompts=False)
    assert [result.token_ids for result in results] == [result.token_ids for result in silent]
    events = [event for result in results for event in result.events]
    assert [(event.outcome, event.is_prompt) for event in events] == [("observed", True)] * 2


def entry(threshold=0.5, start=4, prompt_threshold=0.5):
    return Entry(
        GuardOrder(key="a", group="a", secret="", start=start, threshold=threshold, prompt_threshold=prompt_threshold),
        0,
    )


@pytest.mark.parametrize(
    ("row", "place", "logits"),
    [((0, 4, 0), 3, 0), ((2, 2, 0), 1, 0), ((0, 3, 0), None, None), ((4, 1, 0), None, None), ((0, 6, 2), 3, 0)],
    ids=["whole", "its end", "its beginning", "after it", "with drafts"],
)
def test_the_step_is_found_that_reads_its_last_token(row, place, logits):
    rows = [StepRow("other", 0, 2, 0, np.zeros(2, np.int32)), StepRow("a", *row, np.zeros(9, np.int32))]
    asked = find_asked(rows, {"a": entry()})
    assert [(one.place, one.logits) for one in asked] == ([] if place is None else [(2 + place, 1 + logits)])


@pytest.mark.parametrize(("risk", "is_forced"), [(0.1, False), (0.9, True), (float("nan"), True)])
@pytest.mark.parametrize("observes", [False, True])
def test_what_follows_an_unsafe_prompt_is_closed(target, risk, is_forced, observes):
    head = tiny.build_head(target, prompt_threshold=0.5)
    head.prompt_risk = lambda states: torch.full((len(states),), risk)
    marks, one = Marks(torch.zeros(1, dtype=torch.bool), []), entry(threshold=None if observes else 0.5)
    score_prompts(head, [StepRow("a", 0, 4, 0, np.zeros(4, np.int32))], {"a": one}, torch.zeros(4, 8), marks)
    assert marks.is_forced_R.tolist() == [is_forced and not observes]
    assert one.told_prompt_risk == pytest.approx(risk, nan_ok=True)


def test_a_risk_that_should_be_known_and_is_not_is_unknown_and_not_absent():
    assert np.isnan(entry().told_prompt_risk)
    assert entry(prompt_threshold=None).told_prompt_risk is None
    failed = entry()
    failed.failure = "it failed"
    assert failed.told_prompt_risk is None


def test_a_record_passes_between_processes():
    record = RiskRecord(start=3, tokens=[], risks=[], prompt_risk=0.25)
    assert RiskRecord.from_plain(record.to_plain()) == record
