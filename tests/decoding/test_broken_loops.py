"""What a recovery took off its own words must not loop; what no recovery touched may."""

import math

import pytest
import torch
from scripted import answer, count_after, outcomes_of, tokens_of
from tiny import THINK

from safespec_hf.answer.bans import looping_tokens

# 15 is unsafe. After the reflection the target goes round and round from 30 to 33; 36 comes after it for a change.
LOOP = {THINK: 30, 33: {30: 0.9, 36: 0.1}}
SCRIPT, ROUND = count_after(LOOP), [30, 31, 32, 33]
DRAFTS = pytest.mark.parametrize(
    "fields",
    [{}, {"draft": SCRIPT}, {"draft": count_after({THINK: 30, 33: 36})}, {"prompt_lookup_num_tokens": 4}],
    ids=["no draft", "a draft that loops", "a draft that does not", "lookup"],
)


def ask(tokenizer, risks=None, **fields):
    return answer(tokenizer, {15: 0.9} if risks is None else risks, script=SCRIPT, max_new_tokens=24, **fields)


@DRAFTS
def test_a_passage_does_not_come_a_fourth_time(tokenizer, fields):
    output = ask(tokenizer, **fields)
    assert outcomes_of(output) == ["recovered"]
    assert tokens_of(output)[:18] == [11, 12, 13, *ROUND * 3, 36, 37, 38]


@DRAFTS
def test_unless_loops_are_wanted(tokenizer, fields):
    assert tokens_of(ask(tokenizer, break_loops=False, **fields)) == [11, 12, 13, *ROUND * 5, 30]


@pytest.mark.parametrize("fields", [{}, {"policy": "observe", "false_alarm_margin": 0.5}], ids=["safe", "observed"])
def test_an_answer_without_a_recovery_is_left_alone(tokenizer, fields):
    output = ask(tokenizer, {31: 0.9} if fields else {}, prompt=(29,), **fields)
    assert tokens_of(output) == ROUND * 6


def test_so_is_one_whose_prompt_was_flagged_in_error(tokenizer):
    output = ask(tokenizer, {29: 0.9}, prompt=(29,), head={"prompt_threshold": 0.5}, false_alarm_margin=0.5)
    assert outcomes_of(output) == ["dismissed"]
    assert tokens_of(output) == ROUND * 6


def test_after_a_dismissed_flag_of_the_answer_loops_are_stopped_as_well(tokenizer):
    script = count_after({**LOOP, 13: {14: 0.9, 30: 0.1}})
    fields = {"script": script, "max_new_tokens": 24, "false_alarm_margin": 0.5, "flagged_token_penalty": math.inf}
    output = answer(tokenizer, {14: 0.3, 15: 0.9}, **fields)
    assert outcomes_of(output) == ["dismissed"]
    assert tokens_of(output)[:18] == [11, 12, 13, *ROUND * 3, 36, 37, 38]


def test_rows_of_a_batch_are_stopped_where_they_would_be_alone(tokenizer):
    prompts = ([10], [29], [12])
    alone = [ask(tokenizer, prompt=prompt) for prompt in prompts]
    batch = ask(tokenizer, prompt=prompts)
    assert [tokens_of(batch, row) for row in range(3)] == [tokens_of(one) for one in alone]
    assert tokens_of(batch, 1) == ROUND * 6


@DRAFTS
def test_nor_is_the_token_drawn_that_would_go_on(tokenizer, fields):
    for seed in range(3):
        torch.manual_seed(seed)
        tokens = tokens_of(ask(tokenizer, do_sample=True, top_k=0, **fields))
        assert not any(tokens[at : at + 16] == ROUND * 4 for at in range(len(tokens)))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([7] * 11, []),
        ([7] * 12, [7]),
        ([1, 2] * 6, [1]),
        ([1, 2] * 6 + [1], [2]),  # wherever the passage is cut
        ([9, *range(5), *range(5), *range(5)], [0]),
        ([9, *range(5), *range(5)], []),
        ([*range(24)] * 3, [0]),
        ([*range(25)] * 3, []),  # a long one may be a refrain
        ([1, 1, 1, 2] * 3, [1]),
    ],
    ids=str,
)
def test_a_loop_is_a_passage_that_comes_three_times_in_a_row(tokens, expected):
    assert looping_tokens(tokens) == expected


def test_a_token_is_never_banned_where_nothing_else_is_possible(tokenizer):
    in_order = {**{token: [token + 1] for token in range(40)}, 13: [14, 30], 33: [30]}
    allowed = {"prefix_allowed_tokens_fn": lambda _, ids: in_order[int(ids[-1])]}
    output = ask(tokenizer, flagged_token_penalty=math.inf, **allowed)
    assert tokens_of(output) == [11, 12, 13, *ROUND * 5, 30]
