"""Configs refuse what is out of range, say the legal range and the value, and can't be changed by accident."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from safespec_hf import SafeSpecConfig, SafetyHeadConfig

ILLEGAL_POLICY = [
    ("risk_threshold", 0.0),
    ("risk_threshold", 1.01),
    ("risk_threshold", math.nan),
    ("num_draft_tokens", 0),
    ("num_candidates", 4097),
    ("max_segment_tokens", 0),
    ("min_segment_tokens", 0),
    ("rollback_segments", -1),
    ("num_candidates", 0),
    ("max_recoveries", -1),
    ("refusal", " \n"),
    ("recovery_temperature", 0.0),
    ("test_temperature", 0.0),
    ("test_temperature", math.inf),
    ("false_alarm_margin", 1.0),
    ("false_alarm_margin", -0.1),
    ("false_alarm_margin", math.nan),
    ("reflection_scope", "never"),
    ("recovery_temperature", math.inf),
    ("recovery_temperature", math.nan),
    ("candidate_source", "nobody"),
    ("policy", "hope"),
    ("carried_risk", 1.0),
    ("carried_risk", -0.1),
    ("carried_risk", math.nan),
    ("candidate_choice", "longest"),
    ("safe_margin", 1.0),
    ("safe_margin", -0.1),
    ("safe_margin", math.nan),
    ("candidates_per_batch", 0),
    ("candidates_per_batch", 9),
    ("costs", "guessed"),
    ("seed", -1),
    ("seed", 2**64),
    ("flagged_token_penalty", -0.1),
    ("flagged_token_penalty", math.nan),
    ("verification", "sentence"),
    ("quality_threshold", -0.1),
    ("quality_threshold", 9.1),
    ("quality_threshold", math.nan),
    ("quality_prompt", " \n"),
    ("quality_reading", "median"),
    ("num_target_segments", -1),
    ("num_draft_segments", 0),
    ("num_draft_segments", 2),
    ("draft_uncertainty", 0.5),
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
    ("pooling", "mean+max"),
    ("pooling", "mean+mean"),
    ("pooling", ""),
    ("ewma_decay", 0.0),
    ("ewma_decay", 1.0),
    ("span", "prompt"),
    ("operating_points", {"strict": {}}),
    ("operating_points", {"strict": {"risk_threshold": 1.5}}),
    ("operating_points", {"strict": {"risk_threshold": True}}),
    ("operating_points", {"strict": 0.5}),
    ("unsafe_label", 2),
    ("risk_threshold", 0.0),
    ("risk_threshold", 1.5),
]
WRONG_TYPE_POLICY = [
    ("risk_threshold", "0.5"),
    ("risk_threshold", True),
    ("num_draft_tokens", 4.0),
    ("recovery_temperature", 10**400),
    ("flagged_token_penalty", -(10**400)),
    ("num_candidates", "8"),
    ("num_candidates", True),
    ("num_candidates", np.int64(8)),
    ("max_recoveries", torch.tensor(3)),
    ("max_segment_tokens", None),
    ("adaptive_drafts", 1),
    ("compile", "yes"),
    ("pack_weights", "auto"),
    ("reflection", None),
    ("refusal", b"no"),
    ("recovery_temperature", [1.0]),
    ("candidate_source", None),
    ("flagged_token_penalty", np.float32(3)),
    ("seed", 1.5),
    ("verification", None),
    ("quality_threshold", "9"),
    ("quality_prompt", None),
    ("num_target_segments", 1.0),
    ("num_draft_segments", 2.0),
    ("draft_uncertainty", "0.5"),
]
WRONG_TYPE_HEAD = [
    ("hidden_size", 8.0),
    ("hidden_size", True),
    ("hidden_layers", ["1"]),
    ("hidden_layers", [True]),
    ("hidden_layers", 1),
    ("mlp_ratio", "half"),
    ("pooling", None),
    ("risk_threshold", "0.5"),
    ("risk_threshold", None),
    ("risk_threshold", True),
    ("target", "org/name"),
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
    ("safe_margin", 0.0),
    ("candidates_per_batch", 1),
    ("candidates_per_batch", 8),
    ("quality_threshold", 0),
    ("quality_threshold", 9),
    ("num_target_segments", 0),
]


@pytest.mark.parametrize(("name", "value"), ILLEGAL_POLICY)
def test_a_policy_refuses_an_illegal_value_and_names_field_and_value(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be") as error:
        SafeSpecConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [(SafeSpecConfig, *case) for case in WRONG_TYPE_POLICY] + [(SafetyHeadConfig, *case) for case in WRONG_TYPE_HEAD],
)
def test_a_value_of_a_wrong_type_is_refused_with_its_field_and_type(config, name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be of type .*{type(value).__name__}"):
        config(**{name: value})


def test_a_whole_number_will_do_for_a_fraction():
    assert SafeSpecConfig(risk_threshold=1, recovery_temperature=2).recovery_temperature == 2


@pytest.mark.parametrize("doubt", [-0.1, 1.0, math.nan])
def test_uncertainty_is_a_share(doubt):
    fields = {"verification": "segment", "num_draft_segments": 2}
    assert SafeSpecConfig(**fields, draft_uncertainty=0).draft_uncertainty == 0
    with pytest.raises(ValueError, match="`draft_uncertainty` must be in"):
        SafeSpecConfig(**fields, draft_uncertainty=doubt)


def test_where_risks_are_only_reported_nothing_is_drawn_again():
    with pytest.raises(ValueError, match=r"`num_draft_segments` must be 1 .* with `policy='observe'`"):
        SafeSpecConfig(policy="observe", verification="segment", num_draft_segments=2)


CONTRADICTIONS = [
    ("recover_single", "num_candidates", 4),
    ("recover_single", "candidates_per_batch", 1),
    ("recover_single", "max_recoveries", 0),
    ("recover_unreflected", "reflection", "Let me think."),
    ("recover_unreflected", "keep_reflection", True),
    ("recover_unreflected", "max_recoveries", 0),
    ("refuse", "max_recoveries", 3),
    ("stop", "max_recoveries", 3),
    ("observe", "max_recoveries", 3),
]


@pytest.mark.parametrize(("policy", "name", "value"), CONTRADICTIONS)
def test_a_field_that_contradicts_the_policy_is_refused_by_both_names(policy, name, value):
    assert getattr(SafeSpecConfig(**{name: value}), name) == value
    with pytest.raises(ValueError, match=f"`{name}` must be .* with `policy='{policy}'`") as error:
        SafeSpecConfig(policy=policy, **{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("recover", {}),
        ("recover_single", {"num_candidates": 1}),
        ("recover_unreflected", {"reflection": ""}),
        ("refuse", {"max_recoveries": 0}),
        ("stop", {"max_recoveries": 0}),
        ("observe", {"max_recoveries": 0}),
    ],
)
def test_what_a_policy_means_for_other_fields_may_be_said_as_well(policy, fields):
    said, unsaid = SafeSpecConfig(policy=policy, **fields), SafeSpecConfig(policy=policy)
    assert unsaid.resolved() == said.resolved() == said
    # what it means is not written into it: another policy can be put in its place
    assert dataclasses.replace(unsaid, policy="recover") == SafeSpecConfig()


POLICIES = [
    SafeSpecConfig(),
    SafeSpecConfig(risk_threshold=0.25, num_candidates=20, reflection="", seed=7, candidate_source="target"),
    SafeSpecConfig(flagged_token_penalty=math.inf, pack_weights=False),
    SafeSpecConfig(policy="stop", candidate_choice="likeliest_safe", safe_margin=0.5, candidates_per_batch=2),
    SafeSpecConfig(verification="segment", quality_threshold=7.5, quality_reading="expected", num_target_segments=1),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_survives_json(policy):
    assert SafeSpecConfig.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_saved_with_a_generation_config(policy, tmp_path):
    config = GenerationConfig(safespec=policy, max_new_tokens=3)
    config.save_pretrained(tmp_path)
    assert SafeSpecConfig.from_dict(GenerationConfig.from_pretrained(tmp_path).safespec) == policy
    assert SafeSpecConfig.from_dict(json.loads(config.to_json_string())["safespec"]) == policy


def test_generation_configs_of_different_policies_differ():
    configs = [GenerationConfig(safespec=policy) for policy in POLICIES]
    assert len({config.to_json_string() for config in configs}) == len(set(configs)) == len(POLICIES)
    assert configs[0] == copy.deepcopy(configs[0]) != configs[1]
    assert configs[1].to_dict()["safespec"] == configs[1].to_diff_dict()["safespec"] == POLICIES[1]


def test_fields_that_a_dict_leaves_out_have_their_defaults():
    assert SafeSpecConfig.from_dict({"num_candidates": 3}) == SafeSpecConfig(num_candidates=3)


@pytest.mark.parametrize(
    ("values", "error", "named"),
    [
        ({"num_candidate": 3, "seed": 1}, ValueError, "num_candidate"),
        ({3: 3}, ValueError, "3"),
        ({"num_candidates": "3"}, TypeError, "num_candidates"),
        ({"risk_threshold": 1.5}, ValueError, "risk_threshold"),
        (["num_candidates"], TypeError, "list"),
    ],
)
def test_a_malformed_dict_is_refused_by_the_name_of_its_field(values, error, named):
    with pytest.raises(error, match=named):
        SafeSpecConfig.from_dict(values)


@pytest.mark.parametrize(("name", "value"), ILLEGAL_HEAD + WRONG_TYPE_HEAD)
def test_a_head_config_that_was_changed_after_loading_can_be_checked_again(name, value):
    config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1])
    config.check()
    setattr(config, name, value)
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        config.check()


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


POINTS = {"strict": {"risk_threshold": 0.2, "alpha": 0.05}, "permissive": {"risk_threshold": 0.9}}


def test_an_operating_point_is_a_threshold_by_name(tmp_path):
    SafetyHeadConfig(hidden_size=8, hidden_layers=[1], risk_threshold=0.5, operating_points=POINTS).save_pretrained(
        tmp_path
    )
    config = SafetyHeadConfig.from_pretrained(tmp_path)
    assert [config.threshold_at(name) for name in (None, "strict", "permissive")] == [0.5, 0.2, 0.9]


@pytest.mark.parametrize("points", [POINTS, None])
def test_an_operating_point_that_a_head_does_not_have_is_refused_by_name(points):
    config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1], operating_points=points)
    with pytest.raises(ValueError, match=r"no operating point 'odd': it has (strict, permissive|none)"):
        config.threshold_at("odd")


def test_a_policy_has_a_threshold_or_an_operating_point():
    with pytest.raises(ValueError, match="`operating_point` must be None where there is a `risk_threshold`"):
        SafeSpecConfig(risk_threshold=0.3, operating_point="strict")
