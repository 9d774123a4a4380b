import json

import peft
import pytest
import tiny
import torch
from evaluated import KINDS, write_sets
from transformers import LogitsProcessorList
from typer.testing import CliRunner

from safespec_hf import SafeSpecError
from safespec_hf.cli import app, loading
from safespec_hf.decoding.adapters import look_at
from safespec_hf.evaluation.methods import Turn
from safespec_hf.evaluation.safedecoding import ExpertMixture, load_expert, mix
from safespec_hf.evaluation.specs import parse_method

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
CHATS = [[{"role": "user", "content": text}] for text in ("w10 think", "w11 w12 w13 think", "w14")]
LORA = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"], "r": 4}


def probs(*rows):
    return torch.tensor(rows).log()


def turn():
    return Turn(CHATS, ["w10"] * len(CHATS), 0, [])


def lora(model, config=None):
    torch.manual_seed(3)
    return peft.get_peft_model(model, config or peft.LoraConfig(**LORA)).eval()


@pytest.fixture
def adapter(tmp_path):
    lora(tiny.build_model()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def expert(tmp_path):
    tiny.build_model(seed=4).save_pretrained(tmp_path / "expert")
    return tmp_path / "expert"


def test_only_what_both_find_likely_is_mixed():
    # k = 3 is the first at which both have one in common, and then it is two: 1 and 2
    p, q = probs([0.5, 0.3, 0.15, 0.05]), probs([0.1, 0.25, 0.3, 0.35])
    # 0.3 + 3 * -0.05 and 0.15 + 3 * 0.15
    assert mix(p, q, 3.0, 1).exp().tolist()[0] == pytest.approx([0, 0.15, 0.6, 0], abs=1e-6)
    # all four: 0.5 - 1.2 is below zero, and 0.05 + 0.9
    assert mix(p, q, 3.0, 4).exp().tolist()[0] == pytest.approx([0, 0.15, 0.6, 0.95], abs=1e-6)


def test_where_the_mixture_is_negative_everywhere_the_highest_is_chosen():
    # 0.5 + 3 * -0.3 and 0.4 + 3 * -0.2; what the expert wants is unlikely to the target
    p, q = probs([0.5, 0.4, 0.06, 0.04]), probs([0.2, 0.2, 0.3, 0.3])
    assert mix(p, q, 3.0, 1).argmax() == 2
    assert mix(probs([0.6, 0.4, 0.0]), probs([0.3, 0.2, 0.5]), 3.0, 2).tolist() == [[-torch.inf, 0.0, -torch.inf]]


def test_rows_are_mixed_by_themselves_and_what_was_ruled_out_stays_out():
    p, q = probs([0.7, 0.3, 0.0], [0.2, 0.3, 0.5]), probs([0.1, 0.2, 0.7], [0.4, 0.5, 0.1])
    mixed = mix(p, q, 1.0, 3).exp()
    assert mixed[0].tolist() == pytest.approx([0.1, 0.2, 0.0], abs=1e-6)
    assert mixed[1].tolist() == pytest.approx([0.4, 0.5, 0.1], abs=1e-6)


def expected(target, expert, prompt, num_new, alpha=3.0, first_tokens=2, num_common=5):
    """One row, one token after the other, each from forwards over everything."""
    tokens = list(prompt)
    for index in range(num_new):
        p, q = (model(torch.tensor([tokens])).logits[:, -1] for model in (target, expert))
        tokens.append(int((mix(p, q, alpha, num_common) if index < first_tokens else p).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("options", [{}, {"alpha": 1.5, "first_tokens": 4, "num_common": 2}])
def test_the_first_tokens_are_those_of_the_mixture_and_the_others_the_target_s(engine, expert, options):
    method = parse_method("safedecoding:" + json.dumps({"expert": str(expert), **options}))
    replies, other = method.answer(engine, turn()), tiny.build_model(seed=4)
    for prompt, reply in zip(engine.encode(CHATS), replies, strict=True):
        assert reply.tokens == expected(engine.model, other, prompt, 12, **options)
    assert [reply.text for reply in replies] != [reply.text for reply in engine.plain(CHATS)]


@pytest.mark.parametrize("kind_of_cache", [None, "static"])
def test_padded_rows_have_the_positions_of_unpadded_ones(kind_of_cache):
    target, other = tiny.build_model("gpt2"), tiny.build_model("gpt2", seed=4)
    other.generation_config.cache_implementation = kind_of_cache
    ids = torch.tensor([[0, 0, 11, 12], [13, 14, 15, 16]])
    mask = (ids > 0).long()
    mixture = LogitsProcessorList([ExpertMixture(other, mask, 3.0, 3, 5)])
    output = target.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, logits_processor=mixture)
    for row, prompt in zip(output[:, 4:].tolist(), ([11, 12], [13, 14, 15, 16]), strict=True):
        assert row == expected(target, other, prompt, 5, first_tokens=3)


def test_an_expert_that_is_the_target_changes_nothing(engine, tmp_path):
    tiny.build_model().save_pretrained(tmp_path / "twin")
    replies = parse_method(f"safedecoding:expert={tmp_path / 'twin'}").answer(engine, turn())
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in engine.plain(CHATS)]


def test_an_adapter_shares_the_target_s_weights_and_leaves_it_as_it_is(engine, adapter):
    before = engine.plain(CHATS)
    replies = parse_method(f"safedecoding:expert={adapter}").answer(engine, turn())
    tuned = lora(tiny.build_model()).merge_and_unload()
    for prompt, reply in zip(engine.encode(CHATS), replies, strict=True):
        assert reply.tokens == expected(engine.model, tuned, prompt, 12)
    assert look_at(engine.model).adapters == frozenset()
    assert [reply.tokens for reply in engine.plain(CHATS)] == [reply.tokens for reply in before]
    expert = load_expert(str(adapter), engine.model, engine.tokenizer)
    own = {weight.data_ptr() for weight in engine.model.parameters()}
    assert {name.split(".")[-2] for name, weight in expert.named_parameters() if weight.data_ptr() not in own} == {
        "default"
    }


def test_settings_tell_one_expert_from_another_of_the_same_name(expert):
    method = parse_method(f"safedecoding:expert={expert}")
    before = method.settings()
    assert json.loads(json.dumps(before)) == before
    tiny.build_model(seed=5).save_pretrained(expert)
    assert method.settings() != before
    assert parse_method("safedecoding:expert=owner/expert").settings()["files"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "needs an expert: `expert=PATH`"),
        ("alpha=3", "needs an expert"),
        ("expert=", "needs an expert"),
        ('{"expert": 3}', "needs an expert"),
        ("expert=/no/such/folder", "no such folder"),
        ("expert=.", "neither an adapter nor a model"),
        ("expert=owner/expert,alpha=-1", "`alpha` must be a number in"),
        ("expert=owner/expert,alpha=much", "`alpha` must be a number in"),
        ("expert=owner/expert,first_tokens=0", "`first_tokens` must be an integer"),
        ("expert=owner/expert,num_common=1.5", "`num_common` must be an integer"),
        ("expert=owner/expert,roses=1", "no option 'roses'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_target", lambda *_, **__: pytest.fail("a model was loaded"))
    files = [part for name, path in write_sets(tmp_path).items() for part in (f"--{KINDS[name]}", str(path))]
    command = ["evaluate", *files, "--method", f"safedecoding:{options}", "--out", "answers.jsonl"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, SafeSpecError)
    assert said in str(result.exception)


def test_what_does_not_fit_the_target_is_told(engine, tmp_path):
    def said(folder):
        with pytest.raises(SafeSpecError) as caught:
            load_expert(str(folder), engine.model, engine.tokenizer)
        return str(caught.value)

    tiny.build_model(vocab_size=24).save_pretrained(tmp_path / "small")
    assert "24 entries" in said(tmp_path / "small")
    tiny.build_model(seed=4).save_pretrained(tmp_path / "other words")
    tiny.build_tokenizer(has_digits=True).save_pretrained(tmp_path / "other words")
    assert "another one than the target's" in said(tmp_path / "other words")
    lora(tiny.build_model(hidden_size=64)).save_pretrained(tmp_path / "wide")
    assert "size mismatch" in said(tmp_path / "wide")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    lora(tiny.build_model(), prompt).save_pretrained(tmp_path / "soft")
    assert "soft prompt" in said(tmp_path / "soft")
