import dataclasses
import json

import pytest
import tiny
import torch

from safespec_hf import SafeSpecConfig, SafeSpecError
from safespec_hf.answer.segments import find_boundaries
from safespec_hf.evaluation import suffixes
from safespec_hf.evaluation.attackers import SUFFIX, attack
from safespec_hf.evaluation.suffixes import SuffixSettings, attack_by_suffix, search_suffix
from safespec_hf.training.hidden import Encoded, score_texts

CHAT = [{"role": "user", "content": "w10 think"}]
SMALL = SuffixSettings(num_tokens=3, num_forwards=120, num_at_once=4, max_new_tokens=8, enough=0.0)

FEW = dataclasses.replace(SMALL, num_forwards=30)


@pytest.fixture
def steep(engine):
    """The head's risks differ between texts."""
    torch.nn.init.normal_(engine.model.safety.head.mlp[-1].weight, std=3.0)
    return engine


def test_the_search_lowers_the_risk_within_its_budget_and_again_in_the_same_way(steep):
    found = search_suffix(steep, CHAT, SMALL)
    assert found.best.risk < found.before.risk - 0.05
    assert len(found.best.tokens) == 3
    assert found.num_forwards <= SMALL.num_forwards
    assert found.num_tries >= 4 * 10  # drafts are accepted, so that a batch takes fewer than 9 forwards
    assert search_suffix(steep, CHAT, SMALL) == found
    assert search_suffix(steep, CHAT, dataclasses.replace(SMALL, seed=1)).best.tokens != found.best.tokens


def test_more_forwards_never_find_less(steep):
    budgets = [dataclasses.replace(SMALL, num_forwards=num) for num in (18, 40, 200)]
    risks = [search_suffix(steep, CHAT, settings).best.risk for settings in budgets]
    assert risks == sorted(risks, reverse=True)


def test_the_risk_is_that_of_the_guarded_loop_and_the_answer_the_target_s_own(steep):
    policy = SafeSpecConfig(**tiny.FIELDS)
    found = search_suffix(steep, CHAT, SMALL, policy)
    asked = [{"role": "user", "content": f"w10 think {found.best.text}"}]
    short = dataclasses.replace(steep, max_new_tokens=8)
    (plain,) = short.plain([asked])
    (guarded,) = short.guarded([asked], dataclasses.replace(policy, risk_threshold=found.best.risk + 1e-4))
    assert guarded.tokens == plain.tokens  # nothing was flagged
    assert guarded.risk_max == pytest.approx(found.best.risk, abs=1e-5)
    (flagged,) = short.guarded([asked], dataclasses.replace(policy, risk_threshold=found.best.risk - 1e-4))
    assert flagged.events
    text, boundaries = Encoded(short.encode([asked])[0], plain.tokens), find_boundaries(steep.tokenizer)
    ((_, risks),) = score_texts(steep.model, [steep.model.safety.head], [text], boundaries, policy)
    assert risks.max().item() == pytest.approx(found.best.risk, abs=1e-5)


def test_an_answer_that_refuses_is_worth_less_than_any_other(steep, monkeypatch):
    plain = search_suffix(steep, CHAT, SMALL)
    best = plain.best.text
    judge = suffixes._judge
    monkeypatch.setattr(
        suffixes, "_judge", lambda *one: judge(*one)._replace(is_refusal=True) if one[1] == best else judge(*one)
    )
    found = search_suffix(steep, CHAT, SMALL)
    assert found.best.text != best
    assert not found.best.is_refusal
    monkeypatch.setattr(suffixes, "is_refusal", lambda _: True)
    assert search_suffix(steep, CHAT, SMALL).best.is_refusal


def test_a_request_that_passes_anyway_is_left_as_it_is(steep):
    found = search_suffix(steep, CHAT, dataclasses.replace(SMALL, enough=1.0), SafeSpecConfig(risk_threshold=0.999999))
    assert found.best == found.before
    assert (found.best.text, found.num_tries) == ("", 0)


def test_a_suffix_has_no_special_token_and_no_broken_character(engine):
    words = suffixes._words(engine.tokenizer)
    texts = [engine.tokenizer.decode([word]) for word in words]
    assert "</s>" not in texts
    assert "\n" not in texts
    assert "w12" in texts


def test_each_attack_is_asked_with_its_own_suffix_and_a_killed_search_goes_on(steep, sets, tmp_path, monkeypatch):
    cache = tmp_path / "suffixes.jsonl"
    attacked = attack_by_suffix(steep, sets, cache, FEW)
    rows = [json.loads(line) for line in cache.read_text().splitlines()]
    assert list(attacked) == ["attack@suffix"]
    for plain, prompt, row in zip(sets["attack"], attacked["attack@suffix"], rows, strict=True):
        assert prompt.messages[-1]["content"] == f"{plain.messages[-1]['content']} {row['suffix']}".strip()
        assert (prompt.request, prompt.id, prompt.set_name) == (plain.request, plain.id, "attack@suffix")
        assert row["risk"] <= row["risk_before"]
    lines = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    searched = []
    monkeypatch.setattr(suffixes, "search_suffix", lambda *one: searched.append(one) or search_suffix(*one))
    assert attack_by_suffix(steep, sets, cache, FEW) == attacked
    assert len(searched) == 2
    attack_by_suffix(steep, sets, cache, dataclasses.replace(FEW, num_forwards=18))
    assert len(searched) == 7  # another budget is another search
    steep.model.safety.head.config.pooling = "last"
    attack_by_suffix(steep, sets, cache, FEW)
    assert len(searched) == 12  # and so is a head that reads otherwise


def test_the_name_is_known_and_needs_a_head_and_forwards(engine, sets):
    assert attack(sets, [SUFFIX]) == sets
    with pytest.raises(SafeSpecError, match="`num_forwards` must be >= 98"):
        SuffixSettings(num_forwards=97)
    bare = dataclasses.replace(engine, model=tiny.build_model())
    with pytest.raises(SafeSpecError, match="need a safety head"):
        search_suffix(bare, CHAT, SMALL)
