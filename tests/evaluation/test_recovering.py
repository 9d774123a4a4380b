import math
import random

import pytest

from safespec_hf.evaluation.recovering import (
    Attempt,
    attempts_of,
    intraclass_correlation,
    recovery_table,
    success_at,
)


def event(position, risks, rolled_back_to=0):
    return {"position": position, "rolled_back_to": rolled_back_to, "candidate_risks": risks}


def draws(chances, num=20):
    """An attempt for each chance: so many candidates, each safe with it."""
    draw = random.Random(0)
    return [Attempt(num, sum(draw.random() < chance for _ in range(num))) for chance in chances]


def test_only_the_first_attempt_after_a_flag_counts():
    events = [event(9, [0.9, 0.2]), event(9, [0.1, 0.1]), event(30, []), event(30, [0.6, None, 0.4], 20)]
    rows = [{"events": events, "risk_threshold": 0.5}]
    assert attempts_of(rows) == [Attempt(2, 1), Attempt(3, 1)]


def test_candidates_that_ended_early_are_not_counted():
    told = {"num_safe_candidates": 1, "num_unsafe_candidates": 2}
    rows = [{"events": [event(9, [0.9, 0.9, 0.2, 0.3]) | told], "risk_threshold": 0.5}]
    assert attempts_of(rows) == [Attempt(3, 1)]


def test_candidates_of_a_test_for_a_false_alarm_are_other_draws():
    tests = [event(9, [0.1, 0.1]) | {"outcome": "confirmed"}, event(20, [0.1, 0.1]) | {"outcome": "dismissed"}]
    rows = [{"events": [*tests, event(9, [0.9, 0.2]) | {"outcome": "recovered"}], "risk_threshold": 0.5}]
    assert attempts_of(rows) == [Attempt(2, 1)]


@pytest.mark.parametrize("p", [0.05, 0.3])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_independent_candidates_succeed_as_the_formula_says(p, k):
    # 3,000 attempts: the standard error is at most .009
    assert success_at(draws([p] * 3000), k).mean == pytest.approx(1 - (1 - p) ** k, abs=0.03)


def test_correlation_is_none_of_independent_candidates_and_known_of_others():
    assert intraclass_correlation(draws([0.3] * 3000)) == pytest.approx(0, abs=0.01)
    # p is .1 or .5 by turns: its variance, .04, over p (1 - p) = .21
    assert intraclass_correlation(draws([0.1, 0.5] * 3000)) == pytest.approx(0.04 / 0.21, abs=0.02)
    assert math.isnan(intraclass_correlation([Attempt(8, 0)]))


def test_candidates_that_are_alike_are_worth_fewer():
    rows = [
        {"events": [event(9, [0.1 if i < a.num_safe else 0.9 for i in range(a.num)])], "risk_threshold": 0.5}
        for a in draws([0.0, 0.6] * 200)
    ]
    table = recovery_table(rows)
    at_ten = next(row for row in table["by_k"] if row["k"] == 10)
    assert at_ten["measured"] < at_ten["independent"]
    assert at_ten["effective"] < 3
    assert [row["k"] for row in table["by_k"]] == [1, 2, 5, 10, 20]
