"""The state of requests, under everything that an engine does to them."""

import math

import numpy as np
import pytest
import tiny
import torch
from fake_engine import MAX_LEN, RESERVED, SECRET, FakeEngine, drive, make_guard

from safespec_hf.answer.pooling import pool_block
from safespec_hf.answer.segments import Segments, find_boundaries
from safespec_hf.vllm import state
from safespec_hf.vllm.entries import StepRow, close_logits
from safespec_hf.vllm.spec import LOST_STATE, GuardOrder
from safespec_hf.vllm.state import MAX_STATE_BYTES, RiskStates

GREEDY = {"temperature": 0.0, "max_tokens": 24}
SETTINGS = {
    "plain": {},
    "chunked": {"chunk": 3},
    "drafts": {"num_drafts": 3},
    "preempted": {"preempts": True},
    "all": {"num_drafts": 3, "preempts": True, "chunk": 5},
}


def prompts(num, length=7):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(10, 39, (num, length), generator=generator).tolist()


def own_risks(model, head, tokenizer, policy, prompt, tokens):
    """Of our own forward over the same tokens."""
    with torch.no_grad():
        states = model(torch.tensor([prompt + tokens]), output_hidden_states=True).hidden_states
    hidden = torch.cat([states[layer][0, len(prompt) :] for layer in head.config.hidden_layers], dim=-1)
    counts = range(len(tokens))
    if head.config.span == "segment":
        segments = Segments(policy, *find_boundaries(tokenizer))
        counts = segments.counts_ahead(tokens)
    with torch.no_grad():
        return head.risk(pool_block(None, hidden, counts, head.config.pooling, head.config.ewma_decay)).tolist()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "config",
    [{"pooling": "mean+ewma", "span": "answer", "hidden_layers": [1, 2]}, {"pooling": "mean", "span": "segment"}],
    ids=["answer", "segment"],
)
def test_risks_are_those_of_our_own_forward(target, tokenizer, setting, config):
    head = tiny.build_head(target, **config)
    guard = make_guard(head, tokenizer, max_segment_tokens=6)
    engine = FakeEngine(target, head, tokenizer, **SETTINGS[setting])
    given = prompts(4)
    results = drive(engine, [guard.request(f"a{index}", prompt, GREEDY) for index, prompt in enumerate(given)])
    for prompt, result in zip(given, results, strict=True):
        expected = own_risks(target, head, tokenizer, guard.policy, prompt, result.token_ids)
        known = [(risk, other) for risk, other in zip(result.risks, expected, strict=True) if not math.isnan(risk)]
        assert result.failure is None
        assert len(known) >= len(result.token_ids) - 1
        assert max((abs(risk - other) for risk, other in known), default=0) < 1e-5  # the same sums in another order
    assert engine.states.report()["num_entries"] == engine.states.report()["num_running"] == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_silent_head_changes_no_token(target, never, tokenizer, setting):
    guard, given = make_guard(never, tokenizer), prompts(4)
    engine = FakeEngine(target, never, tokenizer, **SETTINGS[setting])
    results = drive(engine, [guard.request(f"a{index}", prompt, GREEDY) for index, prompt in enumerate(given)])
    for prompt, result in zip(given, results, strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            while len(tokens) < len(prompt) + 24 and (len(tokens) == len(prompt) or tokens[-1] != 2):
                scores = target(torch.tensor([tokens])).logits[0, -1]
                scores[RESERVED] = -torch.inf  # no answer has it
                tokens.append(int(scores.argmax()))
        assert result.token_ids == tokens[len(prompt) :]


def make_states(head, tokenizer, **options):
    boundaries = find_boundaries(tokenizer)
    return RiskStates(head, boundaries, reserved_id=RESERVED, secret=SECRET, block_size=4, **options)


def order(key="a", **fields):
    return GuardOrder(**{"key": key, "group": key, "secret": SECRET, "start": 2, "threshold": 0.5, **fields}).to_text()


def row(request, tokens, start=0, num_drafts=0):
    return StepRow(request, start, len(tokens) - start, num_drafts, np.array(tokens, np.int32))


def step(states, *rows):
    num = sum(one.num_tokens for one in rows)
    size = states.head.config.num_features // len(states.head.config.pooling.split("+"))
    return states.step(rows, torch.ones(num, size), sum(1 + one.num_drafts for one in rows)).is_forced_R.tolist()


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        (None, "without an order"),
        ("{}", "without an order"),
        ("[]", "without an order"),
        (order(secret="guessed"), "not one of ours"),
        (order(threshold=2.0), "without an order"),
        (order(threshold=math.nan), "without an order"),
    ],
)
def test_a_request_whose_order_cant_be_believed_gets_nothing(never, tokenizer, text, failure):
    states = make_states(never, tokenizer)
    states.add("r", text)
    assert step(states, row("r", [11, 12])) == [True]
    assert failure in str(states.report()["failures"])


def test_a_request_that_nobody_announced_gets_nothing(never, tokenizer):
    assert step(make_states(never, tokenizer), row("r", [11, 12])) == [True]


def test_a_key_used_twice_stops_the_second_request_and_leaves_the_first_alone(never, tokenizer):
    states = make_states(never, tokenizer)
    states.add("first", order("a"))
    states.add("second", order("a", threshold=1.0))
    assert step(states, row("first", [11, 12]), row("second", [11, 12])) == [False, True]
    assert states.take(["a"])["a"]["failure"] is None


def test_a_released_request_is_stopped(never, tokenizer):
    states = make_states(never, tokenizer)
    states.add("r", order())
    assert states.release(["a"]) == 0
    assert step(states, row("r", [11, 12])) == [True]


def test_so_is_one_that_comes_after_its_answer_was_released(never, tokenizer):
    states = make_states(never, tokenizer)
    states.release(["a"])
    states.add("r", order())
    assert step(states, row("r", [11, 12])) == [True]
    states.finish(["r"])
    assert states.report()["num_entries"] == 0


def test_what_another_request_read_in_a_place_does_not_pass_for_read(never, tokenizer):
    states, tokens = make_states(never, tokenizer), [11, 12, 13, 14, 15, 16]
    states.add("first", order("a"))
    step(states, row("first", tokens))
    states.finish(["first"])
    states.add("second", order("b", group="a"))
    assert step(states, row("second", tokens, start=4)) == [False]
    assert states.take(["a", "b"])["b"]["tokens"] == [-1, -1, 15, 16]
    assert states.take(["a"])["a"]["tokens"] == tokens[2:]


def test_of_many_requests_those_that_have_ended_are_forgotten_first(never, tokenizer, monkeypatch):
    monkeypatch.setattr(state, "MAX_FINISHED", 2)
    states = make_states(never, tokenizer)
    for name in "abcde":
        states.add(name, order(name))
        step(states, row(name, [11, 12, 13]))
    states.finish("bcde")
    assert set(states.take("abcde")) == {"a", "d", "e"}


def test_a_risk_that_is_no_number_is_flagged(never, tokenizer):
    states = make_states(never, tokenizer)
    states.add("r", order(threshold=1.0))
    torch.nn.init.constant_(never.mlp[-1].bias, torch.nan)
    assert step(states, row("r", [11, 12, 13])) == [True]


def test_what_is_only_observed_is_never_stopped(never, tokenizer):
    states = make_states(never, tokenizer)
    states.add("r", order(threshold=None))
    torch.nn.init.constant_(never.mlp[-1].bias, 100.0)
    assert step(states, row("r", [11, 12, 13])) == [False]


def test_only_rows_after_the_flagged_draft_are_closed(target, tokenizer):
    head = tiny.build_head(target, pooling="last")
    states = make_states(head, tokenizer, num_drafts=2)
    states.add("r", order(threshold=0.5))
    hidden = torch.zeros(4, 32)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.mlp[0].weight[0, 0] = head.mlp[-1].weight[0, 0] = 1.0
        head.mlp[-1].bias.fill_(-1.0)
    hidden[2, 0] = 9.0  # the first of two drafts
    assert states.step([row("r", [11, 12, 13, 14], num_drafts=1)], hidden, 2).is_forced_R.tolist() == [True, True]
    states.add("s", order("b", threshold=0.5))
    marks = states.step([row("s", [11, 12, 13, 14, 15], num_drafts=2)], torch.cat([hidden[:2] * 0, hidden[1:]]), 3)
    assert marks.is_forced_R.tolist() == [False, True, True]


@pytest.mark.parametrize("breaks_loops", [True, False])
def test_a_loop_is_ended_where_that_is_asked_for_and_after_drafts_as_well(never, tokenizer, breaks_loops):
    states = make_states(never, tokenizer, num_drafts=2)
    # after the prompt comes position 2; the last draft stands at 14, and 15 is after it
    states.add("r", order(threshold=1.0, breaks_loops=breaks_loops, banned=[[15, 20], [3, 21]]))
    loop = [10, 10, *[11, 12, 13, 14] * 3, 11]  # the first two are the prompt, the last two drafts
    size = never.config.num_features // len(never.config.pooling.split("+"))
    marks = states.step([row("r", loop, num_drafts=2)], torch.zeros(len(loop), size), 3)
    logits = close_logits(torch.zeros(3, tiny.VOCAB_SIZE), marks, RESERVED)
    banned = [scores.isneginf().nonzero().flatten().tolist() for scores in logits]
    assert (
        banned == [[RESERVED], [RESERVED, 11], [RESERVED, 12, 20]]
        if breaks_loops
        else [[RESERVED]] * 2 + [[RESERVED, 20]]
    )


def test_a_rejected_draft_leaves_no_flag_behind(target, tokenizer):
    head = tiny.build_head(target, pooling="last")
    states = make_states(head, tokenizer, num_drafts=1)
    states.add("r", order(threshold=0.5))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.mlp[0].weight[0, 0] = head.mlp[-1].weight[0, 0] = 1.0
        head.mlp[-1].bias.fill_(-1.0)
    hidden = torch.zeros(4, 32)
    hidden[3, 0] = 9.0
    assert states.step([row("r", [11, 12, 13, 14], num_drafts=1)], hidden, 2).is_forced_R.tolist() == [False, True]
    assert states.step([row("r", [11, 12, 13, 15], start=3)], torch.zeros(1, 32), 1).is_forced_R.tolist() == [False]
    assert states.take(["a"])["a"]["tokens"] == [13, 15]


def test_an_answer_that_was_read_elsewhere_is_stopped(never, tokenizer):
    states = make_states(never, tokenizer)
    states.add("r", order())
    assert step(states, row("r", [11, 12, 13, 14, 15, 16], start=4)) == [True]
    assert states.take(["a"])["a"]["failure"] == LOST_STATE


def test_a_request_goes_on_from_what_another_of_the_same_step_leaves(never, tokenizer):
    states = make_states(never, tokenizer)
    tokens = [11, 12, 13, 14, 15, 16]
    for name in ("late", "first"):
        states.add(name, order(name, group="a"))
    assert step(states, row("late", tokens, start=4), row("first", tokens)) == [False, False]


def test_other_rows_of_logits_than_expected_stop_everything(never, tokenizer):
    states = make_states(never, tokenizer)
    states.add("r", order())
    assert states.step([row("r", [11, 12])], torch.ones(2, 32), 3).is_forced_R.tolist() == [True] * 3
    assert step(states, row("r", [11, 12, 13], start=2)) == [True]


def test_what_goes_on_after_a_stop_stays_stopped(never, tokenizer):
    states = make_states(never, tokenizer)
    states.add("r", order())
    assert step(states, row("r", [11, 12, 13, RESERVED])) == [True]
    assert step(states, row("r", [11, 12, 13, RESERVED, 14], start=4)) == [True]


def test_state_stays_within_its_bound(tokenizer):
    wide = tiny.build_model(hidden_size=288, num_hidden_layers=3)
    head = tiny.build_head(wide, pooling="mean+ewma", span="answer", hidden_layers=[1, 2, 3])
    states = make_states(head, tokenizer)
    states.add("r", order(threshold=1.0))
    step(states, row("r", list(range(4, 4 + MAX_LEN))))
    assert 4 * head.config.num_features * 2 < states.report()["largest_state_bytes"] <= MAX_STATE_BYTES
