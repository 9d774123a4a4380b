"""Packed weights give the products of the weights they were packed from, and are noticed to be out of date."""

import copy

import pytest
import torch
from tiny import build_draft_head, build_head, build_model
from torch import nn
from torch.nn import functional as F

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.engine import packing as packing_module
from safespec_hf.engine.packing import multiply, pack, packed_weights

PROMPT = torch.tensor([[12, 18, 24, 13]])
is_supported = pack(torch.ones(2, 2, dtype=torch.bfloat16)) is not None
pytestmark = pytest.mark.skipif(not is_supported, reason="no oneDNN with bfloat16 here")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def model(request):
    return build_model().to(request.param)


def packed_layers(model):
    return [layer for layer in model.modules() if "forward" in layer.__dict__]


@pytest.mark.parametrize("num_inputs", [1, 5, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_the_matrix(num_inputs, has_bias):
    torch.manual_seed(0)
    weight, inputs = torch.randn(48, 40).bfloat16(), torch.randn(2, num_inputs, 40).bfloat16()
    bias = torch.randn(48).bfloat16() if has_bias else None
    # both round a float32 sum of 40 terms once: at most one step of bfloat16 apart
    torch.testing.assert_close(
        multiply(inputs, pack(weight), bias), F.linear(inputs, weight, bias), atol=0, rtol=2**-7
    )


def test_every_linear_layer_is_packed_while_it_is_wanted_and_none_afterwards(model):
    with packed_weights([model, build_draft_head(model).to(model.dtype).bind(model)]):
        assert len(packed_layers(model)) == 2 * 7 + 1
    assert packed_layers(model) == []


def test_layers_are_left_as_they_were_after_an_error(model):
    with pytest.raises(KeyboardInterrupt), packed_weights([model]):
        raise KeyboardInterrupt
    assert packed_layers(model) == []


@torch.no_grad()
def test_a_forward_gives_what_it_gives_without(model):
    expected = model(PROMPT).logits
    with packed_weights([model]):
        torch.testing.assert_close(model(PROMPT).logits, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(1.0),
        lambda weight: weight.data.add_(1.0),  # as merging an adapter does; the version counter stays as it is
        lambda weight: weight.data.__setitem__((3, 3), 7.0),
    ],
)
@torch.no_grad()
def test_changed_weights_are_packed_anew(model, change):
    layer = model.model.layers[0].mlp.up_proj
    with packed_weights([model]):
        pass
    change(layer.weight)
    inputs = torch.randn(1, 32, dtype=model.dtype)
    with packed_weights([model]):
        torch.testing.assert_close(layer(inputs), F.linear(inputs, layer.weight), atol=0.05, rtol=2**-7)


def test_unchanged_weights_are_packed_once(model, monkeypatch):
    with packed_weights([model]):
        pass
    monkeypatch.setattr(packing_module, "pack", lambda _: pytest.fail("packed again"))
    with packed_weights([model]):
        assert packed_layers(model)


def test_a_copy_of_the_model_has_its_own_weights(model):
    with packed_weights([model]):
        pass
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.lm_head.weight)
    with torch.no_grad(), packed_weights([model, other]):
        assert other(PROMPT).logits.abs().max() == 0
        assert model(PROMPT).logits.abs().max() > 0


class Adapter(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) + 1


def test_what_is_not_a_plain_linear_layer_is_left_alone(model):
    model.lm_head = Adapter(32, 40, dtype=model.dtype)
    hooked = model.model.layers[0].mlp.up_proj
    hooked.forward = hooked.forward  # as an offloading hook does
    with packed_weights([model, build_model().half()]):
        assert len(packed_layers(model)) == 2 * 7
        assert hooked.forward.__func__ is nn.Linear.forward


@pytest.mark.parametrize(("wanted", "is_packed"), [(None, False), (True, True), (False, False)])
def test_more_than_nobody_has_to_be_asked_for_is_packed_on_request_only(model, monkeypatch, wanted, is_packed):
    monkeypatch.setattr(packing_module, "MAX_AUTO_BYTES", 1000)
    with packed_weights([model], wanted):
        assert bool(packed_layers(model)) is is_packed


def test_guarded_decoding_runs_packed_unless_told_otherwise(model, tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(
        packing_module, "multiply", lambda *args, **kwargs: (calls.append(1), multiply(*args, **kwargs))[1]
    )
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    for wanted in (False, None):
        assert not calls
        policy = SafeSpecConfig(pack_weights=wanted)
        model.generate(PROMPT, max_new_tokens=4, do_sample=False, safespec=policy)
    assert calls
