"""What a guarded answer of an engine may be sampled with."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from safespec_hf import UnsupportedRequestError
from safespec_hf.vllm.entries import Marks, close_logits
from safespec_hf.vllm.sampling import (
    LEAST_PENALTY,
    MOST_BIAS,
    MOST_PENALTY,
    REFUSED,
    TAKEN,
    Sampling,
    StopTexts,
    shifted_seed,
)

RESERVED = 3


class Params(SimpleNamespace):
    """Like the engine's own: a class that names its fields, and has a default for each."""

    __struct_fields__ = ("temperature", "ignore_eos", "a_field_of_next_year", "_own")

    def __init__(self, **given):
        super().__init__(**{"temperature": 1.0, "ignore_eos": False, "a_field_of_next_year": 0, "_own": 1} | given)


class Letters:
    """A tokenizer whose tokens are bytes; a character may take several."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(token for token in tokens if token or not skip_special_tokens).decode(errors="replace")


@pytest.mark.parametrize("name", [name for name, _, _ in REFUSED])
def test_what_can_not_be_guarded_is_refused_by_its_name(name):
    with pytest.raises(UnsupportedRequestError, match=f"does not support {name}="):
        Sampling.from_params({name: 7})


@pytest.mark.parametrize("params", [{"temperatur": 0.0}, Params(a_field_of_next_year=2)], ids=["dict", "object"])
def test_what_nobody_has_looked_at_is_refused_by_its_name(params):
    with pytest.raises(UnsupportedRequestError, match=r"does not know .*'(temperatur|a_field_of_next_year)'"):
        Sampling.from_params(params)


def test_defaults_of_an_object_ask_for_nothing():
    assert Sampling.from_params(Params(temperature=0.0, _own=2)).is_greedy


@pytest.mark.parametrize("value", [1e-46, 0.0, -1.0, 1e39, math.inf, math.nan])
def test_a_penalty_that_leaves_the_arithmetic_is_refused(value):
    with pytest.raises(UnsupportedRequestError, match=r"`repetition_penalty` must be in \[0.01, 100\]"):
        Sampling.from_params({"repetition_penalty": value})


@pytest.mark.parametrize("bias", [{5: math.nan}, {5: math.inf}, {5: 1e39}, {4: 1.0, 5: -101.0}, {"5": 1.0}], ids=str)
def test_so_is_a_bias(bias):
    with pytest.raises(UnsupportedRequestError, match="`logit_bias` must give"):
        Sampling.from_params({"logit_bias": bias})


def test_a_bias_of_the_token_that_stops_is_refused():
    with pytest.raises(UnsupportedRequestError, match=f"may not touch token {RESERVED}"):
        Sampling.from_params({"logit_bias": {RESERVED: 0.5}}, RESERVED)


@pytest.mark.parametrize("penalty", [LEAST_PENALTY, 1.0, MOST_PENALTY])
@pytest.mark.parametrize("bias", [-MOST_BIAS, MOST_BIAS])
@pytest.mark.parametrize("temperature", [1e-5, 0.01, 2.0])
def test_what_samplers_do_within_the_limits_opens_nothing_that_was_closed(penalty, bias, temperature):
    logits = close_logits(torch.randn(1, 8), Marks(torch.tensor([True]), []), RESERVED)
    for factor in (1 / penalty, penalty):
        scores = logits * factor
        scores[:, [0, 1, 2, 4, 5, 6, 7]] += bias
        scores = (scores - 2.0 * 2**15) / temperature  # the other penalties, for the longest of answers
        assert scores.softmax(-1)[0].tolist() == [float(token == RESERVED) for token in range(8)]


def test_a_seed_of_minus_one_is_none_as_the_engine_has_it():
    assert Sampling.from_params({"seed": -1}).seed is None


@pytest.mark.parametrize("seed", [-(2**63), -3, -1, 0, 7, 2**63 - 1])
def test_seeds_that_follow_are_others_that_the_engine_takes(seed):
    seeds = [shifted_seed(seed, num) for num in range(1, 50)]
    assert len(set(seeds)) == 49
    assert all(0 <= one < 2**63 for one in seeds)


def ends(stop, tokens, num_prompt=0, **more):
    """After how many tokens of an answer the text ends it."""
    criterion = StopTexts(Letters(), Sampling(stop=tuple(stop), **more), num_prompt)
    for length in range(num_prompt + 1, len(tokens) + 1):
        if bool(criterion(torch.tensor([list(tokens[:length])]), None)):
            return length - num_prompt
    return None


@pytest.mark.parametrize("seed", range(30))
def test_a_text_ends_the_answer_with_the_token_that_completes_it(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices("abé\n", k=60))
    stops = ["".join(draw.choices("abé\n", k=draw.randint(1, 4))) for _ in range(3)]
    expected = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    expected = expected and len(text[:expected].encode())
    assert ends(stops, text.encode()) == expected


def test_a_text_in_the_prompt_or_across_its_end_ends_nothing():
    assert ends(["ab"], b"abab" + b"ba", num_prompt=3) is None
    assert ends(["ab"], b"aba" + b"bab", num_prompt=3) == 3


def test_a_text_further_back_ends_nothing_again():
    criterion = StopTexts(Letters(), Sampling(stop=("ab",)), 0)
    assert not bool(criterion(torch.tensor([list(b"abc")]), None))


def test_a_text_of_special_tokens_is_found_where_they_are_shown():
    assert ends(["a\0"], b"ba\0") is None
    assert ends(["a\0"], b"ba\0", skip_special_tokens=False) == 3


def test_every_honoured_parameter_is_handed_on():
    given = dict.fromkeys(TAKEN, 1.0) | {"logit_bias": {5: 1.0}}
    assert Sampling.from_params(given).arguments == given
