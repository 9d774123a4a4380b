"""A grade is read off the ten digits, however they are spelled."""

import math

import pytest
import torch
from tiny import FIRST_DIGIT, build_tokenizer

from safespec_hf.decoding.quality import find_digit_ids, read_quality

IDS = [[digit] for digit in range(9)] + [[9, 10]]


def logits(chances, size=12):
    found = torch.full((1, size), -math.inf)
    for token, chance in chances.items():
        found[0, token] = math.log(chance)
    return found


def test_every_spelling_of_a_digit_that_is_one_token_is_found():
    tokenizer = build_tokenizer(has_digits=True)
    tokenizer.add_tokens([" 9", "9\n", "٩", "99", "9.", "²", "w9"])
    expected = [[FIRST_DIGIT + digit] for digit in range(9)] + [[38, 40, 41, 42]]
    assert find_digit_ids(tokenizer, 60) == expected


def test_tokens_without_logits_are_no_spellings():
    tokenizer = build_tokenizer(has_digits=True)
    tokenizer.add_tokens([" 9"])
    assert find_digit_ids(tokenizer, 41)[9] == [38, 40]
    assert find_digit_ids(tokenizer, 40)[9] == [38]


def test_a_tokenizer_without_digits_has_none():
    assert find_digit_ids(build_tokenizer(), 40) == [[]] * 10


def test_the_likeliest_digit_is_the_one_of_all_its_spellings_together():
    chances = {8: 0.3, 9: 0.2, 10: 0.2, 11: 0.3}
    assert read_quality(logits(chances), IDS, "argmax").tolist() == [9]


def test_the_expected_grade_is_the_mean_over_digits_alone():
    chances = {2: 0.1, 9: 0.1, 10: 0.2, 11: 0.6}
    assert read_quality(logits(chances), IDS, "expected").tolist() == pytest.approx([(2 * 0.1 + 9 * 0.3) / 0.4])


@pytest.mark.parametrize("reading", ["argmax", "expected"])
def test_what_is_no_distribution_of_digits_gives_no_grade(reading):
    spoiled = torch.zeros(1, 12)
    spoiled[0, 3] = math.nan
    both = torch.cat([logits({11: 1.0}), spoiled, torch.zeros(1, 12)])
    grades = read_quality(both, IDS, reading)
    assert grades.isnan().tolist() == [True, True, False]
