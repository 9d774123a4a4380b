"""Steering is a pure function of its arguments; processors run row by row on what the caller would see."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from safespec_hf import Provenance, SafeSpecConfig, SafeSpecLogitsProcessor
from safespec_hf.answer.logits import penalize, process_guesses, split_processors
from safespec_hf.answer.rows import Row


def make_row(prompt, processors=()):
    ids = torch.tensor(prompt)
    return Row(
        0,
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        max_new_tokens=8,
        policy=SafeSpecConfig(),
        processors=LogitsProcessorList(processors),
    )


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_steering_is_silent_at_every_other_length(length):
    scores = torch.randn(2, 6)
    steered = SafeSpecLogitsProcessor(3, [1, 4])(torch.zeros(2, length, dtype=torch.long), scores)
    assert torch.equal(steered, scores)


@pytest.mark.parametrize("penalty", [0.0, 1.5, math.inf])
def test_steering_takes_the_penalty_off_flagged_tokens_only(penalty):
    steered = SafeSpecLogitsProcessor(2, [1, 3, 1], penalty)(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 4))
    assert steered.tolist() == [[1.0, 1.0 - penalty, 1.0, 1.0 - penalty]]


def test_steering_leaves_its_input_alone_and_gives_the_same_answer_twice():
    scores, ids = torch.ones(1, 4), torch.zeros(1, 2, dtype=torch.long)
    steer = SafeSpecLogitsProcessor(2, [0])
    assert torch.equal(steer(ids, scores), steer(ids, scores))
    assert torch.equal(scores, torch.ones(1, 4))


@pytest.mark.parametrize("penalty", [-1.0, math.nan])
def test_steering_refuses_a_penalty_that_is_not_one(penalty):
    with pytest.raises(ValueError, match=f"must be >= 0, but it is {penalty}"):
        SafeSpecLogitsProcessor(2, [0], penalty)


def test_each_row_is_processed_on_its_own_tokens():
    rows = [
        make_row([1], [RepetitionPenaltyLogitsProcessor(2.0)]),
        make_row([3], [RepetitionPenaltyLogitsProcessor(4.0)]),
    ]
    scores = process_guesses(rows, [rows[0].visible_ids([2]), rows[1].visible_ids()], torch.ones(2, 4))
    assert scores.tolist() == [[1.0, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 0.25]]


def test_processors_do_not_see_a_hidden_reflection():
    row = make_row([1], [RepetitionPenaltyLogitsProcessor(2.0)])
    row.append(2, Provenance.REFLECTION)
    assert process_guesses([row], [row.visible_ids()], torch.ones(1, 4)).tolist() == [[1.0, 0.5, 1.0, 1.0]]


def test_processing_never_writes_into_the_logits():
    logits = torch.ones(1, 4)
    process_guesses([make_row([1])], [torch.tensor([[1]])], logits).zero_()
    assert torch.equal(logits, torch.ones(1, 4))


def test_scores_are_float32_as_in_plain_generate():
    assert process_guesses([make_row([1])], [torch.tensor([[1]])], torch.ones(1, 4).bfloat16()).dtype == torch.float32


def test_what_comes_last_and_looks_at_scores_only_serves_all_positions_at_once():
    warm, penalty, top = TemperatureLogitsWarper(0.5), RepetitionPenaltyLogitsProcessor(2.0), TopKLogitsWarper(2)
    of_context, of_scores = split_processors(LogitsProcessorList([warm, penalty, top]))
    assert (list(of_context), list(of_scores)) == ([warm, penalty], [top])

    class Derived(TopKLogitsWarper):
        """May look at more."""

    derived = Derived(2)
    assert split_processors(LogitsProcessorList([warm, derived])) == ([warm, derived], [])


def test_a_ban_holds_for_a_score_that_is_infinite():
    scores = torch.tensor([[torch.inf, 1.0, -torch.inf]])
    assert penalize(scores, [0, 2]).tolist() == [[-math.inf, 1.0, -math.inf]]


@pytest.mark.parametrize("token", [-1, -3, 3, 99])
def test_a_ban_on_what_is_no_token_bans_nothing(token):
    assert penalize(torch.zeros(1, 3), [token]).tolist() == [[0.0] * 3]
    assert penalize(torch.zeros(1, 3), [token, 0]).tolist() == [[-math.inf, 0.0, 0.0]]
