"""The prompt itself is scored in the forward that reads it: an unsafe one is a flag before the first token."""

import math

import pytest
import torch
from scripted import TURNS, answer, count_after, count_up, has_reflected, outcomes_of, tokens_of
from tiny import Recorder, build_head, build_model

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.decoding.attachment import find_prompt_threshold, find_threshold, with_threshold
from safespec_hf.engine.cache import CACHE_NAME

REFUSED = "safety_refusal"
# the answer to [10] counts up from 11; sampled, it may turn to 30
DRAFTS = pytest.mark.parametrize("draft", [None, count_after(TURNS)], ids=["alone", "draft"])
SAMPLED = count_after({**TURNS, 10: {11: 0.7, 30: 0.3}, 14: {15: 0.5, 25: 0.5}})


def ask(tokenizer, risks=None, *, threshold=0.5, **fields):
    return answer(tokenizer, {10: 0.9, **(risks or {})}, head={"prompt_threshold": threshold}, **fields)


@DRAFTS
def test_an_unsafe_prompt_is_a_flag_before_the_first_token(tokenizer, draft):
    output = ask(tokenizer, draft=draft)
    (event,) = output.events[0]
    assert (event.outcome, event.is_prompt, event.position) == ("recovered", True, 0)
    assert (event.rolled_back_to, event.num_discarded) == (0, 0)
    assert event.risk == pytest.approx(0.9)
    assert tokens_of(output)[0] in (20, 30)
    assert (output.statistics.num_flags, output.statistics.num_discarded_tokens) == (1, 0)


@pytest.mark.parametrize("risk", [0.9, math.nan])
def test_a_prompt_whose_risk_is_unknown_is_unsafe(tokenizer, risk):
    assert ask(tokenizer, {10: risk}).events[0][0].is_prompt


@pytest.mark.parametrize(
    ("threshold", "fields"),
    [(0.95, {}), (None, {}), (0.5, {"screen_prompts": False})],
    ids=["safe", "no probe", "off"],
)
def test_otherwise_it_is_none(tokenizer, threshold, fields):
    output = ask(tokenizer, threshold=threshold, **fields)
    assert outcomes_of(output) == []
    assert tokens_of(output) == [*range(11, 20)]


@pytest.mark.parametrize(
    ("policy", "is_flagged"),
    [
        ({}, False),
        ({"operating_point": "strict"}, True),
        ({"operating_point": "permissive"}, False),
        ({"carried_risk": 0.02}, False),
        ({"carried_risk": 0.1}, True),
        ({"prompt_threshold": 0.85}, True),
        ({"prompt_threshold": 0.95, "operating_point": "strict"}, False),
        ({"prompt_threshold": 0.95, "carried_risk": 0.1}, True),
    ],
    ids=str,
)
def test_prompts_have_their_thresholds_at_operating_points_and_after_risky_turns(tokenizer, policy, is_flagged):
    points = {
        "strict": {"risk_threshold": 0.5, "prompt_threshold": 0.8},
        "permissive": {"risk_threshold": 0.5},
    }
    head = {"prompt_threshold": 0.95, "operating_points": points}
    output = answer(tokenizer, {10: 0.9}, head=head, risk_threshold=None, **policy)
    assert bool(output.events[0]) == is_flagged


@DRAFTS
@pytest.mark.parametrize("policy", [{}, {"do_sample": True, "top_k": 0, "seed": 3}], ids=["greedy", "sampled"])
def test_a_dismissed_flag_changes_nothing(tokenizer, draft, policy):
    fields = {"script": SAMPLED, "false_alarm_margin": 0.5, **policy}
    torch.manual_seed(0)
    output = ask(tokenizer, **fields, draft=draft)
    torch.manual_seed(0)
    silent = ask(tokenizer, **fields, draft=draft, screen_prompts=False)
    (event,) = output.events[0]
    assert (event.outcome, event.is_prompt, event.chosen, event.num_candidates) == ("dismissed", True, None, 8)
    assert draft or tokens_of(output) == tokens_of(silent)  # a draft that samples draws its own
    assert policy or tokens_of(output) == tokens_of(silent)
    assert not has_reflected(output)
    assert not output.statistics.num_discarded_tokens


def test_one_candidate_that_is_not_harmless_confirms_it(tokenizer):
    output = ask(tokenizer, {12: 0.3}, false_alarm_margin=0.5)
    assert outcomes_of(output) == ["confirmed", "recovered"]
    assert [event.is_prompt for event in output.events[0]] == [True, True]
    assert has_reflected(output)


def test_the_flag_after_a_dismissed_one_is_believed(tokenizer):
    output = ask(tokenizer, {15: 0.9}, false_alarm_margin=0.5)
    assert outcomes_of(output)[:2] == ["dismissed", "recovered"]
    assert [event.is_prompt for event in output.events[0]][:2] == [True, False]


@pytest.mark.parametrize(("policy", "reason"), [("refuse", REFUSED), ("stop", "safety_stop")])
def test_policies_that_end_answers_end_it_at_once(tokenizer, policy, reason):
    output = ask(tokenizer, policy=policy)
    assert output.finish_reasons == [reason]
    assert output.events[0][0].is_prompt
    assert 11 not in tokens_of(output)
    assert (tokens_of(output) == []) == (policy == "stop")


def test_where_risks_are_only_observed_it_is_reported(tokenizer):
    output = ask(tokenizer, {13: 0.8}, policy="observe")
    assert outcomes_of(output) == ["observed", "observed"]
    assert [event.is_prompt for event in output.events[0]] == [True, False]
    assert output.statistics.num_flags == 2
    assert tokens_of(output) == [*range(11, 20)]


def test_nothing_but_the_answer_is_streamed(tokenizer):
    recorder = Recorder()
    output = ask(tokenizer, streamer=recorder)
    assert recorder.tokens == output.sequences[0].tolist()


def test_rows_of_a_batch_are_screened_as_they_would_be_alone(tokenizer):
    prompts = [[[0, 0, 10]], [[0, 14, 16]], [[3, 4, 10]]]
    batch = ask(tokenizer, prompt=[row for (row,) in prompts])
    alone = [ask(tokenizer, prompt=prompt) for prompt in prompts]
    assert [tokens_of(batch, row, 3) for row in range(3)] == [tokens_of(one, 0, 3) for one in alone]
    assert [outcomes_of(batch, row) for row in range(3)] == [["recovered"], [], ["recovered"]]


def test_a_silent_screen_adds_no_forward(tokenizer):
    forwards = [
        ask(tokenizer, {10: 0.1}, draft=count_up, screen_prompts=is_on).statistics.num_target_forwards
        for is_on in (True, False)
    ]
    assert forwards[0] == forwards[1]


@pytest.mark.parametrize("prompt", ["tokens", "embeddings", "cached", "padded embeddings"])
def test_the_last_token_of_any_prompt_is_what_is_scored(tokenizer, prompt):
    torch.manual_seed(0)
    model = build_model()
    attach_safety_head(model, build_head(model, prompt_threshold=0.5), tokenizer=tokenizer)
    head, ids = model.safety.head, torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.ones_like(ids)
    if prompt == "padded embeddings":
        mask[0, :2] = 0
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states
        last_BF = torch.cat([hidden[layer][:, -1] for layer in head.config.hidden_layers], dim=-1)
        expected = head.prompt_risk(last_BF)
    arguments = {"input_ids": ids}
    if "embeddings" in prompt:
        arguments = {"inputs_embeds": model.get_input_embeddings()(ids)}
    if prompt == "cached":
        arguments[CACHE_NAME] = getattr(model(ids[:, :2], use_cache=True), CACHE_NAME)
    head.config.prompt_threshold = 1e-9
    output = model.generate(
        **arguments,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=3,
        return_dict_in_generate=True,
        safespec=SafeSpecConfig(policy="observe"),
    )
    found = [events[0].risk for events in output.events]
    assert all(events[0].is_prompt for events in output.events)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_threshold_of_prompts_takes_a_head_that_scores_them(tokenizer):
    with pytest.raises(UnsupportedRequestError, match="scores answers alone"):
        ask(tokenizer, threshold=None, prompt_threshold=0.5)
    with pytest.raises(ValueError, match=r"`prompt_threshold` must be in \(0, 1\] or None"):
        SafeSpecConfig(prompt_threshold=0.0)


def test_another_threshold_of_tokens_leaves_that_of_prompts():
    points = {"strict": {"risk_threshold": 0.5, "prompt_threshold": 0.4}}
    model = build_model()
    for given, expected in ((0.8, 0.3), (None, math.inf)):
        head = build_head(model, prompt_threshold=given, operating_points=points)
        policy = SafeSpecConfig(operating_point="strict", carried_risk=0.25)
        assert find_prompt_threshold(policy, head) == pytest.approx(expected)
        changed = with_threshold(policy, 0.1, head)
        assert find_threshold(changed, head) == 0.1
        assert find_prompt_threshold(changed, head) == pytest.approx(expected)


@pytest.mark.parametrize(("given", "set_later"), [(None, 0.5), (0.5, None)], ids=["without a probe", "with one"])
def test_a_threshold_that_was_set_later_is_refused_before_the_first_forward(tokenizer, given, set_later):
    model = build_model()
    attach_safety_head(model, build_head(model, prompt_threshold=given), tokenizer=tokenizer)
    model.safety.head.config.prompt_threshold = set_later
    with pytest.raises(UnsupportedRequestError, match="prompt_threshold"):
        model.generate(torch.tensor([[11, 12]]), max_new_tokens=4, safespec=True)
