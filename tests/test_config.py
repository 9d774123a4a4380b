"""Configs refuse what is out of range, say the legal range and the value, and can't be changed by accident."""

import dataclasses
import math

import pytest

from safespec_hf import SafeSpecConfig, SafetyHeadConfig

ILLEGAL_POLICY = [
    ("risk_threshold", 0.0),
    ("risk_threshold", 1.01),
    ("risk_threshold", math.nan),
    ("num_draft_tokens", 0),
    ("max_segment_tokens", 0),
    ("min_segment_tokens", 0),
    ("rollback_segments", -1),
    ("num_candidates", 0),
    ("max_recoveries", -1),
    ("refusal", " \n"),
    ("recovery_temperature", 0.0),
    ("recovery_temperature", math.inf),
    ("recovery_temperature", math.nan),
    ("candidate_source", "nobody"),
    ("flagged_token_penalty", -0.1),
    ("flagged_token_penalty", math.nan),
]
ILLEGAL_HEAD = [
    ("hidden_size", -1),
    ("hidden_layers", []),
    ("hidden_layers", [-1]),
    ("mlp_ratio", 0.0),
    ("num_mlp_layers", 0),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("pooling", "max"),
    ("ewma_decay", 0.0),
    ("ewma_decay", 1.0),
    ("span", "prompt"),
    ("unsafe_label", 2),
    ("risk_threshold", 0.0),
    ("risk_threshold", 1.5),
]
BOUNDARY_POLICY = [
    ("risk_threshold", 1.0),
    ("num_draft_tokens", 1),
    ("max_segment_tokens", 1),
    ("min_segment_tokens", 1),
    ("rollback_segments", 0),
    ("num_candidates", 1),
    ("max_recoveries", 0),
    ("reflection", ""),
    ("recovery_temperature", 1e-3),
    ("flagged_token_penalty", 0.0),
    ("flagged_token_penalty", math.inf),
]


@pytest.mark.parametrize(("name", "value"), ILLEGAL_POLICY)
def test_a_policy_refuses_an_illegal_value_and_names_field_and_value(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be") as error:
        SafeSpecConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("name", "value"), BOUNDARY_POLICY)
def test_a_policy_takes_the_values_at_the_edge_of_the_legal_range(name, value):
    assert getattr(SafeSpecConfig(**{name: value}), name) == value


def test_a_policy_cannot_be_changed_or_given_unknown_fields():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SafeSpecConfig().num_candidates = 2
    with pytest.raises(TypeError, match="num_candidate"):
        SafeSpecConfig(num_candidate=2)


def test_a_policy_takes_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        SafeSpecConfig(0.5)


def test_two_policies_of_the_same_values_are_equal_and_hashable():
    assert {SafeSpecConfig(seed=3), SafeSpecConfig(seed=3), SafeSpecConfig(seed=4)} == {
        SafeSpecConfig(seed=3),
        SafeSpecConfig(seed=4),
    }


@pytest.mark.parametrize(("name", "value"), ILLEGAL_HEAD)
def test_a_head_config_refuses_an_illegal_value_and_names_field_and_value(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be") as error:
        SafetyHeadConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("layers", "features"), [(None, 0), ([2], 8), ([0, 2], 16), ([2, 1, 0], 24)])
def test_features_are_the_hidden_size_for_each_layer_that_is_read(layers, features):
    assert SafetyHeadConfig(hidden_size=8, hidden_layers=layers).num_features == features


def test_a_head_config_survives_a_json_round_trip(tmp_path):
    config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1, 2], pooling="ewma", target={"model_id": "org/name"})
    config.save_pretrained(tmp_path)
    assert SafetyHeadConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
