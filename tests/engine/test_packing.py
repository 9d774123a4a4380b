"""Packed weights give the products of the weights they were packed from, and are noticed to be out of date."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import build_draft_head, build_head, build_model, build_noisy_head, cheap_drafts, perturb
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from safespec_hf import SafeSpecConfig, attach_safety_head, detach_safety_head
from safespec_hf.engine import packing as packing_module
from safespec_hf.engine.fingerprints import fingerprint
from safespec_hf.engine.packing import packed_weights, release_packed
from safespec_hf.engine.products import LAYOUTS, PLAIN, usual_layouts

PROMPT = torch.tensor([[12, 18, 24, 13]])
DTYPES = [dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if usual_layouts(dtype)[0] != PLAIN]
pytestmark = pytest.mark.skipif(not DTYPES, reason="no packed products here")


@pytest.fixture(params=DTYPES, ids=str)
def model(request):
    return build_model().to(request.param)


def packed_layers(model):
    return [layer for layer in model.modules() if "forward" in layer.__dict__]


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
        lambda weight: weight.data.copy_(weight.flip(0)),  # the same numbers, and so the same sum of them
        lambda weight: weight.data.copy_(weight.flip(1)),
        lambda weight: weight.data.copy_(weight[[1, 0, *range(2, 64)]]),
        lambda weight: setattr(weight, "data", weight.data + 1),
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
    never = {name: layout._replace(pack=lambda _: pytest.fail("packed again")) for name, layout in LAYOUTS.items()}
    monkeypatch.setattr(packing_module, "LAYOUTS", never)
    with packed_weights([model]):
        assert packed_layers(model)


@torch.no_grad()
def test_weights_that_do_not_fit_into_what_was_chosen_for_their_kind_are_packed_otherwise(monkeypatch):
    model = build_model()
    model.lm_head.weight.copy_(model.lm_head.weight.bfloat16())  # fits into 16 bits; the others don't
    monkeypatch.setattr(packing_module, "usual_layouts", lambda _: ("halves",) * 4)
    inputs = torch.randn(1, 32)
    with packed_weights([model], True):
        for layer in (model.lm_head, model.model.layers[0].mlp.up_proj):
            assert None not in layer.forward.products
            torch.testing.assert_close(layer(inputs), F.linear(inputs, layer.weight), atol=1e-5, rtol=1e-5)
    names = [set(copies.matrices) for copies in packing_module._COPIES.values()]
    assert {"halves", "blocks"} in names


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
    with packed_weights([model, build_model().double()]):
        assert len(packed_layers(model)) == 2 * 7
        assert hooked.forward.__func__ is nn.Linear.forward


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "put_on",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        nn.utils.weight_norm,
        lambda layer: layer.register_forward_pre_hook(lambda layer, _: layer.weight.data.neg_()),
    ],
    ids=["pruning", "weight_norm", "one of the user's"],
)
@torch.no_grad()
def test_a_layer_whose_hook_sets_its_weight_is_left_alone(model, put_on):
    layer, inputs = model.model.layers[0].mlp.down_proj, torch.randn(1, 64, dtype=model.dtype)
    put_on(layer)
    with packed_weights([model], True):
        layer(inputs)
        for name, weight in layer.named_parameters():
            weight.mul_(-1.5 if name != "weight" else 1.0)
        changed = layer(inputs)
        assert len(packed_layers(model)) == 2 * 7
    layer(inputs)  # so that the user's own hook has turned it as often
    assert torch.equal(changed, layer(inputs))


def test_layers_under_a_hook_of_accelerate_that_moves_inputs_only_are_packed():
    model = add_hook_to_module(build_model(), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with packed_weights([model], True):
        assert len(packed_layers(model)) == 2 * 7 + 1 + 1  # accelerate's own forward of the model is one


@pytest.mark.parametrize(("wanted", "is_packed"), [(None, False), (True, True), (False, False)])
def test_more_than_nobody_has_to_be_asked_for_is_packed_on_request_only(model, monkeypatch, wanted, is_packed):
    monkeypatch.setattr(packing_module, "MAX_AUTO_BYTES", 1000)
    with packed_weights([model], wanted):
        assert bool(packed_layers(model)) is is_packed


def counting(multiply, calls):
    return lambda *args: (calls.append(1), multiply(*args))[1]


def test_guarded_decoding_runs_packed_unless_told_otherwise(model, tokenizer, monkeypatch):
    calls = []
    counted = {name: layout._replace(multiply=counting(layout.multiply, calls)) for name, layout in LAYOUTS.items()}
    monkeypatch.setattr(packing_module, "LAYOUTS", counted)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    for wanted in (False, None):
        assert not calls
        policy = SafeSpecConfig(pack_weights=wanted)
        model.generate(PROMPT, max_new_tokens=4, do_sample=False, safespec=policy)
    assert calls


def test_a_changed_bias_counts(model):
    layer = nn.Linear(32, 8, dtype=model.dtype)
    for change in (lambda: layer.bias.data.add_(1.0), lambda: setattr(layer, "bias", nn.Parameter(layer.bias + 1))):
        with packed_weights([layer], True):
            pass
        change()
        inputs = torch.randn(1, 32, dtype=model.dtype)
        expected = layer(inputs)
        with torch.no_grad(), packed_weights([layer], True):
            torch.testing.assert_close(layer(inputs), expected, atol=0.05, rtol=2**-7)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 32), (33, 1001), (70, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fingerprint_changes_with_every_bit_and_with_the_order(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    seen = {fingerprint(weight)}
    assert fingerprint(weight.clone()) in seen
    choose = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = weight.clone()
        place, elsewhere = torch.randint(weight.numel(), (2,), generator=choose).tolist()
        flat = other.view(-1)
        flat[[place, elsewhere]] = flat[[elsewhere, place]]
        if torch.equal(other, weight):
            other.view(torch.int16).view(-1)[place] ^= 1
        seen.add(fingerprint(other))
    assert len(seen) > min(weight.numel(), 15)


def num_copies(model):
    places = {packing_module._place(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    return len(places.intersection(place for stack in packing_module._COPIES for place in stack))


def packed_once(model):
    with packed_weights([model], True):
        pass
    assert num_copies(model) == 2 * 7 + 1
    copies = [copy for copies in packing_module._COPIES.values() for copy in copies.matrices.values()]
    return [weakref.ref(getattr(copy, "matrix", copy)) for copy in copies]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.float().half(),
        lambda model: model.to("meta"),
        lambda model: model.to_empty(device="cpu"),
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        release_packed,
    ],
)
def test_copies_end_with_the_weights_that_they_were_made_from(model, change):
    packing_module._COPIES.clear()
    copies = packed_once(model)
    change(model)
    gc.collect()
    assert [copy for copy in copies if copy() is not None] == []
    assert packing_module._COPIES == {}


def test_copies_end_with_the_model():
    packing_module._COPIES.clear()
    model = build_model()
    copies = packed_once(model)
    del model
    gc.collect()
    assert [copy for copy in copies if copy() is not None] == []


def test_a_detached_model_has_no_copies(model, tokenizer):
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    model.generate(PROMPT, max_new_tokens=4, do_sample=False, safespec=True)
    assert num_copies(model) == 2 * 7 + 1
    assert num_copies(detach_safety_head(model)) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pack_weights", [True, False])
def test_under_autocast_answers_are_the_targets_and_training_goes_on(kind, pack_weights, tokenizer):
    model = build_model(kind)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    policy, arguments = SafeSpecConfig(pack_weights=pack_weights), {"max_new_tokens": 12, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16), cheap_drafts():
        expected = model.generate(PROMPT, **arguments)
        for draft in (None, perturb(model), build_draft_head(model)):
            assert torch.equal(model.generate(PROMPT, safespec=policy, assistant_model=draft, **arguments), expected)
        model(PROMPT).logits.sum().backward()


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_default_dtype_does_not_matter(dtype, do_sample, tokenizer, default_dtype):
    model = build_model()
    draft = perturb(model)
    attach_safety_head(model, build_noisy_head(model, 0.8), tokenizer=tokenizer)
    policy = SafeSpecConfig(max_segment_tokens=4, num_candidates=3, reflection="pause think", refusal="no", seed=1)
    outputs = []
    for chosen in (torch.float32, dtype):
        default_dtype(chosen)
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                PROMPT,
                max_new_tokens=16,
                do_sample=do_sample,
                safespec=policy,
                assistant_model=draft,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].risks.nan_to_num(), outputs[1].risks.nan_to_num())
