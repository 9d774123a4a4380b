"""Fused attention and MLPs compute what the model's own do, and only those that do are fused."""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from architectures import build_architecture
from tiny import build_head, build_model, perturb
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.engine import fusing
from safespec_hf.engine.cache import CachedModel
from safespec_hf.engine.fusing import Fused, fast_layers, fused_layers

ATTEND = torch.nn.functional.scaled_dot_product_attention
PROMPT = torch.tensor([[12, 18, 24, 13]])
EVEN = ([[5, 6], [7, 8]], [[3], [4]], [[9], [10]])  # nothing is masked in blocks of a token
BLOCKS = ([[5, 6, 7, 8, 9], [10, 11]], [[3], [4]], [[12, 13, 14], [15, 16, 17]], [[20] * 70, [21] * 3])
ALL = 4  # of two layers: attention and MLP


def fused_in(model):
    with fused_layers([model]):
        return [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), Fused)]


def layers(model):
    return model.model.layers


@torch.no_grad()
def answers(model, is_fused, is_packed=True):
    """Logits of ragged blocks with a rollback between them, and of even ones."""
    found = []
    with fast_layers([model], is_packed, False, is_fused):
        for blocks, num_taken_back in ((BLOCKS, 1), (EVEN, 0)):
            cached = CachedModel(model, 2)
            for block in blocks:
                found.append(cached.forward(block, 1).logits_BTV)
                cached.keep([length - num_taken_back for length in cached.lengths])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("name", "num"),
    [
        ("llama", ALL),
        ("mistral", ALL),
        ("qwen2", ALL),
        ("qwen3", ALL),
        ("gemma3_text", ALL),
        ("granite", ALL),
        ("smollm3", ALL),
        ("glm4_moe", ALL),
        ("olmo2", 2),
        ("ministral3", 2),
        ("phi3", 0),
        ("gpt2", 0),
        ("glm", 0),
    ],
)
def test_what_is_of_the_usual_kind_is_fused_and_gives_the_same(name, num):
    model = build_architecture(name)
    assert len(fused_in(model)) == num
    assert fused_in(model) == fused_in(model)
    torch.testing.assert_close(answers(model, True), answers(model, False), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_the_same_places(dtype):
    model = build_model().to(dtype)
    assert len(fused_in(model)) == ALL
    torch.testing.assert_close(answers(model, True), answers(model, False), atol=0.1, rtol=0)


def test_trees_are_masked_as_without():
    model = build_model()
    logits = []
    for is_fused in (True, False):
        cached = CachedModel(model, 1)
        with torch.no_grad(), fast_layers([model], True, False, is_fused):
            cached.forward([[12, 18, 24]], 1)
            logits.append(cached.forward([[13, 5, 6, 7]], 4, parents=[[-1, -1, 1]]).logits_BTV)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


class ScaledByPosition(LlamaAttention):
    """As of models whose queries grow far behind what they were trained on."""

    def forward(self, hidden_states, position_ids=None, **kwargs):
        scale = 1 + torch.log1p((position_ids // 1000).float())[..., None].to(hidden_states.dtype)
        output, weights = super().forward(hidden_states, **kwargs)
        return output * scale, weights


class Louder(LlamaMLP):
    def forward(self, x):
        return 1.01 * super().forward(x)


class WithParameter(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.gain * super().forward(x)


def become(kind, name):
    def change(model):
        module = getattr(layers(model)[0], name)
        kind.__module__ = "transformers.models.other"
        new = kind(model.config, 0) if name == "self_attn" else kind(model.config)
        new.load_state_dict(module.state_dict(), strict=False)
        setattr(layers(model)[0], name, new.eval())

    return change


def own_code(model):
    layers(model)[0].mlp.__class__ = type("Mine", (LlamaMLP,), {"__module__": "my_project"})


@pytest.mark.parametrize(
    ("change", "num"),
    [
        (become(ScaledByPosition, "self_attn"), ALL - 1),
        (become(Louder, "mlp"), ALL - 1),
        (become(WithParameter, "mlp"), ALL - 1),
        (own_code, ALL - 1),
        (lambda model: layers(model)[0].self_attn.k_proj.register_forward_hook(lambda *_: None), ALL - 1),
        (lambda model: layers(model)[1].mlp.down_proj.register_forward_pre_hook(lambda *_: None), ALL - 1),
        (lambda model: setattr(layers(model)[0].mlp, "forward", layers(model)[0].mlp.forward), ALL - 1),
        (lambda model: layers(model)[0].mlp.up_proj.double(), ALL - 1),
        (lambda model: model.set_attn_implementation("eager"), ALL // 2),
        (lambda model: model.double(), 0),
        (lambda model: layers(model)[1].compile(), 0),
        (lambda model: nn.init.zeros_(layers(model)[0].mlp.down_proj.weight), ALL),  # it has been looked at
        (lambda model: model.to("meta"), 0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch.compile
def test_what_is_not_of_the_usual_kind_is_left_alone(change, num):
    model = build_model()
    assert len(fused_in(model)) == ALL
    change(model)
    assert len(fused_in(model)) == num


def test_weights_of_zeros_show_nothing():
    model = build_model()
    nn.init.zeros_(layers(model)[0].mlp.down_proj.weight)
    assert len(fused_in(model)) == ALL - 1


def test_a_class_that_is_changed_later_is_looked_at_again(monkeypatch):
    model, own = build_model(), LlamaMLP.forward
    assert len(fused_in(model)) == ALL
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x) * 2)
    assert len(fused_in(model)) == ALL // 2


def test_a_layer_that_is_put_in_later_counts():
    model = build_model()
    fused_in(model)
    for layer in layers(model):
        layer.mlp.up_proj = nn.Linear(32, 64, bias=False)
        layer.self_attn.q_proj = nn.Linear(32, 32, bias=False)
    torch.testing.assert_close(answers(model, True), answers(model, False), atol=1e-4, rtol=1e-4)


def test_hooks_of_all_modules_see_every_layer():
    model, seen = build_model(), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert fused_in(model) == []
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "name"), [("llama", "mlp.act_fn"), ("qwen3", "self_attn.k_norm")])
def test_hooks_of_other_parts_see_no_numbers_but_the_callers(kind, name):
    model, seen = build_architecture(kind), []
    handle = layers(model)[0].get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    assert len(fused_in(model)) == ALL - 1
    assert seen == []
    handle.remove()
    assert len(fused_in(model)) == ALL


def test_another_attention_under_the_usual_name_is_used():
    model = build_model()
    AttentionInterface.register("sdpa", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    try:
        assert len(fused_in(model)) == ALL // 2
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


def test_unknown_arguments_are_left_to_the_module():
    model = build_model()
    seen = []
    module = layers(model)[0].self_attn
    with fused_layers([model]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", lambda *_, **kwargs: seen.append(kwargs))
        rotary = (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))
        arguments = {"hidden_states": torch.ones(1, 1, 32), "position_embeddings": rotary}
        module(**arguments)
        cached = CachedModel(model, 1).cache
        module(**arguments, cache=cached, past_key_values=cached, position_bias=torch.ones(1, 1, 1, 1))
    assert [set(each) - set(arguments) for each in seen] == [set(), {"cache", "past_key_values", "position_bias"}]


def test_other_threads_and_gradients_have_the_models_own(monkeypatch):
    model = build_model()
    monkeypatch.setattr(fusing.FusedAttention, "run", lambda *_, **__: pytest.fail("fused"))
    with fused_layers([model]), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: model(PROMPT).logits.sum().backward()).result()
        with fused_layers([model], False):
            model(PROMPT)
    assert layers(model)[0].self_attn.q_proj.weight.grad is not None
    assert [module for module in model.modules() if "forward" in vars(module)] == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_a_call_runs_has_its_own_layers(clone):
    model = build_model()
    with torch.no_grad(), fast_layers([model], True):
        other = clone(model)
    torch.nn.init.zeros_(other.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        assert not torch.equal(other(PROMPT).logits, model(PROMPT).logits)
    assert layers(other)[0].mlp.forward.__self__ is layers(other)[0].mlp


def test_models_may_share_layers():
    model = build_model()
    other = build_model(seed=1)
    other.model.layers[0] = layers(model)[0]
    other.model.layers[1].mlp.up_proj = layers(model)[1].mlp.up_proj
    expected = [each(PROMPT, use_cache=True).logits for each in (model, other)]
    with torch.no_grad(), fast_layers([model, model, other], True, False):
        for each, logits in zip((model, other), expected, strict=True):
            torch.testing.assert_close(each(PROMPT, use_cache=True).logits, logits, atol=1e-4, rtol=1e-4)


def test_looking_draws_no_random_number_of_the_callers():
    model = build_model()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fused_in(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_guarded_call_runs_fused_and_says_what_the_target_says(num_rows, tokenizer, monkeypatch):
    model, runs, run = build_model(), [], fusing.FusedAttention.run
    prompts = PROMPT.repeat(num_rows, 1)
    expected = model.generate(prompts, max_new_tokens=12, do_sample=False)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    monkeypatch.setattr(
        fusing.FusedAttention, "run", lambda *args, **kwargs: (runs.append(1), run(*args, **kwargs))[1]
    )
    draft = perturb(model)
    for policy in (SafeSpecConfig(pack_weights=False), SafeSpecConfig()):
        assert not runs
        found = model.generate(prompts, max_new_tokens=12, do_sample=False, assistant_model=draft, safespec=policy)
        assert torch.equal(found, expected)
    assert runs


def test_rows_are_divided_where_it_takes_the_least_time():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        num_rows, num_heads = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(2))
        starts = torch.randint(0, 2000, (num_rows,), generator=generator).tolist()

        def cost(parts, num_heads=num_heads):
            turns = [-(-(rows.stop - rows.start) * num_heads // 2) for rows, _ in parts]
            seen = [2000 - columns.start for _, columns in parts]
            places = (2 / num_heads * turn * num for turn, num in zip(turns, seen, strict=True))
            return sum(places) + fusing._CALL * len(parts)

        parts = fusing.divide_rows(starts, 2000, num_heads, num_threads=2)
        assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(num_rows))
        assert all(columns.start == min(starts[rows]) for rows, columns in parts)
        for cuts in itertools.product([False, True], repeat=num_rows - 1):
            ends = [index + 1 for index, cut in enumerate(cuts) if cut] + [num_rows]
            rows = [slice(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True)]
            assert cost(parts) <= cost([(each, slice(min(starts[each]), None)) for each in rows]) + 1e-6


def test_padding_before_short_rows_is_not_read(monkeypatch):
    monkeypatch.setattr(fusing, "_CALL", 1)
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 6, 2, 8, generator=draw)
    keys, values = (torch.randn(4, 2, 40, 8, generator=draw) for _ in range(2))
    sees = torch.ones(4, 1, 2, 40, dtype=torch.bool)
    for row, start in enumerate((30, 29, 0, 12)):
        sees[row, ..., :start] = False
        sees[row, 0, 0, 39] = sees[row, ..., 35] = False
    keys[0, :, :29], values[1, :, :29] = torch.nan, torch.nan
    seen = []

    def attend(*args, **kwargs):
        seen.append(tuple(args[1].shape[:3:2]))
        return ATTEND(*args, **kwargs)

    monkeypatch.setattr(fusing.F, "scaled_dot_product_attention", attend)
    ours = fusing._attend_in_groups(queries, keys, values, sees, 0.3)
    assert seen == [(2, 11), (1, 40), (1, 28)]
    expected = ATTEND(queries, keys.nan_to_num(), values.nan_to_num(), sees, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, expected.transpose(1, 2), atol=1e-5, rtol=1e-5, equal_nan=True)
