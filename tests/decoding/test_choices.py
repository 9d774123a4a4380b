"""Which candidate goes on, how many are sampled for it, and what is told about all of them."""

import math

import pytest
from scripted import answer, count_after, tokens_of
from tiny import THINK

# After the reflection the target goes on with 20, which is likely, or with 30, which is safer.
SCRIPT = count_after({THINK: {20: 0.7, 30: 0.3}})
RISKS = {15: 0.9, 20: 0.3}
SOURCES = pytest.mark.parametrize("draft", [None, SCRIPT], ids=["target", "draft"])


def ask(tokenizer, risks=RISKS, **arguments):
    return answer(tokenizer, risks, **{"script": SCRIPT, "num_candidates": 16, "max_recoveries": 1, **arguments})


def whole(event):
    """Risks and mean log-probabilities of candidates, rounded, as pairs."""
    return {
        (round(risk, 4), round(log_prob, 3))
        for risk, log_prob in zip(event.candidate_risks, event.candidate_log_probs, strict=True)
    }


@SOURCES
@pytest.mark.parametrize(
    ("choice", "margin", "first"),
    [("safest", 0.2, 30), ("likeliest_safe", 0.2, 20), ("likeliest_safe", 0.5, 30), ("likeliest_safe", 0.9, 30)],
)
def test_the_likeliest_candidate_goes_on_where_it_is_safe_by_the_margin(tokenizer, draft, choice, margin, first):
    # 30 has a risk of 0.1; with the last margin neither is safe enough, and it is the safest
    output = ask(tokenizer, draft=draft, candidate_choice=choice, safe_margin=margin)
    assert tokens_of(output)[:6] == [11, 12, 13, first, first + 1, first + 2]
    (event,) = output.events[0]
    assert event.chosen is not None
    assert round(event.candidate_risks[event.chosen], 6) == {20: 0.3, 30: 0.1}[first]


def test_a_candidate_that_may_be_the_likeliest_is_written_to_its_end(tokenizer):
    # 30 ends at once, with a lower risk
    arguments = {"eos_token_id": 30, "min_segment_tokens": 1, "candidate_choice": "likeliest_safe"}
    (event,) = ask(tokenizer, **arguments).events[0]
    assert whole(event) == {(0.3, round(math.log(0.7) / 3, 3)), (0.1, round(math.log(0.3), 3))}
    assert (event.num_safe_candidates, event.num_unsafe_candidates) == (16, 0)


@SOURCES
def test_an_event_counts_what_was_safe_and_what_was_not(tokenizer, draft):
    arguments = {"draft": draft, "candidate_choice": "likeliest_safe", "safe_margin": 0.0}
    (event,) = ask(tokenizer, {15: 0.9, 32: 0.8}, **arguments).events[0]
    num_unsafe = sum(risk >= 0.5 for risk in event.candidate_risks)
    assert 0 < num_unsafe < 16
    assert (event.num_candidates, event.num_safe_candidates, event.num_unsafe_candidates) == (
        16,
        16 - num_unsafe,
        num_unsafe,
    )


def test_what_was_given_up_while_it_was_safe_is_neither(tokenizer):
    # candidates that begin with 20 are given up at it as soon as the others have ended at 31, and might go wrong at 22
    arguments = {"eos_token_id": 31, "min_segment_tokens": 1}
    (event,) = ask(tokenizer, {15: 0.9, 21: 0.4, 22: 0.9}, **arguments).events[0]
    num_likely = sum(risk > 0.3 for risk in event.candidate_risks)
    assert 0 < num_likely < 16
    assert (event.num_safe_candidates, event.num_unsafe_candidates) == (16 - num_likely, 0)
    (event,) = ask(tokenizer, {15: 0.9, 21: 0.4, 22: 0.9}, draft=SCRIPT, **arguments).events[0]
    assert event.num_safe_candidates + event.num_unsafe_candidates == 16


@SOURCES
def test_candidates_come_batch_by_batch_until_one_is_safe(tokenizer, draft):
    arguments = {"candidates_per_batch": 2, "num_candidates": 7, "draft": draft, "num_draft_tokens": 1}
    nums = set()
    for seed in range(12):
        output = ask(
            tokenizer, {15: 0.9, 20: 0.9}, seed=seed, max_recoveries=3, flagged_token_penalty=0.0, **arguments
        )
        for event in output.events[0]:
            nums.add(event.num_candidates)
            # all but the last batch hold no safe one, and the chosen one lies in the last
            num_before = (event.num_candidates - 1) // 2 * 2
            assert all(risk >= 0.5 for risk in event.candidate_risks[:num_before])
            assert len(event.candidate_log_probs) == event.num_candidates
            if event.chosen is None:
                assert event.num_candidates == 7 or event.outcome == "refused"
            else:
                assert num_before <= event.chosen < event.num_candidates
                assert event.candidate_risks[event.chosen] == min(event.candidate_risks)
                assert tokens_of(output)[3:6] == [30, 31, 32]
        statistics = output.statistics
        assert statistics.num_candidates == sum(event.num_candidates for event in output.events[0])
        assert statistics.num_candidate_batches == sum(-(-event.num_candidates // 2) for event in output.events[0])
    assert {2, 4} <= nums  # or else this would have shown nothing


@SOURCES
def test_all_batches_are_spent_before_an_attempt_has_failed(tokenizer, draft):
    output = ask(tokenizer, {15: 0.9, 20: 0.9, 30: 0.9}, candidates_per_batch=3, num_candidates=8, draft=draft)
    assert [event.outcome for event in output.events[0]] == ["retried", "refused"]
    assert [event.num_candidates for event in output.events[0]] == [8, 0]
    assert (output.statistics.num_candidates, output.statistics.num_candidate_batches) == (8, 3)


def test_a_seed_fixes_candidates_that_come_in_batches_and_for_each_row_alone(tokenizer):
    script = count_after({THINK: dict.fromkeys(range(20, 40), 0.05)})
    arguments = {"script": script, "candidates_per_batch": 1, "num_candidates": 4, "max_recoveries": 4}
    arguments["risks"] = {15: 0.9, **dict.fromkeys(range(20, 36), 0.9)}
    alone, again = (ask(tokenizer, seed=5, **arguments) for _ in range(2))
    batch = ask(tokenizer, seed=5, prompt=[[10], [10]], **arguments)
    assert alone.events == again.events == batch.events[:1] == batch.events[1:]
    assert tokens_of(alone) == tokens_of(batch, 0) == tokens_of(batch, 1)
    assert ask(tokenizer, seed=6, **arguments).events != alone.events
