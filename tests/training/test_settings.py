from dataclasses import dataclass

import pytest

from safespec_hf import SafeSpecError
from safespec_hf.training.settings import check_counts, check_number, check_ranges


@dataclass
class Settings:
    count: int = 1
    share: float = 0.5


@pytest.mark.parametrize(
    ("value", "interval"),
    [(0, "[0, 1)"), (1, "(0, 1]"), (0.5, "(0, 1)"), (10**400, "[1, inf)"), (float("inf"), "(0, inf]")],
)
def test_a_number_in_its_interval_passes(value, interval):
    check_number("x", value, interval)


@pytest.mark.parametrize(
    ("value", "interval"),
    [
        (0, "(0, 1)"),
        (1, "[0, 1)"),
        (-1, "[0, inf)"),
        (float("inf"), "[0, inf)"),
        (float("nan"), "[0, inf]"),
        (True, "[0, 1]"),
        ("1", "[0, 1]"),
        (None, "[0, 1]"),
    ],
)
def test_any_other_is_refused_with_the_interval_and_the_value(value, interval):
    with pytest.raises(SafeSpecError) as caught:
        check_number("x", value, interval)
    assert str(caught.value) == f"`x` must be a number in {interval}, but it is {value!r}."


def test_what_is_declared_as_an_integer_must_be_one():
    check_ranges(Settings(), {"count": "[1, inf)", "share": "(0, 1)"})
    check_counts(Settings(), "count")
    with pytest.raises(SafeSpecError, match=r"`count` must be an integer in \[1, inf\), but it is 1.5"):
        check_counts(Settings(count=1.5), "count")
