"""A draft is made as long as it pays, by what was accepted so far."""

import math
import random

import pytest

from safespec_hf.drafting.draft_length import (
    Chance,
    DraftCosts,
    DraftLength,
    Pace,
    confidence_kind,
    match_kind,
    other_kind,
)

SURE, UNSURE = confidence_kind(0.99), confidence_kind(0.05)


def learned(num_accepted, kinds, costs=None, rounds=100):
    length = DraftLength(costs or DraftCosts(draft=0.1, verify=0.01))
    for _ in range(rounds):
        learn(length, kinds, range(num_accepted))
    return length


def learn(length, kinds, path):
    length.note(kinds)
    length.record(kinds, path)
    costs = length.pace.costs
    length.pace.record(1 + len(path), costs.block(1 + len(kinds)) + len(kinds) * costs.draft)


def test_a_chance_goes_from_its_guess_to_what_happens():
    chance = Chance(0.5)
    assert chance.value == 0.5
    for _ in range(200):
        chance.record(True)
    assert chance.value > 0.99


def test_after_the_first_rejection_nothing_is_learned():
    # what comes after a rejected draft continues another text
    length = learned(1, [SURE, UNSURE, SURE])
    assert length.chance(UNSURE) < 0.01
    assert length.chance(SURE) > 0.99


def test_of_a_tree_only_what_continues_accepted_drafts_is_learned_from():
    kinds, parents = [confidence_kind(0.95), other_kind(0.3), confidence_kind(0.75), other_kind(0.1)], [-1, -1, 0, 0]
    length = DraftLength(DraftCosts(draft=0.1, verify=0.01))
    untouched = length.chance(kinds[2])
    for _ in range(100):
        length.record(kinds, [1], parents)  # the other guess was right, so what continued the first was never tried
    assert length.chance(kinds[0]) < 0.02
    assert length.chance(kinds[1]) > 0.98
    assert length.chance(kinds[2]) == untouched


def test_drafts_that_are_accepted_are_made_until_the_limit():
    length = learned(3, [SURE] * 3)
    assert length.starts()
    assert length.plan(12) == 12
    assert length.num_worthwhile([SURE] * 12) == 12


def test_an_unsure_draft_ends_what_is_verified():
    length = learned(1, [SURE, UNSURE])
    assert length.num_worthwhile([SURE, SURE, UNSURE, SURE]) == 2


@pytest.mark.parametrize(("cost", "is_worth_it"), [(0.05, True), (0.9, False)])
def test_half_of_the_drafts_accepted_pay_if_a_draft_is_cheap(cost, is_worth_it):
    length = DraftLength(DraftCosts(draft=cost, verify=0.01))
    for index in range(200):
        learn(length, [UNSURE], range(index % 2))
    assert length.starts() is is_worth_it


def test_a_hopeless_draft_is_given_up_within_few_rounds_and_tried_again_ever_more_rarely():
    length, tried = DraftLength(DraftCosts(draft=0.2, verify=0.01)), []
    for index in range(256):
        if length.starts():
            tried.append(index)
            learn(length, [confidence_kind(0.5)], [])
    assert len(tried) <= 16
    assert length.num_paused == 256 - len(tried)
    assert tried[-1] - tried[-2] > 60


def test_a_draft_that_becomes_good_is_found_again():
    length = learned(0, [UNSURE])
    started = [length.starts() for _ in range(200)]
    assert any(started[100:])
    for _ in range(40):
        learn(length, [SURE], [0])
    assert all(length.starts() for _ in range(20))


def test_what_was_looked_up_gains_more_the_longer_it_matched():
    length = DraftLength(DraftCosts())
    assert length.gain([match_kind(8)] * 4) > length.gain([match_kind(1)] * 4) > 0


@pytest.mark.parametrize(("cost", "is_worth_it"), [(0.05, True), (0.67, False)])
def test_without_evidence_no_draft_is_made_that_costs_more_than_it_gains(cost, is_worth_it):
    length = DraftLength(DraftCosts(draft=cost, verify=0.02))
    assert (length.num_worth_making(8) > 0) is is_worth_it
    assert length.num_worth_verifying(8) > 0  # these cost no forward of the draft
    for _ in range(40):
        length.record([0], path=[])
    assert length.num_worth_making(8) == 0
    assert length.num_worth_verifying(8) <= 1


def test_constant_length_finds_every_draft_worth_it():
    length = DraftLength(DraftCosts(draft=9.0, verify=9.0), is_adaptive=False)
    assert length.starts()
    assert length.drafts_more(0.0, 1)
    assert (length.plan(7), length.num_worthwhile([UNSURE] * 7)) == (7, 7)


@pytest.mark.parametrize(("kind", "first"), [(confidence_kind, 0), (other_kind, 18)])
@pytest.mark.parametrize("chance", [-1.0, 0.0, 1e-9, 0.999, 1.0, 1.0000001, math.nan])
def test_whatever_a_draft_says_is_a_kind_of_evidence(kind, first, chance):
    assert 0 <= kind(chance) - first < 10
    assert kind(chance) == first or chance > 0.5


@pytest.mark.parametrize(
    "costs", [{"draft": -0.1}, {"verify": 0.0}, {"draft": math.nan}, {"verify": math.inf}], ids=str
)
def test_costs_out_of_range_are_refused(costs):
    with pytest.raises(ValueError, match="Costs must be finite"):
        DraftCosts(**costs)


def random_tree(choose):
    parents = [choose.randrange(-1, index) for index in range(choose.randint(0, 9))]
    path = []
    while children := [at for at, parent in enumerate(parents) if parent == (path or [-1])[-1]]:
        if choose.random() < 0.4:
            break
        path.append(choose.choice(children))
    return parents, path


@pytest.mark.parametrize("seed", range(30))
def test_whatever_was_learned_decisions_stay_within_their_bounds(seed):
    choose = random.Random(seed)
    length = DraftLength(DraftCosts(draft=choose.choice([0, 0.02, 0.3, 2]), verify=choose.choice([1e-6, 0.03, 1])))
    for _ in range(choose.choice([0, 3, 300])):
        parents, path = random_tree(choose)
        length.note([choose.randrange(10) for _ in parents])
        length.pace.record(1 + len(path), choose.choice([0.5, 1.5, 4]))
        length.record([choose.randrange(28) for _ in parents], path, parents)
    assert all(0 <= length.chance(kind) <= 1 for kind in range(28))
    kinds = [choose.randrange(28) for _ in range(choose.randint(0, 20))]
    nums = [length.num_worthwhile(kinds[:end]) for end in range(len(kinds) + 1)]
    assert nums == [min(end, nums[-1]) for end in range(len(kinds) + 1)]  # a longer draft changes nothing before
    plans = [length.plan(most) for most in range(1, 20)]
    assert plans == [min(most, plans[-1]) for most in range(1, 20)]
    gains = [length.gain(most=most) for most in range(20)]
    assert gains[0] == length.gain([]) == 0
    assert gains == sorted(gains)
    assert any(length.starts() for _ in range(130))
    made, verified = (
        [count(most) for most in range(20)] for count in (length.num_worth_making, length.num_worth_verifying)
    )
    assert all(num in (0, plan) for num, plan in zip(made, [0, *plans], strict=True))
    assert verified == sorted(verified)
    assert all(num <= most for most, num in enumerate(verified))


class StepCosts(DraftCosts):
    """A block of two tokens costs half as much again, and more tokens cost nothing more."""

    def block(self, num_tokens):
        return 1.0 if num_tokens == 1 else 1.9


def test_drafts_that_pay_only_together_are_made_together():
    length = learned(6, [SURE] * 6, StepCosts(draft=0.02))
    assert length.starts()
    assert length.num_worthwhile([SURE] * 6) == 6
    assert learned(1, [SURE, UNSURE], StepCosts(draft=0.02)).num_worthwhile([UNSURE]) == 0


def test_all_rows_of_a_batch_pay_for_the_widest():
    length = learned(4, [SURE] * 4, DraftCosts(draft=0.0, verify=0.3))
    for _ in range(50):
        length.record([UNSURE], [])
    sure, unsure = [SURE] * 4, [UNSURE] * 4
    assert length.num_worthwhile(sure) == length.num_worthwhile(sure, sure, sure, unsure) == 4
    assert length.num_worthwhile(sure, unsure, unsure, unsure) == 0


def test_a_draft_that_is_sometimes_sure_is_asked_and_verified_only_then():
    length = DraftLength(DraftCosts(draft=0.05, verify=0.5))
    for index in range(400):
        kind = SURE if index % 4 == 0 else UNSURE
        length.note([kind])
        length.record([kind], [0] if kind == SURE else [])
    assert length.starts()
    assert (length.num_worthwhile([SURE]), length.num_worthwhile([UNSURE])) == (1, 0)


def test_what_a_token_costs_is_never_more_than_a_plain_step():
    pace = Pace(DraftCosts())
    for _ in range(100):
        pace.record(1.0, 3.0)
    assert pace.token_cost == 1
    for _ in range(100):
        pace.record(4.0, 2.0)
    assert pace.token_cost == pytest.approx(0.5, abs=0.01)


def test_a_draft_that_is_never_sure_enough_to_be_verified_is_given_up():
    # nothing of it is ever accepted or rejected, as it is dropped each time
    length, num_tried = DraftLength(DraftCosts(draft=0.15, verify=0.2)), 0
    for _ in range(256):
        if length.starts():
            num_tried += 1
            length.note([UNSURE])
            assert length.num_worthwhile([UNSURE]) == 0
    assert num_tried < 25
