"""The proof: what a model has to show before it is guarded, and that it is left as it was."""

import copy
import random

import pytest
import torch
from architectures import build_architecture, tiny_config
from tiny import attach, build_model, is_before, perturb
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from safespec_hf import SafeSpecConfig, UnsupportedRequestError
from safespec_hf.decoding import proof
from safespec_hf.decoding.support import check_model
from safespec_hf.engine.cache import CACHE_NAME
from safespec_hf.engine.traits import reads_alone

PROMPT = torch.tensor([[11, 17, 23, 31]])
SHORT = {"max_new_tokens": 12, "do_sample": False}
CONSTANT = SafeSpecConfig(adaptive_drafts=False)
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("FutureWarning", "DeprecationWarning")]


@pytest.fixture(autouse=True)
def _unproven(monkeypatch):
    monkeypatch.setattr(proof, "_proven", {})


REFUSED = {
    "openai-gpt": f"takes no `{CACHE_NAME}`",
    "reformer": f"takes no `{CACHE_NAME}`",
    "xlm": "fails with a cache",
    "blt": "config has no 'hidden_size'",
    "longcat_flash": "returns 3 hidden states, but a head counts on 5",
    "recurrent_gemma": "are not in its cache|differ from those of the tokens alone|fails with a cache",
    "moshi": "no mask for it",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_or_crash_is_refused_when_a_head_is_attached(name):
    with pytest.raises(UnsupportedRequestError, match=REFUSED[name]):
        check_model(build_architecture(name))


DTYPES = [torch.float32, torch.bfloat16]


def prove_together(model):
    proof._prove_exactly(model, True, False)
    with proof._untouched(model):
        proof._compare(model, True, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "config"), [("doge", {"keep_window_size": 6}), ("mpt", {}), ("roformer", {})])
def test_neither_few_tokens_nor_rounding_hide_a_fault(name, config, dtype):
    model = build_architecture(name, **config).to(dtype)
    before = state_of(model)
    with pytest.raises(UnsupportedRequestError, match="differ from those of the tokens alone"):
        prove_together(model)
    assert str(state_of(model)) == str(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_an_attention_that_picks_is_asked_to_pick(name, dtype):
    model = build_architecture(name, index_topk=128).to(dtype)
    if not is_before("5.20"):
        check_model(model)
        assert {module.index_topk for module in model.modules() if "index_topk" in vars(module)} == {128}
        return
    with pytest.raises(UnsupportedRequestError, match="differ from those of the tokens alone"):
        check_model(model)


@pytest.mark.parametrize("std", [0.02, 0.25])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "deepseek_v3", "gpt_neo", "opt", "bloom"])
def test_what_can_be_guarded_is_accepted(name, std):
    check_model(build_architecture(name, std))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_rounding_is_no_fault(name, dtype):
    check_model(build_architecture(name).to(dtype))


class Forgetful(LlamaForCausalLM):
    def forward(self, input_ids, position_ids=None, cache=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class SeesPadding(LlamaForCausalLM):
    def forward(self, input_ids, position_ids=None, cache=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, position_ids=position_ids, **{CACHE_NAME: cache, **kwargs})


class Misplaced(GPT2LMHeadModel):
    def forward(self, input_ids, position_ids=None, cache=None, **kwargs):
        return super().forward(input_ids, **{CACHE_NAME: cache, **kwargs})


class Few(LlamaForCausalLM):
    def forward(self, input_ids, position_ids=None, cache=None, **kwargs):
        outputs = super().forward(input_ids, position_ids=position_ids, **{CACHE_NAME: cache, **kwargs})
        outputs.hidden_states = outputs.hidden_states and outputs.hidden_states[:-1]
        return outputs


class OnlyCache(LlamaForCausalLM):
    def forward(self, input_ids, position_ids=None, cache=None, attention_mask=None, use_cache=None, **kwargs):
        assert "past_key_values" not in kwargs
        given = {"position_ids": position_ids, "attention_mask": attention_mask, "use_cache": use_cache}
        return super().forward(input_ids, **given, **{CACHE_NAME: cache, **kwargs})


class OnlyPastKeyValues(LlamaForCausalLM):
    def forward(self, input_ids, position_ids=None, past_key_values=None, attention_mask=None, **kwargs):
        assert "cache" not in kwargs
        given = {"position_ids": position_ids, "attention_mask": attention_mask}
        return super().forward(input_ids, **given, **{CACHE_NAME: past_key_values}, **kwargs)


class Noisy(LlamaForCausalLM):
    def forward(self, input_ids, position_ids=None, cache=None, **kwargs):
        outputs = super().forward(input_ids, position_ids=position_ids, **{CACHE_NAME: cache, **kwargs})
        outputs.logits = outputs.logits + torch.randn_like(outputs.logits)
        return outputs


WRONG = {Forgetful: "left 0 in it", Few: "returns 2 hidden states"}
NOT_TOGETHER = [Misplaced, SeesPadding]


def rebuilt(cls):
    model = build_model("gpt2" if cls is Misplaced else "llama")
    model.__class__ = cls
    return model


@pytest.mark.parametrize("cls", WRONG)
def test_code_that_only_looks_right_is_found_out(cls):
    with pytest.raises(UnsupportedRequestError, match=WRONG[cls]):
        check_model(rebuilt(cls))


@pytest.mark.parametrize("cls", NOT_TOGETHER)
def test_what_padding_alone_would_make_wrong_is_read_row_by_row(cls, tokenizer):
    model = attach(rebuilt(cls), tokenizer)
    assert reads_alone(model)
    ids, mask = torch.tensor([[0, 0, 0, 11], [11, 12, 13, 14]]), torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    alone = [
        model.generate(row[real.bool()][None], **SHORT)[0, real.sum() :] for row, real in zip(ids, mask, strict=True)
    ]
    for each in (model, copy.deepcopy(model)):
        draft = perturb(model, 0.03)
        for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
            policy = SafeSpecConfig(adaptive_drafts=False, lookup_drafts=False)
            found = each.generate(ids, attention_mask=mask, **SHORT, safespec=policy, **extra)
            assert torch.equal(found[:, 4:], torch.stack(alone))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cls", [OnlyCache, OnlyPastKeyValues])
def test_a_cache_is_given_under_the_name_that_forward_takes(cls, target, tokenizer):
    plain, model = target.generate(PROMPT, **SHORT), attach(rebuilt(cls), tokenizer)
    for extra in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": perturb(target)}):
        assert torch.equal(model.generate(PROMPT, **SHORT, **extra, safespec=CONSTANT), plain)


def test_a_draft_needs_no_hidden_states():
    check_model(rebuilt(Few), has_states=False)


def test_a_model_that_draws_random_numbers_is_no_fault():
    check_model(rebuilt(Noisy))


def state_of(model):
    attributes = [
        {name: value for name, value in vars(module).items() if not name.startswith("_")} for module in model.modules()
    ]
    return copy.deepcopy((attributes, model.state_dict(), [weight.grad for weight in model.parameters()]))


def test_the_proof_leaves_nothing_behind(target):
    target.train()
    target.model.layers[0].eval()
    before, random_before, python_before = state_of(target), torch.get_rng_state(), random.getstate()
    check_model(target)
    assert str(state_of(target)) == str(before)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert random.getstate() == python_before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3", "gpt_neox"])
def test_a_proven_model_reads_what_it_would_have_read(name):
    proven, fresh = build_architecture(name), build_architecture(name)
    check_model(proven)
    ours, theirs = (model(PROMPT, output_hidden_states=True).hidden_states for model in (proven, fresh))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_a_proven_model_can_still_be_trained(target, mode):
    with mode():
        check_model(target)
    target.train()(PROMPT, labels=PROMPT).loss.backward()


def test_a_model_is_proven_once(target):
    calls = []
    target.register_forward_hook(lambda *_: calls.append(1))
    for model in (target, copy.deepcopy(target)):
        check_model(model)
    assert len(calls) == 3


def test_weights_that_are_not_there_are_not_asked():
    with torch.device("meta"):
        check_model(AutoModelForCausalLM.from_config(tiny_config("llama")))
