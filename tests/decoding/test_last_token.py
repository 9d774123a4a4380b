"""The last token of an answer is scored like any other, whatever ended the answer."""

import math

import pytest
import torch
from scripted import answer, count_up, risks_of, tokens_of
from tiny import NO, build_head, build_model
from transformers import StoppingCriteria, StoppingCriteriaList

from safespec_hf import attach_safety_head


class EndsWith(StoppingCriteria):
    """Stops after a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


ENDS = {
    "length": {},
    "stop string": {"stop_strings": ["w19"]},
    "criterion": {"stopping_criteria": StoppingCriteriaList([EndsWith(19)])},
    "eos": {"eos_token_id": 19},
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("wish", [None, True, False])
def test_the_last_token_is_scored_unless_an_end_token_ended_the_answer(tokenizer, wish, end):
    length = 9 if end == "length" else 12
    output = answer(tokenizer, score_last_token=wish, max_new_tokens=length, **ENDS[end])
    is_scored = wish is True or (wish is None and end != "eos")
    assert tokens_of(output) == list(range(11, 20))
    assert math.isnan(risks_of(output)[-1]) is not is_scored
    assert output.statistics.num_target_forwards == 9 + is_scored


@pytest.mark.parametrize("draft", [None, count_up])
@pytest.mark.parametrize("end", ENDS)
def test_an_unsafe_last_token_is_taken_back_when_it_is_scored(tokenizer, draft, end):
    arguments = {"score_last_token": True, "candidate_source": "target", **ENDS[end]}
    output = answer(tokenizer, {19: 0.9}, draft=draft, **arguments)
    assert output.events[0][0].position == 8
    assert 19 not in tokens_of(output)
    assert not any(math.isnan(risk) for risk in risks_of(output))


@pytest.mark.parametrize("num_at_a_time", [1, 2, 3, 5])
@pytest.mark.parametrize("draft", [None, count_up])
def test_an_unsafe_text_does_not_come_out_piece_by_piece(tokenizer, draft, num_at_a_time):
    for start in range(10, 14):
        arguments = {"max_new_tokens": num_at_a_time, "max_recoveries": 0, "prompt": range(10, start + 1)}
        output = answer(tokenizer, {start + num_at_a_time: 0.9}, draft=draft, **arguments)
        assert start + num_at_a_time not in tokens_of(output, prompt=start - 9)
        assert output.finish_reasons == ["safety_refusal"]


@pytest.mark.parametrize("wish", [None, True, False])
@pytest.mark.parametrize("end", [{}, {"stopping_criteria": StoppingCriteriaList([EndsWith(11)])}])
def test_an_answer_of_one_token_is_always_scored(tokenizer, wish, end):
    output = answer(tokenizer, {11: 0.9}, score_last_token=wish, max_new_tokens=1, max_recoveries=0, **end)
    assert tokens_of(output) == [NO]


@pytest.mark.parametrize("keep_reflection", [False, True])
def test_a_flagged_last_token_never_comes_back_however_little_room_there_is(tokenizer, keep_reflection):
    for most in range(1, 8):
        arguments = {"max_new_tokens": most, "keep_reflection": keep_reflection, "rollback_segments": 1}
        output = answer(tokenizer, {10 + most: 0.9}, **arguments)
        assert output.events[0]
        assert 10 + most not in tokens_of(output)
        assert 1 <= len(tokens_of(output)) <= most


def test_a_last_token_without_a_position_is_not_read(tokenizer):
    model, prompt = build_model("gpt2", n_positions=16), torch.arange(10, 26)[None]
    expected = model.generate(prompt, max_new_tokens=1, do_sample=False)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    output = model.generate(prompt, max_new_tokens=1, do_sample=False, safespec=True, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    assert output.risks.isnan().all()
