"""Caches of callers are opened with a column for each token, and filled as the sequences lie."""

import numpy as np
import pytest
import torch
from architectures import build_architecture
from tiny import build_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from safespec_hf import UnsupportedRequestError
from safespec_hf.engine.cache import CACHE_NAME
from safespec_hf.engine.callers_cache import check_user_cache, fill_cache, lay_out, open_cache
from safespec_hf.engine.growing import column_states


def filled(model, num_tokens, num_rows=1):
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.full((num_rows, num_tokens), 11), **{CACHE_NAME: cache})
    return cache


@pytest.mark.parametrize(("shape", "num_cached"), [((2, 5), 3), ((1, 3), 3), ((1, 2), 3)])
def test_a_cache_that_does_not_fit_the_prompt_is_refused(target, shape, num_cached):
    with pytest.raises(UnsupportedRequestError, match="as many rows as it has, each longer than the cache"):
        check_user_cache(target, filled(target, num_cached), shape)


def test_a_cache_of_another_kind_is_refused_by_name(target):
    offloaded = DynamicCache(config=target.config, offloading=True)
    recurrent = build_architecture("mamba2")
    for model, cache, name in ((target, offloaded, "not offloaded"), (recurrent, DynamicCache(), "recurrent states")):
        with pytest.raises(UnsupportedRequestError, match=name):
            check_user_cache(model, cache, (1, 4))


def test_a_static_cache_without_room_for_the_answer_is_refused(target):
    cache = StaticCache(config=target.config, max_cache_len=8)
    assert check_user_cache(target, cache, (1, 4), max_length=9) is None
    with pytest.raises(UnsupportedRequestError, match="room for 8 tokens, but the text may get 10"):
        check_user_cache(target, cache, (1, 4), max_length=10)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_cache_of_a_part_of_the_prompt_is_taken(target, num_rows):
    assert check_user_cache(target, filled(target, 3, num_rows), (num_rows, 4)) is None


@pytest.mark.parametrize("num_tokens", [3, 20])
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("kind", ["llama", "sliding", "alternating"])
def test_what_is_filled_opens_as_it_was_but_for_what_no_window_reaches(kind, is_static, num_tokens):
    model = build_model(kind)
    whole = [column_states(layer) for layer in filled(model, num_tokens, 2).layers]
    given = StaticCache(config=model.config, max_cache_len=24) if is_static else None
    cache = fill_cache(model, whole, given)
    assert (cache is given) is is_static
    assert int(cache.get_seq_length()) == num_tokens
    for layer, opened, states in zip(cache.layers, open_cache(cache).layers, whole, strict=True):
        kept = 7 if getattr(layer, "is_sliding", False) else num_tokens
        assert opened.keys.shape == states[0].shape
        assert torch.equal(opened.keys[:, :, -kept:], states[0][:, :, -kept:])
        assert torch.equal(opened.values[:, :, -kept:], states[1][:, :, -kept:])


def test_filling_again_leaves_nothing_of_before(target):
    cache = filled(target, 6)
    fewer = [column_states(layer) for layer in filled(target, 4).layers]
    assert fill_cache(target, fewer, cache) is cache
    assert cache.get_seq_length() == 4


def test_a_windows_layer_says_how_much_it_has_seen():
    layer = DynamicSlidingWindowLayer(sliding_window=4)
    cache = DynamicCache()
    cache.layers.append(layer)
    states = [[torch.rand(1, 1, 9, 2), torch.rand(1, 1, 9, 2)]]
    fill_cache(build_model(), states, cache)
    assert (layer.get_seq_length(), layer.keys.shape[2]) == (9, 3)


def test_rows_lie_where_their_tokens_do():
    rows = [[[torch.ones(1, 1, 2, 1)]], [[2 * torch.ones(1, 1, 4, 1)]]]
    ((states,),) = lay_out(rows, [np.array([1, 3]), np.arange(4)], 3)
    assert states[:, 0, :, 0].tolist() == [[0, 1, 0], [2, 2, 2]]
