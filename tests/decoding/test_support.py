"""What a guarded call may be given: models and drafts in all their wrappings, and inputs."""

from weakref import WeakKeyDictionary

import peft
import pytest
import torch
from architectures import build_architecture
from tiny import CONFIGS, attach, build_head, build_model, build_noisy_head, build_tokenizer, cheap_drafts, perturb
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerFast,
    pipeline,
)

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.decoding.support import check_model_kwargs, is_empty
from safespec_hf.engine import ropes
from safespec_hf.engine.cache import CACHE_NAME

PROMPT = torch.tensor([[11, 17, 23, 31]])
# of PEFT and torch.compile about their own insides
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("FutureWarning", "DeprecationWarning")]
LONG_PROMPT = torch.randint(10, 40, (1, 20), generator=torch.Generator().manual_seed(2))
SHORT = {"max_new_tokens": 12, "do_sample": False}
CONSTANT = SafeSpecConfig(adaptive_drafts=False)


def agrees(model, prompt=PROMPT, **arguments):
    plain = model.generate(prompt, **SHORT)
    return torch.equal(model.generate(prompt, **SHORT, safespec=CONSTANT, **arguments), plain)


EMPTY = [None, {}, [], (), torch.zeros(0, 3), {"image": None}, [None, {"video": []}]]


@pytest.mark.parametrize("value", EMPTY)
def test_what_says_nothing_is_accepted(value):
    assert is_empty(value)
    check_model_kwargs({"mm_encoder_outputs": value}, PROMPT)


@pytest.mark.parametrize("value", [torch.zeros(1), {"image": torch.zeros(1)}, [False], 0, "x"])
def test_what_says_something_is_refused_by_name(value):
    with pytest.raises(UnsupportedRequestError, match="mm_encoder_outputs"):
        check_model_kwargs({"mm_encoder_outputs": value}, PROMPT)


@pytest.mark.parametrize("name", ["gemma3", "gemma4_unified"])
def test_vision_language_models_answer_plain_text(name, tokenizer):
    model = attach(build_architecture(name), tokenizer)
    assert agrees(model)
    assert agrees(model, assistant_model=perturb(model))


SOFT_PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore")  # of PEFT about its own arguments
@pytest.mark.parametrize("kind", SOFT_PROMPTS)
def test_a_soft_prompt_is_refused_before_the_first_forward(kind, guarded):
    wrapped = peft.get_peft_model(guarded, SOFT_PROMPTS[kind]())
    guarded.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(UnsupportedRequestError, match="soft prompt"):
        wrapped.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **SHORT, safespec=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SOFT_PROMPTS)
def test_a_draft_with_a_soft_prompt_is_refused(kind, guarded):
    draft = peft.get_peft_model(build_model(), SOFT_PROMPTS[kind]())
    with pytest.raises(UnsupportedRequestError, match="soft prompt"):
        guarded.generate(PROMPT, **SHORT, assistant_model=draft, safespec=True)


def lora(model, seed=0):
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"], r=4)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("assistant", [None, build_model])
def test_adapters_of_weights_act_and_can_be_disabled_and_merged(guarded, assistant):
    draft = {} if assistant is None else {"assistant_model": assistant()}
    base = guarded.generate(PROMPT, **SHORT)
    wrapped = lora(guarded)
    adapted = wrapped.generate(input_ids=PROMPT, **SHORT)
    assert not torch.equal(adapted, base)
    assert torch.equal(wrapped.generate(input_ids=PROMPT, **SHORT, safespec=CONSTANT, **draft), adapted)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped.generate(input_ids=PROMPT, **SHORT, safespec=CONSTANT, **draft), base)
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged.generate(PROMPT, **SHORT, safespec=CONSTANT, **draft), adapted)


def test_adapters_of_single_rows_are_refused(guarded):
    wrapped, prompts = lora(guarded), PROMPT.expand(2, -1)
    with pytest.raises(UnsupportedRequestError, match="adapter_names"):
        wrapped.generate(input_ids=prompts, **SHORT, adapter_names=["default", "__base__"], safespec=True)


@pytest.mark.parametrize("wrap", [lora, torch.compile, lambda model: torch.compile(lora(model))])
def test_a_wrapped_draft_drafts(target, guarded, wrap):
    draft = wrap(perturb(target))
    arguments = {**SHORT, "assistant_model": draft, "return_dict_in_generate": True}
    with cheap_drafts():
        output = guarded.generate(PROMPT, **arguments, safespec=True)
    assert torch.equal(output.sequences, guarded.generate(PROMPT, **SHORT))
    assert output.statistics.num_draft_tokens > 0


def test_a_draft_that_is_no_model_is_refused(guarded):
    with pytest.raises(TypeError, match="assistant_model"):
        guarded.generate(PROMPT, **SHORT, assistant_model=torch.nn.Linear(1, 1), safespec=True)


def test_a_compiled_target_says_where_its_head_goes(target, never):
    with pytest.raises(TypeError, match=r"before `torch.compile`"):
        attach_safety_head(torch.compile(target), never)


ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


def with_rope(name, kind, tokenizer, **config):
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **ROPES[kind]}
    return attach(build_architecture(name, rope_parameters=rope, **config), tokenizer)


def build_longrope(name, tokenizer):
    return with_rope(
        name,
        "longrope",
        tokenizer,
        max_position_embeddings=64,
        **({"original_max_position_embeddings": 16} if name == "phi3" else {}),
    )


@pytest.mark.parametrize("name", ["phi3", "llama"])
@pytest.mark.parametrize("num_tokens", [4, 20])
def test_longrope_is_guarded_on_either_side_of_its_length(name, num_tokens, tokenizer):
    model, prompt = build_longrope(name, tokenizer), LONG_PROMPT[:, :num_tokens]
    arguments = {"max_new_tokens": 8, "do_sample": False}
    guarded = model.generate(prompt, **arguments, assistant_model=perturb(model), safespec=CONSTANT)
    assert torch.equal(guarded, model.generate(prompt, **arguments))


ONE_SIDE = {
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "with output_scores=True"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 8, 32)}, "after a prompt that is more than tokens"),
    "no cache": ({"use_cache": False}, "with use_cache=False"),
}


@pytest.mark.parametrize("name", ONE_SIDE)
@pytest.mark.parametrize("kind", ROPES)
def test_changing_positions_are_not_passed_where_they_cannot_be_followed(name, kind, tokenizer):
    arguments, reason = ONE_SIDE[name]
    model = with_rope("llama", kind, tokenizer, max_position_embeddings=16)
    prompt = {} if name == "embeddings" else {"inputs": PROMPT}
    assert model.generate(**prompt, **arguments, max_new_tokens=8, safespec=True) is not None
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(UnsupportedRequestError, match=f"change after 16 tokens, this call could reach .* {reason}"):
        model.generate(**prompt, **arguments, max_new_tokens=16, safespec=True)


def test_a_model_that_goes_on_in_another_way_is_refused_where_its_positions_change(tokenizer, monkeypatch):
    model = build_longrope("llama", tokenizer)
    prepare = type(model).prepare_inputs_for_generation

    def forgets_text(self, input_ids, **kwargs):
        inputs = prepare(self, input_ids, **kwargs)
        return inputs | {CACHE_NAME: None} if input_ids.shape[1] == 17 else inputs

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", forgets_text)
    monkeypatch.setattr(ropes, "_KNOWN", WeakKeyDictionary())  # it was looked at when its head was attached
    assert agrees(model)
    with pytest.raises(UnsupportedRequestError, match=r"change after 16 tokens, .* can't be followed in this model"):
        model.generate(PROMPT, max_new_tokens=16, safespec=True)


def shuffled(tokenizer):
    """A tokenizer of the same size in which words have changed places."""
    state = (
        tokenizer.backend_tokenizer.to_str().replace('"w20"', '"x"').replace('"w30"', '"w20"').replace('"x"', '"w30"')
    )
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), pad_token="<pad>", eos_token="</s>")


@pytest.fixture
def foreign_draft(tmp_path, tokenizer):
    build_model().save_pretrained(tmp_path)
    shuffled(tokenizer).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_draft_beside_another_tokenizer_of_the_same_size_is_refused(guarded, foreign_draft):
    with pytest.raises(UnsupportedRequestError, match=r"2 of 40 ids differ, such as 20.* pass `assistant_tokenizer`"):
        guarded.generate(PROMPT, **SHORT, assistant_model=foreign_draft, safespec=True)


def test_a_draft_beside_the_same_tokenizer_or_none_is_accepted(guarded, tokenizer, tmp_path):
    build_model().save_pretrained(tmp_path)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert agrees(guarded, assistant_model=draft)
    tokenizer.save_pretrained(tmp_path)
    assert agrees(guarded, assistant_model=AutoModelForCausalLM.from_pretrained(tmp_path))


def test_the_draft_s_tokenizer_may_be_given(guarded, draft, tokenizer):
    assert agrees(guarded, assistant_model=draft, assistant_tokenizer=build_tokenizer())
    assert agrees(guarded, assistant_model=draft, assistant_tokenizer=shuffled(tokenizer))


def test_a_pipeline_with_a_draft_of_a_padded_vocabulary_answers(guarded, tokenizer):
    draft = build_model(vocab_size=48)
    arguments = {"assistant_model": draft, "assistant_tokenizer": build_tokenizer()}
    ask = pipeline("text-generation", model=guarded, tokenizer=tokenizer, **arguments)
    plain = pipeline("text-generation", model=guarded, tokenizer=tokenizer)
    expected = plain("w11 w17", max_new_tokens=6, do_sample=False)
    assert ask("w11 w17", max_new_tokens=6, do_sample=False, safespec=True) == expected


@pytest.mark.parametrize("num_added", [1, 3])
def test_a_draft_may_lack_the_tokens_that_were_added_to_its_target(target, num_added):
    tokenizer, draft = build_tokenizer(), perturb(target)
    tokenizer.add_tokens([f"<extra{index}>" for index in range(num_added)], special_tokens=True)
    target.resize_token_embeddings(40 + num_added, mean_resizing=False)
    model = attach_safety_head(target, build_noisy_head(target), tokenizer=tokenizer)
    prompt = torch.tensor([[11, 40, 17, 39 + num_added]])
    policy = SafeSpecConfig(risk_threshold=1.0, adaptive_drafts=False)
    guarded = model.generate(prompt, **SHORT, assistant_model=draft, safespec=policy)
    assert torch.equal(guarded, model.generate(prompt, **SHORT))
    recovering = SafeSpecConfig(candidate_source="draft", reflection="pause think", refusal="no thanks")
    assert model.generate(prompt, **SHORT, assistant_model=draft, safespec=recovering).shape[0] == 1


def test_an_empty_cache_of_the_caller_is_no_change_of_inputs(guarded):
    cache = DynamicCache()
    assert guarded.generate(PROMPT, **SHORT, **{CACHE_NAME: cache}, safespec=True).shape == (1, 16)


@pytest.mark.parametrize(("name", "given"), [("bloom", {}), ("falcon", {"alibi": True})], ids=["bloom", "falcon"])
def test_right_padding_is_refused_where_a_model_counts_positions_by_the_mask(name, given, tokenizer):
    model = build_architecture(name, **given)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    mask = torch.ones_like(LONG_PROMPT[:, :6])
    mask[:, -1] = 0
    arguments = {"max_new_tokens": 2, "do_sample": False, "safespec": True}
    with pytest.raises(UnsupportedRequestError, match="Right padding"):
        model.generate(LONG_PROMPT[:, :6], attention_mask=mask, **arguments)
    assert model.generate(LONG_PROMPT[:, :6], attention_mask=mask.flip(1), **arguments).shape == (1, 8)


HOLES = {"input_ids": LONG_PROMPT[:, :7], "attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]])}


@pytest.mark.parametrize("name", ["sliding", "alternating", "mamba2", "lfm2", "mpt"])
def test_padding_between_tokens_is_refused_where_its_places_count(name, tokenizer):
    model = attach(build_model(name) if name in CONFIGS else build_architecture(name), tokenizer)
    left = {**HOLES, "attention_mask": HOLES["attention_mask"].sort().values}
    assert model.generate(**left, **SHORT, safespec=True).shape[1] > 7
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(UnsupportedRequestError, match="Padding inside of a prompt"):
        model.generate(**HOLES, **SHORT, safespec=True)


@pytest.mark.parametrize(("name", "num_new"), [("llama", 9), ("gpt2", 9), ("sliding", 1), ("bloom", 9)])
def test_and_read_as_in_plain_decoding_where_they_do_not(name, num_new, tokenizer):
    model = attach(build_model(name) if name in CONFIGS else build_architecture(name), tokenizer)
    arguments = {**HOLES, "do_sample": False, "max_new_tokens": num_new}
    assert model.generate(**arguments, safespec=True).tolist() == model.generate(**arguments).tolist()
