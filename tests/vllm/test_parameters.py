import math

import pytest

from safespec_hf import UnsupportedRequestError
from safespec_hf.vllm.parameters import HONOURED, WHY_NOT, check_parameters


@pytest.mark.parametrize("name", [*WHY_NOT, "a_field_of_next_year"])
def test_what_is_not_honoured_is_refused_by_its_name(name):
    with pytest.raises(UnsupportedRequestError, match=f"`{name}` is refused"):
        check_parameters({"max_tokens": 4, name: {"a": 1}}, 0.5)


def test_nothing_is_both_honoured_and_refused():
    assert HONOURED & set(WHY_NOT) == set()


@pytest.mark.parametrize("value", [None, False, 0, 0.0, [], {}, ""])
def test_a_value_that_asks_for_nothing_is_no_request(value):
    assert check_parameters({"min_tokens": value, "tools": value, "logprobs": value}, 0.5) == 0.5


def test_ordinary_values_of_refused_fields_pass():
    given = {"tool_choice": "none", "response_format": {"type": "text"}, "best_of": 1}
    assert check_parameters(given, 0.5) == 0.5


@pytest.mark.parametrize("value", [True, 5, "auto", {"type": "json_object"}])
def test_a_grammar_is_refused(value):
    with pytest.raises(UnsupportedRequestError, match="grammar"):
        check_parameters({"response_format": value}, 0.5)


def test_a_client_may_ask_for_more_caution():
    assert check_parameters({"safespec": {"risk_threshold": 0.1}}, 0.5) == 0.1
    assert check_parameters({"safespec": {}}, 0.5) == 0.5


@pytest.mark.parametrize("value", [0.6, 1, 0, -1, math.nan, math.inf, True, "0.1", None])
def test_a_client_can_not_ask_for_less(value):
    with pytest.raises(UnsupportedRequestError, match=r"in \(0, 0.5\]"):
        check_parameters({"safespec": {"risk_threshold": value}}, 0.5)


@pytest.mark.parametrize("value", [False, True, "off", [], {"policy": "observe"}, {"max_recoveries": 0}, 0])
def test_nor_switch_the_guard_off(value):
    with pytest.raises(UnsupportedRequestError, match="The policy is the server's"):
        check_parameters({"safespec": value}, 0.5)
