import pytest
from evaluated import WordGuard

from safespec_hf import SafeSpecConfig, SafeSpecError
from safespec_hf.evaluation import specs
from safespec_hf.evaluation.specs import parse_method


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("safespec", {}),
        ("safespec:num_candidates=1", {"num_candidates": 1}),
        ("safespec:reflection=,rollback_segments=0", {"reflection": "", "rollback_segments": 0}),
        ("safespec:keep_reflection=True", {"keep_reflection": True}),
        ("safespec:risk_threshold=0.5,candidate_source=target", {"risk_threshold": 0.5, "candidate_source": "target"}),
        ("safespec:operating_point=null", {}),
        ("safespec:refusal=12", {"refusal": "12"}),
        ('safespec:{"refusal": "No, sorry."}', {"refusal": "No, sorry."}),
        ("refuse", {"max_recoveries": 0}),
        ("safespec+self_reminder:num_candidates=2", {"num_candidates": 2}),
        ("forced:num_candidates=2", {"num_candidates": 2}),
    ],
)
def test_options_are_fields_of_the_policy(spec, fields):
    method = parse_method(spec)
    assert method.name == spec
    assert method.policy == SafeSpecConfig(**fields)


def test_speculation_alone_has_its_head_off():
    assert not parse_method("assisted").is_monitored
    assert parse_method("safespec").is_monitored


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("roses", "no method 'roses'. The methods are target, assisted"),
        ("safespec:roses=1", "no field roses"),
        ("safespec:num_candidates=0", "`num_candidates` must be >= 1"),
        ("safespec:num_candidates=many", "`num_candidates` must be of type int"),
        ("safespec:num_candidates", "written `name=value`"),
        ('safespec:{"num_candidates"', "can't be had"),
        ("target:num_candidates=2", "has no options"),
        ("guard_finished:every=3", "no option 'every'"),
        ("guard_finished:threshold=0", "`threshold` must be a number in"),
        ("guard_every_n:every=0", "`every` must be an integer"),
        ("guard_every_n:every=x", "can't be had"),
    ],
)
def test_what_is_wrong_with_a_method_is_said(spec, said):
    with pytest.raises(SafeSpecError, match=said):
        parse_method(spec, WordGuard())


def test_a_guard_method_needs_a_guard():
    with pytest.raises(SafeSpecError, match="--guard"):
        parse_method("guard_finished")


def test_a_policy_of_another_version_is_told(monkeypatch):
    monkeypatch.setattr(specs, "fields", lambda _: [])
    with pytest.raises(SafeSpecError, match="has no `verification`"):
        parse_method("specreason")
