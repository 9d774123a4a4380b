"""EAGLE-3 checkpoints, in both formats: what is read of them, what they draft, and what is refused."""

import json

import pytest
import torch
from drafting_methods import bigram_model, write_eagle3
from safetensors.torch import load_file, save_file
from tiny import POLICY, PROMPT, attach, build_model

from safespec_hf import HeadFileError, UnsupportedRequestError, load_eagle3_draft
from safespec_hf.heads.eagle import Eagle3Head


@pytest.fixture
def model():
    return bigram_model()


def change(folder, **weights):
    """The checkpoint with other weights; `None` takes one out."""
    found = load_file(folder / "model.safetensors") | weights
    save_file({name: weight for name, weight in found.items() if weight is not None}, folder / "model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("norms", [False, True])
def test_its_states_are_those_of_the_layer_written_out(model, tmp_path, norms):
    torch.manual_seed(0)
    write_eagle3(tmp_path, model, norm_before_residual=norms)
    width, given = 32, load_file(tmp_path / "model.safetensors")
    weights = {name: 0.3 * torch.randn_like(weight) for name, weight in given.items() if weight.is_floating_point()}
    extra = {"input_norm.weight": torch.rand(3 * width)} if norms else {}
    change(tmp_path, **weights, **extra)
    draft = load_eagle3_draft(tmp_path, model)
    states = torch.randn(1, 1, 3 * width)

    def norm(values, name):
        return torch.nn.functional.rms_norm(values, values.shape[-1:], (weights | extra)[name], 1e-6)

    layer = "midlayer."
    fused = (norm(states, "input_norm.weight") if norms else states) @ weights["fc.weight"].T
    normed = norm(fused, f"{layer}hidden_norm.weight")
    embedded = norm(model.get_input_embeddings()(torch.tensor([[11]])), f"{layer}input_layernorm.weight")
    # the only position attends to itself, so that positions and queries say nothing
    value = torch.cat([embedded, normed], -1) @ weights[f"{layer}self_attn.v_proj.weight"].T
    hidden = (normed if norms else fused) + value @ weights[f"{layer}self_attn.o_proj.weight"].T
    inner = norm(hidden, f"{layer}post_attention_layernorm.weight")
    gate, up = (inner @ weights[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    hidden = hidden + (torch.nn.functional.silu(gate) * up) @ weights[f"{layer}mlp.down_proj.weight"].T
    output = draft(torch.tensor([[11]]), states)
    # the sums are made in another order
    assert torch.allclose(output.hidden_states, hidden, atol=1e-4)
    assert torch.allclose(output.logits, norm(hidden, "norm.weight") @ weights["lm_head.weight"].T, atol=1e-4)


def test_both_formats_say_the_same(model, tmp_path):
    theirs = load_eagle3_draft(write_eagle3(tmp_path / "authors", model, norm_before_residual=True), model)
    ours = load_eagle3_draft(write_eagle3(tmp_path / "speculators", model, is_speculators=True), model)
    assert all(torch.equal(*pair) for pair in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert theirs.config.hidden_layers == ours.config.hidden_layers == [2, 3, 3]
    assert ours.embedding is None  # as it has those of the target
    assert ours.token_ids.tolist() == list(range(10, 40))


@pytest.mark.parametrize("where", ["top", "eagle_config"])
def test_the_layers_that_it_names_are_read(model, tmp_path, where):
    layers = {"eagle_aux_hidden_state_layer_ids": [1, 2, 5]}
    write_eagle3(tmp_path, model, **(layers if where == "top" else {"eagle_config": layers}))
    assert load_eagle3_draft(tmp_path, model).config.hidden_layers == [1, 2, 5]


def test_embeddings_of_its_own_are_kept(model, tmp_path):
    change(write_eagle3(tmp_path, model), **{"embed_tokens.weight": torch.ones(40, 32)})
    draft = load_eagle3_draft(tmp_path, model)
    assert torch.equal(draft.embed(torch.tensor([[5]])), torch.ones(1, 1, 32))


def test_it_can_be_saved_and_loaded_as_other_heads_are(model, tmp_path):
    draft = load_eagle3_draft(write_eagle3(tmp_path / "theirs", model), model)
    draft.save_pretrained(tmp_path / "ours")
    again = Eagle3Head.from_pretrained(tmp_path / "ours").bind(model)
    ids, states = torch.tensor([[11, 12]]), torch.randn(1, 2, 96)
    assert torch.equal(again(ids, states).logits, draft(ids, states).logits)


@pytest.mark.parametrize("kind", [None, "linear", "llama3", "yarn", "mrope"])
def test_rotary_positions_of_every_known_kind_draft(model, tokenizer, tmp_path, kind):
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 32}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    scaling = {"type": "mrope", "mrope_section": [4, 6, 6]} if kind == "mrope" else scaling
    write_eagle3(tmp_path, model, rope_scaling=scaling if kind else None)
    draft = load_eagle3_draft(tmp_path, model)
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    attach(model, tokenizer)
    output = model.generate(
        PROMPT,
        max_new_tokens=12,
        do_sample=False,
        assistant_model=draft,
        safespec=POLICY,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected)
    assert output.statistics.num_accepted_tokens > 0


REFUSED = {
    "two layers": ({"num_hidden_layers": 2}, {}, UnsupportedRequestError, "one layer"),
    "another width": ({"hidden_size": 16}, {}, UnsupportedRequestError, "32 states"),
    "another vocabulary": ({"vocab_size": 50}, {}, UnsupportedRequestError, "40 tokens"),
    "another activation": ({"hidden_act": "gelu"}, {}, UnsupportedRequestError, "silu"),
    "dynamic positions": ({"rope_scaling": {"type": "dynamic"}}, {}, UnsupportedRequestError, "'dynamic'"),
    "the last layer": (
        {"eagle_aux_hidden_state_layer_ids": [1, 2, 6]},
        {},
        UnsupportedRequestError,
        "below 6",
    ),
    "two hidden states": ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, {}, UnsupportedRequestError, "96 features"),
    "a bias": ({}, {"midlayer.self_attn.q_proj.bias": torch.zeros(32)}, UnsupportedRequestError, "q_proj.bias"),
    "no size": ({"hidden_size": None}, {}, UnsupportedRequestError, "hidden_size"),
    "no heads": ({"num_attention_heads": 0}, {}, HeadFileError, "makes no head"),
    "another kind": ({"speculators_model_type": "mlp"}, {}, HeadFileError, "'mlp'"),
    "no fc": ({}, {"fc.weight": None}, HeadFileError, "no EAGLE-3 head"),
    "no LM head": ({}, {"lm_head.weight": None}, HeadFileError, "makes no head"),
    "a missing weight": ({}, {"midlayer.mlp.up_proj.weight": None}, HeadFileError, "gate_up_proj"),
    "another shape": ({}, {"norm.weight": torch.ones(16)}, HeadFileError, "norm"),
    "nan": ({}, {"norm.weight": torch.full((32,), torch.nan)}, HeadFileError, "not finite"),
    "ids beyond the vocabulary": ({}, {"d2t": torch.full((30,), 20)}, HeadFileError, "token_ids|ascending"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(model, tmp_path, name):
    fields, weights, kind, message = REFUSED[name]
    change(write_eagle3(tmp_path, model, **fields), **weights)
    with pytest.raises(kind, match=message):
        load_eagle3_draft(tmp_path, model)


def test_files_that_are_missing_or_cut_are_named(model, tmp_path):
    with pytest.raises(HeadFileError, match="no such folder"):
        load_eagle3_draft(tmp_path / "nowhere", model)
    write_eagle3(tmp_path, model)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(HeadFileError, match="No EAGLE-3 head could be loaded"):
        load_eagle3_draft(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps({})[:1])
    with pytest.raises(HeadFileError, match="No EAGLE-3 head could be loaded"):
        load_eagle3_draft(tmp_path, model)


def test_it_drafts_for_its_target_only(model, tokenizer, tmp_path):
    draft = load_eagle3_draft(write_eagle3(tmp_path, model), model)
    other = attach(build_model(num_hidden_layers=3), tokenizer)
    with pytest.raises(ValueError, match="num_layers"):
        other.generate(PROMPT, max_new_tokens=4, assistant_model=draft, safespec=True)
