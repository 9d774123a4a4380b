"""Whatever happens to a layer, it holds what transformers' own layer would, and never writes into shared states."""

import random

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from safespec_hf.engine import growing
from safespec_hf.engine.growing import GrowingLayer, growing_cache, make_plain


def block(num_rows, num_tokens):
    return torch.randn(num_rows, 2, num_tokens, 4), torch.randn(num_rows, 2, num_tokens, 3)


@pytest.mark.parametrize("seed", range(8))
def test_it_holds_what_a_dynamic_layer_holds(seed, monkeypatch):
    monkeypatch.setattr(growing, "ROOM", 5)
    choose, layer, reference = random.Random(seed), GrowingLayer(), DynamicLayer()
    for _ in range(60):
        num_rows = 2 if reference.keys is None else reference.keys.shape[0]
        added = block(num_rows, choose.randint(1, 4))
        for got, expected in zip(layer.update(*added), reference.update(*added), strict=True):
            assert torch.equal(got, expected)
        for one in (layer, reference):
            one.crop(-(seed % 3))
        if choose.random() < 0.2:
            rows = torch.tensor([choose.randrange(num_rows) for _ in range(2)])
            layer.batch_select_indices(rows)
            reference.batch_select_indices(rows)
        assert layer.get_seq_length() == reference.get_seq_length()
        assert torch.equal(layer.keys, reference.keys)
        assert torch.equal(layer.values, reference.values)


def test_a_block_is_written_in_place():
    layer = GrowingLayer()
    before = layer.update(*block(1, 3))[0].data_ptr()
    layer.crop(-1)
    assert layer.update(*block(1, 4))[0].data_ptr() == before


def test_states_that_were_set_are_never_written():
    shared = [part.expand(3, -1, -1, -1) for part in block(1, 6)]
    kept, layer = [part.clone() for part in shared], GrowingLayer()
    layer.update(*block(3, 1))
    layer.keys, layer.values = shared
    layer.crop(-4)
    layer.update(*block(3, 4))
    assert all(torch.equal(now, before) for now, before in zip(shared, kept, strict=True))


def test_reset_forgets_everything():
    layer = GrowingLayer()
    layer.update(*block(1, 3))
    layer.reset()
    assert layer.keys is None
    assert layer.update(*block(2, 2))[0].shape == (2, 2, 2, 4)


def test_a_plain_cache_belongs_to_transformers_and_autograd():
    with torch.inference_mode():
        cache = growing_cache()
        keys = cache.update(*block(1, 3), 0)[0].clone()
    make_plain(cache)
    assert type(cache) is DynamicCache
    assert type(cache.layers[0]) is DynamicLayer
    assert not cache.layers[0].keys.is_inference()
    assert torch.equal(cache.update(*block(1, 1), 0)[0][:, :, :3], keys)
    cache.update(*block(1, 1), 1)
    assert type(cache.layers[1]) is DynamicLayer
