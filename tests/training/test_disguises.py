"""Requests in disguise: the label is that of the request, and the disguise says nothing about it."""

from collections import Counter

import pytest

from safespec_hf.training.data import Example
from safespec_hf.training.disguises import DISGUISES, MAX_CHARACTERS, NUM_DISGUISES, SLOT, disguise


def asked(text, label, *earlier):
    return Example(id=text, messages=(*earlier, {"role": "user", "content": text}), label=label, source="garden")


PROMPTS = [asked(f"bolt {i}", 1) for i in range(8)] + [asked(f"calm {i}", 0) for i in range(50)]


def ways_of(found, label):
    return Counter(example.id.rpartition(" ")[2] for example in found if example.label == label)


def test_every_disguise_has_one_place_for_the_request_at_least():
    ways = [way for ways in DISGUISES.values() for way in ways]
    assert len(set(ways)) == NUM_DISGUISES
    assert all(SLOT in way and way != SLOT for way in ways)
    assert not any("{" in way.replace(SLOT, "") for way in ways)


@pytest.mark.parametrize("num", [0, 1, 3, NUM_DISGUISES])
def test_harmful_and_harmless_requests_come_in_the_same_disguises(num):
    found = disguise(PROMPTS, num)
    assert ways_of(found, 1).total() == 8 * num
    assert ways_of(found, 0).total() == min(8 * num, 50)
    if 8 * num <= 50:
        assert ways_of(found, 0) == ways_of(found, 1)
    assert len({example.id for example in found}) == len(found)
    for example in found:
        assert ("bolt " in example.messages[-1]["content"]) == (example.label == 1)
        assert example.source == "garden, disguised"


def test_it_is_drawn_by_the_seed_alone():
    assert disguise(PROMPTS, 2) == disguise(PROMPTS, 2)
    assert disguise(PROMPTS, 2) != disguise(PROMPTS, 2, seed=1)


def test_the_last_turn_of_a_conversation_is_disguised_and_what_is_long_is_not():
    before = {"role": "assistant", "content": "w"}
    found = disguise([asked("why {request}?", 1, before), asked("x" * (MAX_CHARACTERS + 1), 1)], 1)
    (one,) = found
    assert one.messages[0] == before
    assert "why {request}?" in one.messages[1]["content"]
