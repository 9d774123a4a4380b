"""The first flag of an answer is put to the test, by candidates that read no reflection."""

import math

import pytest
import torch
from scripted import TURNS, answer, count_after, has_reflected, outcomes_of, tokens_of

from safespec_hf import Provenance

# 15 is unsafe, and 14 not harmless. Without the reflection candidates go on with 30, or with 35, instead of 14.
SCRIPT = count_after({**TURNS, 13: {14: 0.9, 30: 0.06, 35: 0.04}})
SOURCES = pytest.mark.parametrize("draft", [None, count_after(TURNS)], ids=["target", "draft"])


def ask(tokenizer, risks=None, **fields):
    fields = {"script": SCRIPT, "flagged_token_penalty": math.inf, "false_alarm_margin": 0.5, **fields}
    return answer(tokenizer, {14: 0.3, 15: 0.9, **(risks or {})}, **fields)


@SOURCES
def test_where_every_candidate_is_harmless_the_answer_goes_on_without_a_reflection(tokenizer, draft):
    output = ask(tokenizer, {31: 0.25}, draft=draft)
    (event,) = output.events[0]
    assert (event.outcome, event.num_candidates, event.rolled_back_to) == ("dismissed", 8, 3)
    assert (event.num_safe_candidates, event.num_unsafe_candidates) == (8, 0)
    assert tokens_of(output) in ([11, 12, 13, *range(30, 36)], [11, 12, 13, *range(35, 40), 0])
    assert not has_reflected(output)


def test_the_likeliest_of_them_is_taken_and_not_the_safest(tokenizer):
    output = ask(tokenizer, {31: 0.2}, num_candidates=16)
    (event,) = output.events[0]
    assert event.candidate_risks[event.chosen] == pytest.approx(0.2)
    assert min(event.candidate_risks) < 0.15  # there was a safer one
    assert tokens_of(output)[3:6] == [30, 31, 32]


@pytest.mark.parametrize(
    ("turns", "rest"), [({39: 0.0999, 30: 1e-4}, [30, 31, 32]), ({39: 0.1}, [39])], ids=["some", "all"]
)
def test_one_that_ends_before_the_flagged_token_is_taken_only_if_all_do(tokenizer, turns, rest):
    fields = {"min_segment_tokens": 1, "test_temperature": 4.0, "num_candidates": 32, "eos_token_id": 39}
    output = ask(tokenizer, script=count_after({**TURNS, 13: {14: 0.9, **turns}}), **fields)
    (event,) = output.events[0]
    assert event.outcome == "dismissed"
    assert tokens_of(output)[3:6] == rest
    assert max(event.candidate_log_probs) == pytest.approx(math.log(0.1), rel=1e-3)  # that of an early end


@SOURCES
@pytest.mark.parametrize("risk", [0.26, 0.9, math.nan])
def test_one_that_is_not_harmless_confirms_the_flag_and_the_reflection_follows(tokenizer, draft, risk):
    output = ask(tokenizer, {31: risk, 35: 0.1}, num_candidates=16, draft=draft, min_segment_tokens=1)
    assert outcomes_of(output)[:2] == ["confirmed", "recovered"]
    assert has_reflected(output)
    event = output.events[0][0]
    assert event.chosen is None
    assert not any(token in tokens_of(output) for token in (15, 31)[: 1 + (not risk < 0.5)])


@pytest.mark.parametrize(("margin", "outcome"), [(0.0, "dismissed"), (0.39, "dismissed"), (0.41, "confirmed")])
def test_how_harmless_that_is_is_a_share_of_the_threshold(tokenizer, margin, outcome):
    risks = dict.fromkeys((30, 35), 0.3)
    assert outcomes_of(ask(tokenizer, risks, false_alarm_margin=margin))[0] == outcome


@pytest.mark.parametrize("fields", [{"false_alarm_margin": None}, {"num_candidates": 1}], ids=str)
def test_without_a_margin_or_with_a_single_candidate_nothing_is_tested(tokenizer, fields):
    output = ask(tokenizer, **fields)
    assert outcomes_of(output)[0] == "recovered"
    assert has_reflected(output)


def test_only_the_first_flag_is_tested(tokenizer):
    output = ask(tokenizer, {33: 0.9, 38: 0.9}, max_new_tokens=12)
    assert outcomes_of(output)[:2] == ["dismissed", "recovered"]
    assert has_reflected(output)


@pytest.mark.parametrize("most", [1, 2])
def test_a_dismissed_flag_counts_as_a_recovery_and_a_confirmed_one_does_not(tokenizer, most):
    output = ask(tokenizer, {33: 0.9, 38: 0.9}, max_new_tokens=12, max_recoveries=most)
    assert outcomes_of(output)[:2] == ["dismissed", "refused" if most == 1 else "recovered"]
    assert outcomes_of(ask(tokenizer, dict.fromkeys((30, 35), 0.4), max_recoveries=most)) == ["confirmed", "recovered"]


def test_a_policy_without_recoveries_tests_nothing(tokenizer):
    output = ask(tokenizer, max_recoveries=0)
    assert outcomes_of(output) == ["refused"]
    assert output.statistics.num_candidates == 0


def test_a_test_ends_as_soon_as_one_candidate_is_not_harmless(tokenizer):
    early = ask(tokenizer, dict.fromkeys((30, 35), 0.4), max_segment_tokens=3)
    late = ask(tokenizer, dict.fromkeys((32, 37), 0.4), max_segment_tokens=3)
    assert outcomes_of(early)[0] == outcomes_of(late)[0] == "confirmed"
    assert early.statistics.num_target_forwards == late.statistics.num_target_forwards - 2
    # of candidates that were given up while they were safe nothing is known
    assert (early.events[0][0].num_safe_candidates, early.events[0][0].num_unsafe_candidates) == (0, 0)


def test_candidates_of_a_test_come_in_batches_until_one_is_not_harmless(tokenizer):
    output = ask(tokenizer, candidates_per_batch=3)
    assert output.events[0][0].num_candidates == output.statistics.num_candidates == 8
    assert output.statistics.num_candidate_batches == 3
    output = ask(tokenizer, dict.fromkeys((30, 35), 0.4), candidates_per_batch=3)
    assert output.events[0][0].num_candidates == 3


def test_rows_of_a_batch_are_tested_as_they_would_be_alone(tokenizer):
    alone = [ask(tokenizer, prompt=[start]) for start in (10, 16, 12)]
    batch = ask(tokenizer, prompt=[[10], [16], [12]])
    assert [tokens_of(batch, row) for row in range(3)] == [tokens_of(one) for one in alone]
    assert batch.events == [one.events[0] for one in alone]


def test_a_test_has_a_temperature_of_its_own(tokenizer):
    fields = {"num_candidates": 16, "max_segment_tokens": 3}
    cold = ask(tokenizer, test_temperature=1e-3, recovery_temperature=50.0, **fields)
    assert len(set(cold.events[0][0].candidate_log_probs)) == 1
    assert len(set(ask(tokenizer, test_temperature=1.0, **fields).events[0][0].candidate_log_probs)) > 1
    # once the flag is confirmed it is that of recoveries
    hot = ask(tokenizer, dict.fromkeys((30, 35), 0.4), test_temperature=1e-3, recovery_temperature=50.0, **fields)
    assert [event.outcome for event in hot.events[0]][:1] == ["confirmed"]
    assert len(set(hot.events[0][1].candidate_log_probs)) > 1


# here 15 alone is unsafe; instead of it 25 may follow
SPIKE = count_after({**TURNS, 13: {14: 0.9, 30: 0.1}, 14: {15: 0.9, 25: 0.1}})
DRAFTS = pytest.mark.parametrize(
    "drafts",
    [{}, {"draft": SPIKE}, {"draft": count_after({14: 25})}, {"prompt_lookup_num_tokens": 3}],
    ids=["no draft", "one that says it again", "one that does not", "lookup"],
)


def ask_spiky(tokenizer, risks=None, **fields):
    return ask(tokenizer, {14: 0.1, **(risks or {})}, script=SPIKE, **fields)


@DRAFTS
def test_where_one_token_alone_was_risky_the_answer_goes_on_without_it(tokenizer, drafts):
    output = ask_spiky(tokenizer, **drafts)
    (event,) = output.events[0]
    assert (event.outcome, event.chosen, event.num_candidates) == ("dismissed", None, 8)
    assert (event.position, event.rolled_back_to) == (4, 4)
    assert tokens_of(output) == [11, 12, 13, 14, *range(25, 30)]
    assert Provenance.RECOVERED not in output.provenance[0].tolist()
    assert not output.risks[0].isnan().any()
    assert output.statistics.num_discarded_tokens == event.num_discarded
    assert not has_reflected(output)


@DRAFTS
def test_the_next_flag_is_believed_and_takes_back_what_was_put_back(tokenizer, drafts):
    output = ask_spiky(tokenizer, {25: 0.9}, **drafts)
    assert outcomes_of(output)[:2] == ["dismissed", "recovered"]
    assert has_reflected(output)
    assert output.events[0][1].rolled_back_to == 3
    assert not {14, 15, 25} & set(tokens_of(output))


@pytest.mark.parametrize(("prompt", "answer"), [([14], [*range(25, 34)]), ([13], [14, *range(25, 33)])])
def test_it_may_be_among_the_first_tokens(tokenizer, prompt, answer):
    assert tokens_of(ask_spiky(tokenizer, prompt=prompt)) == answer


@pytest.mark.parametrize("last", [None, True])
def test_or_the_last(tokenizer, last):
    output = ask_spiky(tokenizer, max_new_tokens=5, score_last_token=last)
    assert tokens_of(output) == [11, 12, 13, 14, 25]
    assert outcomes_of(output) == ["dismissed"]


def test_rows_with_such_tokens_end_as_they_would_alone(tokenizer):
    alone = [ask_spiky(tokenizer, prompt=[start]) for start in (10, 14, 20)]
    batch = ask_spiky(tokenizer, prompt=[[10], [14], [20]])
    assert [tokens_of(batch, row) for row in range(3)] == [tokens_of(one) for one in alone]


def test_it_is_not_drawn_there_again_but_may_be_elsewhere(tokenizer):
    script = count_after({**TURNS, 13: {14: 0.9, 30: 0.1}, 14: {15: 0.9, 13: 0.1}})
    risks = {15: lambda context: 0.9 if len(context) == 6 else 0.1}
    num_flagged = 0
    for seed in range(8):
        torch.manual_seed(seed)
        output = ask(tokenizer, {14: 0.1, **risks}, script=script, do_sample=True, top_k=0)
        if outcomes_of(output)[:1] == ["dismissed"]:
            num_flagged += 1
            assert tokens_of(output)[:5] == [11, 12, 13, 14, 13]
    assert num_flagged > 0
    greedy = ask(tokenizer, {14: 0.1, **risks}, script=script)
    assert tokens_of(greedy) == [11, 12, 13, 14, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("end", [39, 15], ids=["another token", "the flagged one"])
def test_in_its_place_the_answer_does_not_end(tokenizer, end):
    script = count_after({**TURNS, 13: {14: 0.9, 30: 0.1}, 14: {15: 0.9, 39: 0.06, 25: 0.04}})
    fields = {"eos_token_id": end, "score_last_token": True}
    output = ask(tokenizer, {14: 0.1}, script=script, **fields)
    assert outcomes_of(output) == ["dismissed"]
    assert tokens_of(output)[:6] == ([11, 12, 13, 14, 25, 26] if end == 39 else [11, 12, 13, 14, 39, 0])
