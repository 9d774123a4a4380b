"""Risk of earlier turns can be carried over: it lowers the threshold of the next one, and fades."""

import math

import pytest
import torch
from scripted import answer, count_after, tokens_of
from tiny import THINK

from safespec_hf import SafeSpecEvent, SafeSpecOutput, carried_risk

IDS = torch.tensor([[10, 11]])


def turn(*risks, num_rows=1):
    """A turn in which these risks were flagged in the first row."""
    events = [SafeSpecEvent(0, risk, 0, 1) for risk in risks]
    return SafeSpecOutput(sequences=IDS, events=[events, *([] for _ in range(num_rows - 1))])


@pytest.mark.parametrize(
    ("turns", "carried"),
    [
        ([], 0.0),
        ([turn()], 0.0),
        ([turn(0.6, 0.8, 0.7)], 0.4),
        ([turn(0.8), turn()], 0.2),
        ([turn(0.8), turn(), turn()], 0.1),
        ([turn(0.8), turn(0.6)], 0.3),
        ([turn(1.0), turn(0.1)], 0.25),
        ([turn(math.nan)], 0.5),
    ],
)
def test_half_of_the_highest_risk_is_carried_and_fades_with_every_turn(turns, carried):
    assert carried_risk(turns) == pytest.approx(carried)


def test_a_row_of_a_batch_carries_its_own():
    turns = [turn(0.8, num_rows=2)]
    assert [carried_risk(turns, row) for row in (None, 0, 1)] == [0.4, 0.4, 0.0]


def test_how_fast_risk_fades_can_be_chosen():
    assert [carried_risk([turn(0.8), turn()], decay=decay) for decay in (0.0, 1.0)] == [0.0, 0.4]
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\], but it is 2"):
        carried_risk([turn(0.8)], decay=2)


def test_an_answer_that_was_not_guarded_carries_nothing_known():
    with pytest.raises(ValueError, match="no events"):
        carried_risk([SafeSpecOutput(sequences=IDS)])


@pytest.mark.parametrize("policy", ["recover", "observe"])
def test_after_a_flagged_turn_less_is_tolerated_and_every_turn_is_scored(tokenizer, policy):
    # the second turn's 26 is flagged only after the first turn's 15; the first answer is in its context
    arguments = {"script": count_after({THINK: 20}), "max_new_tokens": 6, "policy": policy}
    first = answer(tokenizer, {15: 0.9, 26: 0.3}, **arguments)
    assert [event.position for event in first.events[0]] == [4]
    carried = carried_risk([first])
    assert carried == pytest.approx(0.45)
    arguments["prompt"] = [*first.sequences[0].tolist(), 24]
    for given, num_flags in ((0.0, 0), (carried, 1)):
        second = answer(tokenizer, {15: 0.9, 26: 0.3}, carried_risk=given, **arguments)
        assert len(second.events[0]) == num_flags
        assert second.model.safety.risk_threshold == 0.5  # that of the attachment, not of the call
        assert (26 in tokens_of(second, prompt=len(arguments["prompt"]))) is (policy == "observe" or not num_flags)
