"""What happens after a flag is decided by pure functions: retry or refuse, where to cut, which candidate to take."""

import math

import pytest

from safespec_hf.answer.recovery import batch_sizes, choose, next_step, rollback_point


@pytest.mark.parametrize(
    ("num_recoveries", "max_recoveries", "room", "step"),
    [
        (0, 1, 1, "resample"),
        (5, 6, 1, "resample"),
        (0, 0, 9, "refuse"),
        (6, 6, 9, "refuse"),
        (0, 6, 0, "refuse"),
        (0, 6, -3, "refuse"),
    ],
)
def test_an_attempt_needs_both_a_budget_and_room(num_recoveries, max_recoveries, room, step):
    assert next_step(num_recoveries, max_recoveries, room) == step


@pytest.mark.parametrize(
    ("flagged", "rollback_segments", "num_final", "kept"),
    [
        (0, 0, 0, 0),
        (0, 3, 0, 0),
        (9, 0, 0, 0),
        (10, 0, 0, 10),
        (19, 0, 0, 10),
        (25, 0, 0, 20),
        (25, 1, 0, 10),
        (25, 2, 0, 0),
        (25, 9, 0, 0),
        (25, 1, 10, 10),
        (25, 2, 10, 10),
        (25, 0, 10, 20),
    ],
)
def test_the_flagged_segment_goes_and_those_before_it_but_nothing_final(flagged, rollback_segments, num_final, kept):
    assert rollback_point([0, 10, 20], flagged, rollback_segments, num_final) == kept


@pytest.mark.parametrize(
    ("risks", "log_probs", "candidate"),
    [
        ([0.3], [-1.0], 0),
        ([0.3, 0.1, 0.2], [-1.0, -9.0, -2.0], 1),
        ([0.1, 0.1, 0.1], [-3.0, -1.0, -2.0], 1),
        ([0.1, 0.1], [-1.0, -1.0], 0),
    ],
)
def test_the_lowest_risk_wins_and_then_the_likeliest(risks, log_probs, candidate):
    assert choose(risks, log_probs, 0.5)[:2] == (candidate, risks[candidate])


@pytest.mark.parametrize(("risk", "is_safe"), [(0.49, True), (0.5, False), (0.51, False), (math.nan, False)])
def test_a_candidate_is_safe_only_below_the_threshold(risk, is_safe):
    assert choose([risk], [-1.0], 0.5).is_safe is is_safe


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_candidate_of_unknown_risk_never_stands_in_the_way_of_a_safe_one(position):
    risks = [0.2, 0.3]
    risks.insert(position, math.nan)
    choice = choose(risks, [-1.0] * 3, 0.5)
    assert (choice.risk, choice.is_safe) == (0.2, True)


@pytest.mark.parametrize(
    ("risks", "log_probs", "safe_enough", "candidate"),
    [
        ([0.3, 0.1, 0.2], [-1.0, -3.0, -2.0], 0.3, 0),  # a risk that equals the bound is safe enough
        ([0.3, 0.1, 0.2], [-1.0, -3.0, -2.0], 0.25, 2),
        ([0.3, 0.1, 0.2], [-1.0, -3.0, -2.0], 0.05, 1),  # none is safe enough: the safest
        ([0.1, 0.2], [-2.0, -2.0], 0.4, 0),  # among equally likely ones the safer
        ([0.6, 0.2], [-1.0, -2.0], 0.9, 1),  # whatever the bound says, a candidate is below the threshold
        ([math.nan, 0.2], [-1.0, -2.0], 0.4, 1),
        ([0.1, 0.2], [math.nan, -9.0], 0.4, 1),
    ],
)
def test_the_likeliest_wins_among_those_that_are_safe_enough(risks, log_probs, safe_enough, candidate):
    assert choose(risks, log_probs, 0.5, safe_enough) == (candidate, risks[candidate], True)


def test_when_none_is_safe_the_likeliest_is_not_either():
    assert choose([0.6, 0.7], [-2.0, -1.0], 0.5, 0.4) == (0, 0.6, False)


@pytest.mark.parametrize(("num", "most", "sizes"), [(8, None, [8]), (8, 8, [8]), (8, 3, [3, 3, 2]), (2, 1, [1, 1])])
def test_batches_of_candidates_add_up(num, most, sizes):
    assert batch_sizes(num, most) == sizes
