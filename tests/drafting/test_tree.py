"""Trees grow where they promise most, and never hold a draft without the one before it."""

import random

import pytest

from safespec_hf.drafting.draft_length import DraftCosts, DraftLength
from safespec_hf.drafting.tree import BEAM, DraftTree


def grow(costs, probabilities, max_depth=6, max_size=32):
    """A tree of guesses that are always as likely."""
    tree = DraftTree(DraftLength(costs), max_depth, max_size)
    parents, steps = [-1], []
    while parents:
        for parent in parents:
            tree.add(parent, range(len(probabilities)), probabilities)
        parents = tree.to_continue()
        steps.append(len(parents))
    return tree, steps


def test_sure_guesses_make_a_chain_and_unsure_ones_a_bush():
    costs = DraftCosts(draft=0.05, verify=0.03)
    _, _, chain = grow(costs, [0.97, 0.01, 0.01])[0].best()
    _, _, bush = grow(costs, [0.45, 0.35, 0.15])[0].best()
    assert chain == list(range(-1, 5))
    assert len(bush) > len(set(bush)) > 2


def test_where_verifying_is_dear_little_is_verified():
    sizes = [len(grow(DraftCosts(draft=0.02, verify=cost), [0.6, 0.2])[0].best()[0]) for cost in (0.01, 0.1, 0.3, 2.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2] > sizes[3] == 0


def test_where_drafting_is_dear_nothing_is_continued():
    assert grow(DraftCosts(draft=5.0, verify=0.01), [0.9, 0.1])[1] == [0]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_likely_a_tree_is_sound(seed):
    choose = random.Random(seed)
    tree = DraftTree(DraftLength(DraftCosts(draft=choose.random() / 10, verify=choose.random() / 20)), 5, 12)
    parents = [-1]
    while parents:
        for parent in parents:
            first = choose.random()
            tree.add(parent, range(4), [first, (1 - first) / 2, (1 - first) / 4, 0.0])
        parents = tree.to_continue()
        assert len(parents) <= BEAM
    tokens, kinds, parents = tree.best()
    assert len(tokens) == len(kinds) == len(parents) <= 12
    assert all(-1 <= parent < index for index, parent in enumerate(parents))
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    assert max(depths, default=0) < 5
    assert len(set(zip(parents, tokens, strict=True))) == len(tokens)  # no guess twice after the same draft


def test_what_can_not_be_drafted_makes_no_tree():
    tree = DraftTree(DraftLength(DraftCosts()), 3, 8)
    assert tree.to_continue() == []
    assert tree.best() == ([], [], [])
