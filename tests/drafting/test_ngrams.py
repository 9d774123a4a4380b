"""Lookups in a context that grows and is rolled back are searches of all of it."""

import random
import tracemalloc

import pytest

from safespec_hf.drafting.ngrams import NgramSearch


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
    prompt, tokens, search = [choose.randrange(4) for _ in range(choose.randint(1, 9))], [], NgramSearch(max_size)
    for _ in range(30):
        num = choose.randint(0, 4)
        assert search.continuation(prompt, tokens, num)[0] == reference_lookup(prompt + tokens, max_size, num)
        tokens = tokens + [choose.randrange(4) for _ in range(choose.randint(1, 3))]


@pytest.mark.parametrize("seed", range(20))
def test_after_rollbacks_a_lookup_still_tells_what_really_followed(seed):
    choose = random.Random(seed)
    prompt, tokens, search, num_found = [1, 2, 3], [], NgramSearch(2), 0
    for _ in range(40):
        tokens = tokens[: choose.randint(max(0, len(tokens) - 6), len(tokens))]
        search.keep(len(prompt) + len(tokens))
        tokens = tokens + [choose.randrange(4) for _ in range(choose.randint(1, 8))]
        found, _ = search.continuation(prompt, tokens, 3)
        assert found == reference_lookup(prompt + tokens, 2, 3)
        num_found += bool(found)
    assert num_found > 5


def test_tokens_that_replaced_rolled_back_ones_are_found():
    search, prompt = NgramSearch(1), [9]
    search.continuation(prompt, [1, 2, 3, 4, 5, 6], 1)
    # four of them are rolled back, and five others come in their place before the next lookup
    search.keep(3)
    assert search.continuation(prompt, [1, 2, 30, 31, 32, 33, 30], 2) == ([31, 32], 1)


def test_a_rolled_back_occurrence_does_not_hide_an_earlier_one():
    search, prompt = NgramSearch(1), [1, 2, 3]
    search.continuation(prompt, [1, 8, 9], 1)  # the last 1 is now at the fourth place
    search.keep(3)
    assert search.continuation(prompt, [7, 1], 2) == ([2, 3], 1)


@pytest.mark.parametrize("prompt", [[5], [5, 6], [5, 6, 7]])
def test_without_a_repetition_nothing_is_found(prompt):
    assert NgramSearch(2).continuation(prompt, [], 4) == ([], 0)


def test_a_long_prompt_takes_eight_bytes_a_token_at_most():
    search, prompt, tokens = NgramSearch(4), list(range(100_000)), list(range(3))
    tracemalloc.start()
    for num in range(3):
        search.continuation(prompt, tokens[:num], 8)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 8.1 * len(prompt)
