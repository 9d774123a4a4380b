"""Lookups in a context that grows and is rolled back are searches of all of it."""

import random

import pytest

from safespec_hf.drafting.ngrams import NgramIndex


def reference_lookup(context, max_size, num_tokens):
    """The longest n-gram that the context ends with and that was there before; of those the last one."""
    for size in range(min(max_size, len(context) - 1), 0, -1):
        for end in range(len(context) - 1, size - 1, -1):
            if context[end - size : end] == context[-size:]:
                return context[end : end + num_tokens]
    return []


@pytest.mark.parametrize("max_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_a_lookup_in_a_growing_context_equals_a_search_of_all_of_it(max_size, seed):
    choose = random.Random(seed)
    prompt, tokens, index = [choose.randrange(4) for _ in range(choose.randint(1, 9))], [], NgramIndex(max_size)
    for _ in range(30):
        num = choose.randint(0, 4)
        assert index.continuation(prompt, tokens, num)[0] == reference_lookup(prompt + tokens, max_size, num)
        tokens = tokens + [choose.randrange(4) for _ in range(choose.randint(1, 3))]


@pytest.mark.parametrize("seed", range(20))
def test_after_rollbacks_a_lookup_still_tells_what_really_followed(seed):
    choose = random.Random(seed)
    prompt, tokens, index, num_found = [1, 2, 3], [], NgramIndex(2), 0
    for _ in range(40):
        tokens = tokens[: choose.randint(max(0, len(tokens) - 6), len(tokens))]
        index.keep(len(prompt) + len(tokens))
        tokens = tokens + [choose.randrange(4) for _ in range(choose.randint(1, 8))]
        found, _ = index.continuation(prompt, tokens, 3)
        assert found == reference_lookup(prompt + tokens, 2, 3)
        num_found += bool(found)
    assert num_found > 5


def test_tokens_that_replaced_rolled_back_ones_are_found():
    index, prompt = NgramIndex(1), [9]
    index.continuation(prompt, [1, 2, 3, 4, 5, 6], 1)  # all but the last are indexed
    # four of them are rolled back, and five others come in their place before the next lookup
    index.keep(3)
    assert index.continuation(prompt, [1, 2, 30, 31, 32, 33, 30], 2) == ([31, 32], 1)


def test_a_rolled_back_occurrence_does_not_hide_an_earlier_one():
    index, prompt = NgramIndex(1), [1, 2, 3]
    index.continuation(prompt, [1, 8, 9], 1)  # the last 1 is now at the fourth place
    index.keep(3)
    assert index.continuation(prompt, [7, 1], 2) == ([2, 3], 1)


@pytest.mark.parametrize("prompt", [[5], [5, 6], [5, 6, 7]])
def test_without_a_repetition_nothing_is_found(prompt):
    assert NgramIndex(2).continuation(prompt, [], 4) == ([], 0)
