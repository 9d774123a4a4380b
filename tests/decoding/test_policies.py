"""What follows a flag is what the policy says, alone and in a batch, streamed and sampled."""

import dataclasses
import math

import pytest
import torch
from scripted import TURNS, ScriptedModel, answer, count_after, probe, tokens_of
from tiny import DRAFTING, NO, POLICY, THANKS, THINK, Recorder, attach, build_model, build_noisy_head, drafting
from transformers import StoppingCriteria, StoppingCriteriaList

from safespec_hf import Provenance, SafeSpecConfig, UnsupportedRequestError
from safespec_hf.decoding import call
from safespec_hf.decoding.call import GuardedCall

BLANK_LINE = 8
OUTCOMES = {
    "recover": "recovered",
    "recover_single": "recovered",
    "recover_unreflected": "recovered",
    "refuse": "refused",
    "stop": "stopped",
    "observe": "observed",
}
GUARDING = [policy for policy in OUTCOMES if policy != "observe"]
# 15 is unsafe. A recovery goes on with 20 or 30 after the reflection, and without one with 30 instead of 14.
SCRIPT = count_after({**TURNS, 13: {14: 0.98, 30: 0.02}})


def ask(tokenizer, policy, risks=None, **arguments):
    fields = {"reflection": ""} if policy == "recover_unreflected" else {}
    fields |= {"script": SCRIPT, "flagged_token_penalty": math.inf, "candidate_source": "target", "policy": policy}
    return answer(tokenizer, risks or {15: 0.9}, **fields | arguments)


def check(policy, output, row=0):
    tokens, outcomes = tokens_of(output, row), [event.outcome for event in output.events[row]]
    assert outcomes[-1] == OUTCOMES[policy]
    assert (15 in tokens) is (policy == "observe")
    ends = {"refuse": "safety_refusal", "stop": "safety_stop"}
    assert output.finish_reasons[row] == ends.get(policy, "length")
    assert (Provenance.REFUSAL in output.provenance[row].tolist()) is (policy == "refuse")
    return tokens


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", [None, SCRIPT], ids=["alone", "drafted"])
@pytest.mark.parametrize("policy", OUTCOMES)
def test_a_flag_is_answered_as_the_policy_says_and_streamed_so(tokenizer, policy, draft, sampling):
    streamer = Recorder()
    output = ask(tokenizer, policy, draft=draft, streamer=streamer, **sampling)
    tokens = check(policy, output)
    assert streamer.tokens == [10, *tokens]
    assert streamer.num_ends == 1
    assert tokens[:3] == [11, 12, 13]
    assert output.events[0][0].position == 4


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", OUTCOMES)
def test_every_row_of_a_batch_goes_its_own_way(tokenizer, policy, sampling):
    prompts = [[10], [16], [12]]
    output = ask(tokenizer, policy, draft=SCRIPT, prompt=prompts, **sampling)
    assert tokens_of(output, 1) == list(range(17, 26))
    assert output.events[1] == []
    assert check(policy, output, 0)[:3] == [11, 12, 13]
    check(policy, output, 2)


@pytest.mark.parametrize("end", [{}, {"eos_token_id": 39}])
@pytest.mark.parametrize("policy", GUARDING)
@pytest.mark.parametrize("keep_reflection", [False, True])
def test_nothing_flagged_is_returned_however_little_room_there_is(tokenizer, policy, end, keep_reflection):
    if policy == "recover_unreflected" and keep_reflection:
        pytest.skip("a contradiction")
    for most in range(1, 9):
        arguments = {"max_new_tokens": most, "rollback_segments": 1, "keep_reflection": keep_reflection, **end}
        output = ask(tokenizer, policy, {10 + most: 0.9}, **arguments)
        assert 10 + most not in tokens_of(output)
        assert len(tokens_of(output)) <= most


def test_recover_single_samples_one_candidate_in_an_attempt(tokenizer):
    output = ask(tokenizer, "recover_single", {15: 0.9, 20: 0.9}, max_recoveries=20, flagged_token_penalty=3.0)
    assert {event.num_candidates for event in output.events[0]} == {1}


def test_recover_unreflected_shows_the_target_no_reflection(tokenizer):
    output = ask(tokenizer, "recover_unreflected")
    assert THINK not in {token for context in output.model.contexts for token in context}


def test_refuse_is_what_no_recoveries_are(tokenizer):
    outputs = [ask(tokenizer, "refuse"), ask(tokenizer, "recover", max_recoveries=0)]
    assert tokens_of(outputs[0]) == tokens_of(outputs[1]) == [11, 12, 13, BLANK_LINE, NO, THANKS]
    assert outputs[0].events == outputs[1].events
    assert outputs[0].statistics.num_target_forwards == outputs[1].statistics.num_target_forwards


@pytest.mark.parametrize(("rollback_segments", "kept"), [(0, 3), (1, 0)])
def test_stop_ends_the_answer_before_what_is_rolled_back_and_adds_nothing(tokenizer, rollback_segments, kept):
    output = ask(tokenizer, "stop", rollback_segments=rollback_segments, eos_token_id=39)
    assert tokens_of(output) == [11, 12, 13][:kept]
    (event,) = output.events[0]
    assert (event.outcome, event.rolled_back_to, event.num_candidates) == ("stopped", kept, 0)
    assert output.statistics.num_new_tokens == kept
    assert output.risks.shape == output.provenance.shape == (1, kept)


class AllLonger(StoppingCriteria):
    """Stops a row that is so long; no criterion of transformers, so it is asked about the whole batch."""

    def __init__(self, num):
        self.num = num

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] > self.num)


def test_rows_that_stopped_empty_leave_the_criteria_of_a_batch_at_work(tokenizer):
    criteria = StoppingCriteriaList([AllLonger(6)])
    output = ask(tokenizer, "stop", {15: 0.9, 11: 0.9}, prompt=[[10], [16], [14]], stopping_criteria=criteria)
    assert output.finish_reasons == ["safety_stop", "stop", "safety_stop"]
    assert output.sequences[:, 1:].tolist() == [[0] * 6, list(range(17, 23)), [0] * 6]


def test_observe_reports_position_and_risk_of_all_that_is_flagged(tokenizer):
    output = ask(tokenizer, "observe", {12: 0.6, 15: 0.9, 18: math.nan, 19: 0.9})
    assert tokens_of(output) == list(range(11, 20))
    events = [(event.position, round(event.risk, 6), event.rolled_back_to) for event in output.events[0]]
    # 19 has been read by no forward, and is worth none of its own
    assert events[:2] == [(1, 0.6, 2), (4, 0.9, 5)]
    assert (events[2][0], math.isnan(events[2][1]), len(events)) == (7, True, 3)
    assert (output.statistics.num_flags, output.statistics.num_discarded_tokens) == (3, 0)
    assert output.statistics.num_target_forwards == output.statistics.num_rounds == 9


def test_observe_scores_the_last_token_where_that_is_asked_for(tokenizer):
    output = ask(tokenizer, "observe", {19: 0.9}, score_last_token=True)
    assert tokens_of(output) == list(range(11, 20))
    assert [event.position for event in output.events[0]] == [8]


def test_observe_reports_nothing_that_comes_after_the_end(tokenizer):
    for end in ({"eos_token_id": 13}, {"stop_strings": ["w13"]}):
        output = ask(tokenizer, "observe", {14: 0.9, 15: 0.9}, draft=SCRIPT, **end)
        assert tokens_of(output) == [11, 12, 13]
        assert output.events == [[]]


def test_observe_streams_every_token_at_once(tokenizer):
    streamer, num_streamed = Recorder(), []

    class Look(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            num_streamed.append((input_ids.shape[1], len(streamer.tokens)))
            return torch.tensor([False])

    ask(tokenizer, "observe", streamer=streamer, stopping_criteria=StoppingCriteriaList([Look()]))
    assert num_streamed == [(length, length - 1) for length in range(2, 10)]


PROMPTS = torch.tensor([[12, 18, 24, 13], [0, 0, 31, 17]])
ENDS = {"length": {}, "eos": {"eos_token_id": [14, 33]}, "criterion": {"stopping_criteria": [AllLonger(11)]}}


def head_off(model, policy, ids, assistant_model=None, **arguments):
    unguarded = GuardedCall(policy, assistant_model, is_monitored=False)
    return model.generate(ids, custom_generate=unguarded, return_dict_in_generate=True, **arguments)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("num_rows", [1, 2])
def test_observed_tokens_are_those_of_a_call_without_a_head(tokenizer, num_rows, source, sampling, end):
    model = build_model()
    attach(model, tokenizer, build_noisy_head(model))
    ids, policy = PROMPTS[:num_rows], dataclasses.replace(POLICY, policy="observe")
    arguments = {"max_new_tokens": 24, "attention_mask": ids.ne(0).long(), **sampling, **drafting(source, model)}
    arguments |= ENDS[end]
    torch.manual_seed(3)
    expected = head_off(model, policy, ids, **arguments)
    torch.manual_seed(3)
    output = model.generate(ids, safespec=policy, return_dict_in_generate=True, **arguments)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.finish_reasons == expected.finish_reasons
    assert output.statistics.num_target_forwards == expected.statistics.num_target_forwards
    is_flagged = output.risks >= model.safety.risk_threshold
    assert is_flagged.any()
    assert [[event.position for event in events] for events in output.events] == [
        row.nonzero().flatten().tolist() for row in is_flagged
    ]


def test_observe_says_that_nothing_is_guarded(tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(call.logger, "warning_once", said.append)
    ask(tokenizer, "observe")
    ask(tokenizer, "recover")
    assert len(said) == 1
    assert said[0].startswith("Nothing is guarded")


def test_a_model_that_is_always_guarded_can_not_be_observed_only(tokenizer):
    model = ScriptedModel(SCRIPT)
    observe = SafeSpecConfig(policy="observe")
    with pytest.raises(UnsupportedRequestError, match="'observe'` guards nothing"):
        attach(model, tokenizer, probe(model), always=True, policy=observe)
    attach(model, tokenizer, probe(model), always=True)
    with pytest.raises(UnsupportedRequestError, match="'observe'` guards nothing"):
        model.generate(torch.tensor([[10]]), max_new_tokens=2, safespec=observe)
