"""A draft head drafts from the target's states, one step or a block at a time, and survives saving."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_model
from transformers import AutoModel, DynamicCache

from safespec_hf import (
    DraftHead,
    DraftHeadConfig,
    HeadFileError,
    HeadMismatchError,
    UnsupportedRequestError,
    target_binding,
)

SIZES = {"hidden_size": 32, "vocab_size": 40, "draft_vocab_size": 12, "intermediate_size": 48, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # the same float32 sums in another order


def build_config(target, **config):
    fields = {**SIZES, **HEADS, "hidden_layers": [0, 1, 2], "target": target_binding(target), **config}
    return DraftHeadConfig(**fields)


def build_draft(target, **config):
    torch.manual_seed(5)
    draft = DraftHead(build_config(target, **config)).eval()
    for weight in draft.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    draft.token_ids.copy_(torch.arange(3, 39, 3))
    return draft.bind(target)


@pytest.fixture
def draft(target):
    return build_draft(target)


@pytest.fixture
def ids():
    return torch.randint(0, 40, (2, 9))


@pytest.fixture
def states():
    return torch.randn(2, 9, 96)


def reference(draft, target, ids, states):
    """The head written out for whole rows, with nothing fused and nothing cached."""
    config = draft.config

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def rotate(x):
        angles = torch.arange(x.shape[2])[:, None] / config.rope_theta ** (torch.arange(0, 8, 2) / 8)
        first, second = x[..., :4], x[..., 4:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    states = draft.fuse(states)
    inputs = [norm(target.get_input_embeddings()(ids), draft.input_norms[0]), norm(states, draft.input_norms[1])]
    heads = draft.qkv_proj(torch.cat(inputs, -1)).view(*ids.shape, 8, 8).transpose(1, 2)
    query, key, value = rotate(heads[:, :4]), rotate(heads[:, 4:6]).repeat_interleave(2, 1), heads[:, 6:]
    scores = query @ key.transpose(2, 3) / 8**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
    mixed = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    hidden = states + draft.o_proj(mixed.transpose(1, 2).flatten(2))
    gate, up = draft.gate_up_proj(norm(hidden, draft.mlp_norm)).chunk(2, -1)
    hidden = hidden + draft.down_proj(torch.nn.functional.silu(gate) * up)
    logits = target.get_output_embeddings()(norm(hidden, draft.norm))
    return logits[..., draft.token_ids], hidden


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_head_computes_what_is_written_down(kind, ids, states):
    target = build_model(kind)
    draft = build_draft(target)
    logits, hidden = reference(draft, target, ids, states)
    outputs = draft(ids, states)
    torch.testing.assert_close(outputs.logits, logits, **CLOSE)
    torch.testing.assert_close(outputs.hidden_states, hidden, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [3, 1, 5], [8, 1]])
def test_blocks_give_what_the_whole_gives(draft, ids, states, sizes):
    cache = DynamicCache()
    parts = zip(ids.split(sizes, 1), states.split(sizes, 1), strict=True)
    logits = torch.cat([draft(part, state, cache).logits for part, state in parts], 1)
    torch.testing.assert_close(logits, draft(ids, states).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("num_new", [1, 3])
def test_holes_and_padding_change_nothing(draft, ids, states, num_new):
    used = torch.tensor([[1] * 9, [0, 0, 1, 1, 0, 1, 0, 1, 1]])
    positions = torch.from_numpy(np.maximum(used.numpy().cumsum(1) - 1, 0))
    first, last = slice(0, 9 - num_new), slice(9 - num_new, 9)
    cache = draft(ids[:, first], states[:, first], None, positions[:, first], used[:, first]).cache
    logits = draft(ids[:, last], states[:, last], cache, positions[:, last], used).logits
    columns = used[1].bool()
    alone = draft(ids[1:, columns], states[1:, columns]).logits
    torch.testing.assert_close(logits[1, -1], alone[0, -1], **CLOSE)
    torch.testing.assert_close(logits[0], draft(ids[:1], states[:1]).logits[0, last], **CLOSE)
    assert bool(logits.isfinite().all())


@torch.no_grad()
def test_its_own_states_are_taken_as_they_are(draft, ids, states):
    fused = draft.fuse(states)
    assert torch.equal(draft(ids, states).logits, draft(ids, fused).logits)
    mixed = torch.cat([states[:, :4], torch.nn.functional.pad(fused[:, 4:], (0, 64))], 1)
    torch.testing.assert_close(draft(ids, mixed, num_fused=4).logits, draft(ids, states).logits, **CLOSE)


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed(draft, ids, states):
    outputs = draft(ids, states, logits_to_keep=2)
    torch.testing.assert_close(outputs.logits, draft(ids, states).logits[:, -2:], **CLOSE)
    assert outputs.hidden_states.shape == (2, 9, 32)
    assert draft._supports_logits_to_keep()


@torch.no_grad()
def test_without_use_cache_the_cache_is_read_and_left_alone(draft, ids, states):
    cache = draft(ids[:, :6], states[:, :6]).cache
    logits = draft(ids[:, 6:], states[:, 6:], cache, use_cache=False).logits
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(logits, draft(ids, states).logits[:, 6:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_the_precision_it_is_cast_to(target, ids, states, dtype):
    draft = build_draft(target)
    expected = draft(ids, states).logits.argmax(-1)
    logits = draft.to(dtype)(ids, states.to(dtype)).logits
    assert logits.dtype == dtype
    assert (logits.argmax(-1) == expected).float().mean() > 0.8  # a near tie may turn over


@pytest.mark.parametrize("load", [DraftHead.from_pretrained, AutoModel.from_pretrained])
@torch.no_grad()
def test_a_saved_head_drafts_the_same(draft, target, ids, states, tmp_path, load):
    draft.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = load(tmp_path).bind(target)
    assert torch.equal(loaded(ids, states).logits, draft(ids, states).logits)


def test_nothing_of_the_target_is_saved(draft, tmp_path):
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == {
        *("fuse.weight", "input_norms", "qkv_proj.weight", "o_proj.weight", "mlp_norm"),
        *("gate_up_proj.weight", "down_proj.weight", "norm", "token_ids"),
    }
    assert weights["token_ids"].tolist() == draft.token_ids.tolist()


DAMAGES = {
    "missing": lambda weights: weights.pop("norm"),
    "unknown": lambda weights: weights.update(other=torch.zeros(1)),
    "of another shape": lambda weights: weights.update(norm=torch.zeros(31)),
    "not finite": lambda weights: weights["fuse.weight"].fill_(torch.nan),
    "not ascending ids": lambda weights: weights["token_ids"].fill_(3),
    "token_ids of another shape": lambda weights: weights.update(token_ids=torch.arange(11)),
}


@pytest.mark.parametrize("problem", list(DAMAGES))
def test_bad_weights_are_refused(draft, tmp_path, problem):
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    DAMAGES[problem](weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HeadFileError, match=problem):
        DraftHead.from_pretrained(tmp_path)


def test_another_target_is_refused(draft, target):
    other = build_model(num_hidden_layers=3)
    with pytest.raises(HeadMismatchError, match=r"draft head was trained for another target.*num_layers"):
        draft.bind(other)
    assert draft.bind(other, ignore_mismatches=("num_layers",)) is draft


@pytest.mark.parametrize(
    "change",
    [
        lambda target: target.load_state_dict(build_model(seed=3).state_dict()),
        lambda target: target.lm_head.weight.mul_(2.0),
        lambda target: setattr(target.lm_head, "weight", torch.nn.Parameter(torch.ones(40, 32))),
        lambda target: setattr(target, "lm_head", torch.nn.Linear(32, 40)),
    ],
    ids=["another checkpoint", "written", "another weight", "another layer"],
)
@torch.no_grad()
def test_bound_again_it_has_the_rows_that_the_target_has_now(target, change):
    draft = build_draft(target)
    before = draft.output.weight
    assert draft.bind(target).output.weight is before
    change(target)
    assert torch.equal(draft.bind(target).output.weight, target.lm_head.weight[draft.token_ids])
    if target.lm_head.bias is not None:
        assert torch.equal(draft.output.bias, target.lm_head.bias[draft.token_ids])


@torch.no_grad()
def test_what_was_excused_once_stays_excused(draft):
    other = build_model(num_hidden_layers=3)
    draft.bind(other, ignore_mismatches=("num_layers",))
    other.lm_head.weight.mul_(2.0)
    assert torch.equal(draft.bind(other).output.weight, other.lm_head.weight[draft.token_ids])


def test_it_must_be_bound_before_it_is_used(target, ids, states):
    with pytest.raises(UnsupportedRequestError, match=r"call `draft\.bind"):
        DraftHead(build_config(target))(ids, states)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_layers": [1]},
        {"hidden_layers": [-1, 2]},
        {"draft_vocab_size": 41},
        {"num_attention_heads": 3},
        {"head_dim": 7},
        {"rope_theta": 0.0},
        {"num_hidden_layers": 2},
        {"intermediate_size": 0},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(target, fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` must be"):
        build_config(target, **fields)


@pytest.mark.parametrize("fields", [{"hidden_size": 0}, {"hidden_layers": None}, {"draft_vocab_size": 0}], ids=str)
def test_a_head_must_know_what_to_read_and_draft(target, fields):
    with pytest.raises(ValueError, match="A `DraftHead` needs"):
        DraftHead(build_config(target, **fields))
