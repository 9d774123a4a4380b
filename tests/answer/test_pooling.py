"""Pooled states equal a plain loop over tokens, block by block as at once, and after a rollback as if never added."""

import random
from itertools import pairwise

import pytest
import torch
from tiny import VOCAB_SIZE, build_head, make_row

from safespec_hf import Provenance, SafeSpecConfig
from safespec_hf.answer.pooling import (
    PooledStates,
    _pool_apart,
    pool,
    pool_block,
    pool_next,
    pooling_weights,
    segment_counts,
)
from safespec_hf.decoding.monitor import RiskMonitor
from safespec_hf.engine.token_tree import path_to

DECAY = 0.75
# Sums of at most 40 numbers below 4 in float32, in another order: rounding is below 40 * 4 * 6e-8 = 1e-5.
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def reference_pool(hidden_TF, counts, pooling):
    """One token at a time, straight from the definition."""
    pooled = []
    for token, count in enumerate(counts):
        span = hidden_TF[token - count : token + 1]
        if pooling == "last":
            pooled.append(span[-1])
        elif pooling == "mean":
            pooled.append(span.mean(dim=0))
        else:
            state = span[0]
            for hidden_F in span[1:]:
                state = DECAY * state + (1 - DECAY) * hidden_F
            pooled.append(state)
    return torch.stack(pooled)


def random_counts(generator, num_tokens):
    newlines = (torch.rand(num_tokens, generator=generator) < 0.2).tolist()
    return segment_counts(0, newlines, 2, 7)[0]


@pytest.mark.parametrize("pooling", ["last", "mean", "ewma"])
@pytest.mark.parametrize("span", ["segment", "answer"])
@pytest.mark.parametrize("seed", range(4))
def test_along_a_tree_every_draft_is_pooled_with_its_own_continuation(target, pooling, span, seed):
    choose = random.Random(seed)
    monitor = RiskMonitor(build_head(target, pooling=pooling, span=span))
    policy = SafeSpecConfig(max_segment_tokens=4, min_segment_tokens=2)
    row = make_row([11, 12], policy=policy, newline_ids=frozenset({7, 8}))
    settled, waiting = [13, 7, 14, 15], [16, 17]
    for token in settled:
        row.append(token, Provenance.TARGET)
    states = {token: torch.randn(32, generator=torch.Generator().manual_seed(token)) for token in range(VOCAB_SIZE)}
    row.settle([0.0] * 4, monitor.pool(row, [], torch.stack([states[token] for token in settled])))
    for token in waiting:
        row.append(token, Provenance.TARGET)
    drafts = [choose.choice([7, 8, 20, 21, 22]) for _ in range(9)]
    parents = [choose.randint(-1, draft - 1) for draft in range(9)]
    read = torch.stack([states[token] for token in waiting + drafts])
    pooled = monitor.pool(row, drafts, read, parents)
    for draft in range(9):
        path = path_to(draft, parents)
        alone = monitor.pool(row, [drafts[index] for index in path], read[[0, 1, *(2 + index for index in path)]])
        torch.testing.assert_close(pooled[2 + draft], alone[-1], **TOLERANCE)


@pytest.mark.parametrize(
    ("num_open", "is_newline", "counts", "left"),
    [
        (0, [False] * 5, [0, 1, 2, 3, 0], 1),
        (0, [False, True, False], [0, 1, 0], 1),
        (0, [True, True, True], [0, 1, 0], 1),
        (3, [False], [3], 0),
        (1, [True], [1], 0),
        (0, [True], [0], 1),
        (2, [], [], 2),
    ],
)
def test_a_segment_ends_at_four_tokens_or_at_a_newline_after_two(num_open, is_newline, counts, left):
    assert segment_counts(num_open, is_newline, 2, 4) == (counts, left)


def test_segments_may_be_one_token_long():
    assert segment_counts(0, [False, False], 1, 1) == ([0, 0], 0)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("last", [1.0, 3.0, 8.0, 5.0]),
        ("mean", [1.0, 2.0, 4.0, 5.0]),  # 1, (1+3)/2, (1+3+8)/3, and a new segment
        ("ewma", [1.0, 1.5, 3.125, 5.0]),  # 1, .75*1+.25*3, .75*1.5+.25*8, and a new segment
    ],
)
def test_pooling_of_four_numbers_by_hand(pooling, expected):
    hidden_TF = torch.tensor([[1.0], [3.0], [8.0], [5.0]])
    weights = pooling_weights([0, 1, 2, 0], pooling, DECAY)
    # the numbers are sums of powers of two and a third: one rounding at most
    assert pool(None, hidden_TF, weights)[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pooling", "expected"), [("last", 8.0), ("mean", 3.5), ("ewma", 3.5)])
def test_a_block_goes_on_from_the_pooled_state_before_it(pooling, expected):
    # mean of 3 tokens so far is 2: (3*2 + 8)/4 = 3.5, and .75*2 + .25*8 = 3.5
    pooled = pool(torch.tensor([2.0]), torch.tensor([[8.0]]), pooling_weights([3], pooling, DECAY))
    assert pooled.tolist() == [[expected]]


@pytest.mark.parametrize("pooling", ["last", "mean", "ewma"])
@pytest.mark.parametrize("counts", [[0, 1, 2, 3], [5, 6, 0, 1], [2, 0, 0, 1]])
def test_weights_of_a_token_sum_to_one(pooling, counts):
    sums = pooling_weights(counts, pooling, DECAY).sum(dim=1)
    torch.testing.assert_close(sums, torch.ones(4), atol=1e-6, rtol=0.0)  # four float32 terms of at most 1


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("pooling", ["last", "mean", "ewma"])
def test_what_is_not_finite_reaches_the_tokens_after_it_alone(pooling, value):
    hidden_TF = torch.tensor([[1.0, 1.0], [3.0, value], [8.0, 1.0], [5.0, 1.0]])
    sound_TF = torch.nan_to_num(hidden_TF, nan=1.0, posinf=1.0, neginf=1.0)
    pooled, sound = (pool_block(None, states, [0, 1, 2, 0], pooling, DECAY) for states in (hidden_TF, sound_TF))
    reached = [1] if pooling == "last" else [1, 2]
    assert [index for index, state in enumerate(pooled) if state.isnan().all()] == reached
    kept = [index for index in range(4) if index not in reached]
    assert torch.equal(pooled[kept], sound[kept])
    # a new segment begins anew, whatever was before it
    assert pool_block(torch.full((2,), value), sound_TF[3:], [0], pooling, DECAY).tolist() == [[5.0, 1.0]]
    assert pool_next(torch.full((1, 2), value), sound_TF[3:], [0], pooling, DECAY).tolist() == [[5.0, 1.0]]


@pytest.mark.parametrize("pooling", ["last", "mean", "ewma"])
def test_where_nothing_may_be_looked_at_states_are_pooled_alike(pooling):
    hidden_TF, before_F = torch.randn(4, 3), torch.randn(3)
    weights = pooling_weights([5, 6, 0, 1], pooling, DECAY)
    expected = pool(before_F, hidden_TF, weights)
    assert torch.equal(_pool_apart(before_F, hidden_TF, weights), expected)
    assert torch.equal(_pool_apart(None, hidden_TF, weights), pool(None, hidden_TF, weights))


def test_no_tokens_give_no_pooled_states():
    assert pool(torch.ones(3), torch.zeros(0, 3), pooling_weights([], "mean", DECAY)).shape == (0, 3)


@pytest.mark.parametrize("pooling", ["last", "mean", "ewma"])
@pytest.mark.parametrize("seed", range(5))
def test_one_block_equals_the_loop_over_tokens(pooling, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden_TF, counts = torch.randn(40, 3, generator=generator), random_counts(generator, 40)
    pooled = pool(None, hidden_TF, pooling_weights(counts, pooling, DECAY))
    torch.testing.assert_close(pooled, reference_pool(hidden_TF, counts, pooling), **TOLERANCE)


@pytest.mark.parametrize("pooling", ["last", "mean", "ewma"])
@pytest.mark.parametrize("seed", range(10))
def test_any_split_into_blocks_equals_one_block(pooling, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden_TF, counts = torch.randn(40, 3, generator=generator), random_counts(generator, 40)
    cuts = sorted({0, 40, *torch.randint(1, 40, (6,), generator=generator).tolist()})
    states, parts = PooledStates(), []
    for start, end in pairwise(cuts):
        parts.append(pool(states.last(), hidden_TF[start:end], pooling_weights(counts[start:end], pooling, DECAY)))
        states.append(parts[-1])
    whole = pool(None, hidden_TF, pooling_weights(counts, pooling, DECAY))
    torch.testing.assert_close(torch.cat(parts), whole, **TOLERANCE)


@pytest.mark.parametrize("seed", range(10))
def test_a_rollback_is_an_index(seed):
    generator = torch.Generator().manual_seed(seed)
    states, expected = PooledStates(), torch.zeros(0, 2)
    for _ in range(20):
        block = torch.randn(int(torch.randint(1, 5, (), generator=generator)), 2, generator=generator)
        states.append(block)
        kept = int(torch.randint(0, states.num_tokens + 1, (), generator=generator))
        states.keep(kept)
        expected = torch.cat([expected, block])[:kept]
        last = states.last()
        assert states.num_tokens == kept
        assert (last is None) if kept == 0 else torch.equal(last, expected[-1])


def test_forgotten_states_are_those_before_the_last_final_token():
    states = PooledStates()
    states.append(torch.arange(6.0)[:, None])
    states.forget_before(4)
    states.keep(4)
    assert states.last().tolist() == [3.0]
    states.keep(3)  # an answer may end anywhere, but not go on from there
    with pytest.raises(AssertionError, match="past a final token"):
        states.last()


def test_forgetting_bounds_what_is_held_however_long_the_answer_grows():
    states = PooledStates()
    for step in range(200):
        states.append(torch.ones(4, 2))
        states.forget_before(4 * step)
    assert states._states_WF.shape[0] <= 5  # the four tokens of the last block and the state before them


def test_half_precision_states_are_pooled_in_float32():
    hidden_TF = torch.full((1, 1), 3.0, dtype=torch.bfloat16)
    assert pool(None, hidden_TF, pooling_weights([0], "mean", DECAY)).dtype == torch.float32
