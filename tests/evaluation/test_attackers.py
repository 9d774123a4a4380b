import codecs

import pytest

from safespec_hf import SafeSpecError
from safespec_hf.evaluation.attackers import ATTACKERS, attack


def test_each_attacker_rewrites_what_is_asked_and_not_what_is_judged(sets):
    attacked = attack(sets, list(ATTACKERS))
    assert len(attacked) == len(sets) + len(ATTACKERS)
    for name in ATTACKERS:
        for plain, prompt in zip(sets["attack"], attacked[f"attack@{name}"], strict=True):
            assert prompt.messages[-1]["content"] == ATTACKERS[name](plain.messages[-1]["content"])
            assert prompt.messages != plain.messages
            assert (prompt.request, prompt.id, prompt.kind) == (plain.request, plain.id, "attacks")
            assert prompt.set_name == f"attack@{name}"


def test_nothing_of_a_request_is_lost_in_the_cipher():
    text = ATTACKERS["cipher"]("When to prune roses?")
    assert "roses" not in text
    assert codecs.decode(text.partition(":\n\n")[2], "rot13") == "When to prune roses?"


def test_sets_stay_as_they_are(sets):
    assert attack(sets, []) == sets


def test_an_unknown_attacker_is_told_and_one_without_attacks_too(sets):
    with pytest.raises(SafeSpecError, match="no attacker 'roses'"):
        attack(sets, ["roses"])
    with pytest.raises(SafeSpecError, match="there are none"):
        attack({"calm": sets["calm"]}, ["code"])
