"""By hand where that can be done, and by how often the interval holds what is true."""

import random

import pytest

from safespec_hf import SafeSpecError
from safespec_hf.evaluation.statistics import JudgeErrors, correct_rate, is_too_weak


def errors(num_caught, num_passed, num=100):
    return JudgeErrors(num_unsafe=num, num_caught=num_caught, num_safe=num, num_passed=num_passed)


def test_a_judge_that_is_never_wrong_changes_nothing():
    assert correct_rate(30, 100, errors(100, 100)).rate == pytest.approx(0.3)


def test_false_alarms_are_taken_off_and_what_was_missed_is_put_on():
    # of 100 answers 40 are harmful: 32 of these are flagged, and 6 of the 60 others
    assert correct_rate(38, 100, errors(80, 90)).rate == pytest.approx(0.4)


@pytest.mark.parametrize(("num_flagged", "rate"), [(2, 0.0), (99, 1.0)])
def test_a_rate_is_never_less_than_none_nor_more_than_all(num_flagged, rate):
    corrected = correct_rate(num_flagged, 100, errors(80, 90))
    assert corrected.rate == rate
    assert 0 <= corrected.low <= corrected.rate <= corrected.high <= 1


def test_what_is_flagged_is_told_as_it_is():
    assert correct_rate(38, 100, errors(80, 90)).flagged == 0.38


def test_the_interval_is_wider_where_less_is_known_of_the_judge():
    few, many = (correct_rate(380, 1000, errors(80 * num, 90 * num, 100 * num)) for num in (1, 100))
    assert few.high - few.low > 1.5 * (many.high - many.low)


def test_the_interval_is_wider_where_the_judge_is_worse():
    good, bad = (correct_rate(400, 1000, errors(num_right, num_right)) for num_right in (95, 75))
    assert bad.high - bad.low > 1.5 * (good.high - good.low)


@pytest.mark.parametrize("found", [errors(55, 55), errors(5, 5), errors(100, 20), errors(0, 0, 0), errors(7, 7, 10)])
def test_a_judge_that_is_too_weak_is_said_to_be(found):
    corrected = correct_rate(38, 100, found)
    assert (corrected.is_too_weak, corrected.rate, corrected.low, corrected.high) == (True, None, 0.0, 1.0)


def test_the_same_shares_are_enough_once_they_are_known_well():
    assert is_too_weak(errors(7, 7, 10))
    assert not is_too_weak(errors(700, 700, 1000))


@pytest.mark.parametrize("true_rate", [0.02, 0.1, 0.5, 0.9])
def test_the_interval_holds_the_true_rate_about_as_often_as_it_says(true_rate):
    draw = random.Random(0)
    num_held, num_draws = 0, 1000
    for _ in range(num_draws):
        caught, passed = (sum(draw.random() < share for _ in range(150)) for share in (0.8, 0.9))
        flagged = sum(draw.random() < true_rate * 0.8 + (1 - true_rate) * 0.1 for _ in range(200))
        corrected = correct_rate(flagged, 200, errors(caught, passed, 150))
        num_held += corrected.low <= true_rate <= corrected.high
    # three standard deviations of a share of .95 are .021; clipping and shrinking make it hold more often
    assert num_held / num_draws > 0.93


@pytest.mark.parametrize(("num_flagged", "num"), [(0, 0), (-1, 5), (6, 5)])
def test_a_rate_of_no_answers_is_refused(num_flagged, num):
    with pytest.raises(SafeSpecError, match=f"{num_flagged} of {num}"):
        correct_rate(num_flagged, num, errors(80, 90))


def test_more_right_verdicts_than_answers_are_refused():
    with pytest.raises(SafeSpecError, match="101 of 100"):
        errors(101, 90)
