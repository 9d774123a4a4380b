"""A head survives saving, speaks for P(unsafe) in both label directions, and refuses a target it was not made for."""

import pytest
import torch
from tiny import build_head, build_model, build_tokenizer
from transformers import AutoConfig, AutoModel

from safespec_hf import HeadMismatchError, SafeSpecError, SafetyHead, SafetyHeadConfig, target_binding
from safespec_hf.heads.safety_head import check_binding, tokenizer_fingerprint


def small_head(**config):
    return SafetyHead(SafetyHeadConfig(**{"hidden_size": 8, "hidden_layers": [2], **config})).eval()


def from_folder(folder):
    return SafetyHead.from_pretrained(folder)


@pytest.mark.parametrize("load", [from_folder, AutoModel.from_pretrained])
@pytest.mark.parametrize("config", [{}, {"hidden_layers": [0, 2]}, {"num_mlp_layers": 1}, {"num_mlp_layers": 3}])
def test_a_saved_head_gives_the_same_risks(tmp_path, load, config):
    head = small_head(**config)
    head.save_pretrained(tmp_path)
    features = torch.randn(5, head.config.num_features)
    assert torch.equal(load(tmp_path).risk(features), head.risk(features))  # the same weights, the same sums


def test_a_head_is_saved_as_safetensors_only(tmp_path):
    small_head().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_everything_that_decides_travels_with_the_head(tmp_path):
    head = small_head(
        pooling="ewma", ewma_decay=0.8, span="answer", unsafe_label=0, risk_threshold=0.3, target={"a": 1}
    )
    head.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == head.config.to_diff_dict()


def test_a_loaded_head_is_in_eval_mode(tmp_path):
    small_head(dropout=0.5).train().save_pretrained(tmp_path)
    head, features = SafetyHead.from_pretrained(tmp_path), torch.randn(9, 8)
    assert torch.equal(head.risk(features), head.risk(features))


def test_pickled_weights_are_refused(tmp_path):
    head = small_head()
    head.config.save_pretrained(tmp_path)
    torch.save(head.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        SafetyHead.from_pretrained(tmp_path)


def test_pickled_weights_are_refused_even_when_asked_for(tmp_path):
    head = small_head()
    head.config.save_pretrained(tmp_path)
    torch.save(head.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        SafetyHead.from_pretrained(tmp_path, use_safetensors=False)


@pytest.mark.parametrize(
    ("num_layers", "shapes"), [(1, [(1, 8)]), (2, [(4, 8), (1, 4)]), (3, [(4, 8), (4, 4), (1, 4)])]
)
def test_widths_follow_the_config(num_layers, shapes):
    weights = [
        tuple(weight.shape) for weight in small_head(num_mlp_layers=num_layers).parameters() if weight.dim() == 2
    ]
    assert weights == shapes


def test_the_logit_is_that_of_the_labelled_class():
    unsafe, safe = small_head(unsafe_label=1), small_head(unsafe_label=0)
    safe.load_state_dict(unsafe.state_dict())
    features = torch.randn(6, 8)
    assert torch.equal(unsafe(features), safe(features))
    # sigmoid(x) + sigmoid(-x) = 1 up to float32 rounding
    torch.testing.assert_close(unsafe.risk(features) + safe.risk(features), torch.ones(6), atol=1e-6, rtol=0.0)
    assert torch.equal(unsafe.risk(features) > 0.5, unsafe(features) > 0)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)])
def test_risks_have_the_shape_of_the_positions(shape):
    assert small_head().risk(torch.zeros(shape)).shape == shape[:-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_any_precision_are_scored_in_float32(dtype):
    assert small_head().risk(torch.zeros(2, 8, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("config", [{"hidden_size": 0}, {"hidden_layers": None}])
def test_a_head_must_know_what_to_read(config):
    with pytest.raises(ValueError, match="needs `hidden_size` > 0 and at least one of `hidden_layers`"):
        small_head(**config)


def test_a_binding_describes_the_target(target, tokenizer):
    assert target_binding(target, tokenizer) == {
        "model_id": None,
        "revision": None,
        "architecture": "LlamaForCausalLM",
        "hidden_size": 32,
        "num_layers": 2,
        "vocab_size": 40,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def test_a_hub_id_is_part_of_the_binding_and_a_local_folder_is_not(target, tmp_path):
    target.config.name_or_path = "org/name"
    assert target_binding(target)["model_id"] == "org/name"
    target.config.name_or_path = str(tmp_path)
    assert target_binding(target)["model_id"] is None


def test_the_fingerprint_tells_vocabularies_apart(tokenizer):
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(build_tokenizer())
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(build_tokenizer(41))


FOUND = {
    "model_id": "org/name",
    "revision": "abc",
    "architecture": "LlamaForCausalLM",
    "hidden_size": 8,
    "num_layers": 2,
    "vocab_size": 40,
    "tokenizer": "0123",
}


@pytest.mark.parametrize("name", list(FOUND))
def test_each_field_that_differs_is_named_with_both_values(name):
    other = 9 if isinstance(FOUND[name], int) else "other"
    with pytest.raises(HeadMismatchError, match=f"`{name}`") as error:
        check_binding(small_head(target=FOUND), {**FOUND, name: other})
    bound, found = error.value.mismatches[name]
    assert (bound, found) == (FOUND[name], other)
    assert repr(bound) in str(error.value)
    assert repr(found) in str(error.value)


def test_all_differences_are_named_at_once():
    with pytest.raises(HeadMismatchError) as error:
        check_binding(small_head(target=FOUND), {**FOUND, "vocab_size": 9, "tokenizer": "4567"})
    assert set(error.value.mismatches) == {"vocab_size", "tokenizer"}


@pytest.mark.parametrize("name", ["model_id", "revision", "tokenizer"])
@pytest.mark.parametrize("unknown_side", ["head", "target"])
def test_a_field_that_one_side_does_not_know_is_not_compared(name, unknown_side):
    unknown = {**FOUND, name: None}
    bound, found = (unknown, FOUND) if unknown_side == "head" else (FOUND, unknown)
    assert check_binding(small_head(target=bound), found) is None


@pytest.mark.parametrize("name", ["model_id", "revision", "architecture", "vocab_size", "tokenizer"])
def test_a_difference_can_be_excused_by_name(name):
    other = 9 if isinstance(FOUND[name], int) else "other"
    assert check_binding(small_head(target=FOUND), {**FOUND, name: other}, (name,)) is None


@pytest.mark.parametrize("bound", [None, {}, {"architecture": None}, {"hidden_size": 32}, {"model_id": "owner/other"}])
def test_a_head_without_any_binding_is_refused(target, bound):
    with pytest.raises(HeadMismatchError, match="LlamaForCausalLM"):
        check_binding(small_head(hidden_size=32, target=bound), target_binding(target))


def test_a_layer_that_the_target_lacks_is_refused(target):
    with pytest.raises(HeadMismatchError, match="`hidden_layers`"):
        check_binding(build_head(target, hidden_layers=[3]), target_binding(target))


def test_a_hidden_size_that_cannot_fit_is_refused_even_if_excused(target):
    with pytest.raises(HeadMismatchError, match="`hidden_size`"):
        check_binding(build_head(target, hidden_size=16), target_binding(target), ("hidden_size",))


def test_a_mismatch_is_a_safespec_error_and_a_value_error():
    assert issubclass(HeadMismatchError, SafeSpecError)
    assert issubclass(SafeSpecError, ValueError)


@pytest.mark.parametrize(("kind", "layers"), [("llama", 3), ("gpt2", 2)])
def test_another_model_of_the_same_width_is_told_apart(target, kind, layers):
    other = build_model(kind) if kind == "gpt2" else build_model(num_hidden_layers=layers)
    with pytest.raises(HeadMismatchError, match="architecture" if kind == "gpt2" else "num_layers"):
        check_binding(build_head(target), target_binding(other))


def test_a_point_without_a_name_is_not_the_heads_own():
    points = {"": {"risk_threshold": 0.3, "prompt_threshold": 0.1}}
    config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1], prompt_threshold=0.6, operating_points=points)
    assert config.prompt_threshold_at() == 0.6
    assert config.prompt_threshold_at("") == 0.1


def test_risks_know_no_dropout_in_any_mode():
    head, features = small_head(dropout=0.5), torch.randn(50, 8)
    expected = head.eval().risk(features)
    assert torch.equal(head.train().risk(features), expected)
    assert not torch.equal(head(features), head(features))
