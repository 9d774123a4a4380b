"""A guarded model stays the model it was, and refuses whatever can't be guarded before its first forward."""

from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from tiny import PAUSE, THINK, build_head, build_model, build_tokenizer, perturb
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from safespec_hf import (
    HeadMismatchError,
    SafeSpecConfig,
    SafeSpecOutput,
    UnsupportedRequestError,
    attach_safety_head,
    detach_safety_head,
)

PROMPT = torch.tensor([[11, 17, 23]])
SHORT = {"max_new_tokens": 8, "do_sample": False}
POLICY = SafeSpecConfig(max_segment_tokens=4, reflection="pause think", refusal="no thanks")


@pytest.fixture
def always(target, noisy, tokenizer):
    return attach_safety_head(target, noisy, tokenizer=tokenizer, always=True)


def is_guarded(model):
    output = model.generate(PROMPT, **SHORT, safespec=True, return_dict_in_generate=True)
    return isinstance(output, SafeSpecOutput)


def test_the_same_model_comes_back_with_its_class_and_its_name(target, never, tokenizer):
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    assert model is target
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == type(model).__qualname__ == "LlamaForCausalLM"
    assert type(model).__module__ == LlamaForCausalLM.__module__


def test_two_models_of_one_class_share_their_guarded_class(guarded, tokenizer):
    other = build_model(seed=1)
    assert type(attach_safety_head(other, build_head(other), tokenizer=tokenizer)) is type(guarded)


def test_without_safespec_generate_is_what_it_was(target, noisy, tokenizer):
    expected = target.generate(PROMPT, **SHORT)
    model = attach_safety_head(target, noisy, tokenizer=tokenizer)
    for arguments in ({}, {"safespec": None}, {"safespec": False}):
        assert torch.equal(model.generate(PROMPT, **SHORT, **arguments), expected)


def test_without_a_dict_the_sequences_come_back(guarded):
    sequences = guarded.generate(PROMPT, **SHORT, safespec=True)
    assert torch.equal(sequences, guarded.generate(PROMPT, **SHORT))


def test_saved_weights_and_config_know_nothing_of_the_head(guarded, tmp_path):
    guarded.save_pretrained(tmp_path / "guarded")
    detach_safety_head(guarded).save_pretrained(tmp_path / "plain")
    names = []
    for folder in ("guarded", "plain"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as weights:
            names.append(set(weights.keys()))
    configs = [(tmp_path / folder / "config.json").read_text() for folder in ("guarded", "plain")]
    assert names[0] == names[1]
    assert configs[0] == configs[1]
    assert '"LlamaForCausalLM"' in configs[0]


def test_a_saved_model_loads_as_a_plain_one(guarded, tmp_path):
    guarded.save_pretrained(tmp_path)
    assert type(LlamaForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM


def test_the_head_is_not_among_the_models_parameters(target, never, tokenizer):
    before = [name for name, _ in target.named_parameters()]
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    assert [name for name, _ in model.named_parameters()] == before
    assert set(model.state_dict()) == set(build_model().state_dict())


def test_detaching_restores_class_and_attributes(target, never, tokenizer):
    before = set(vars(target))
    model = detach_safety_head(attach_safety_head(target, never, tokenizer=tokenizer))
    assert type(model) is LlamaForCausalLM
    assert set(vars(model)) == before
    assert detach_safety_head(model) is model


def test_attaching_again_replaces_the_head(guarded, tokenizer):
    model = attach_safety_head(guarded, build_head(guarded, pooling="last"), tokenizer=tokenizer)
    assert model.safety.head.config.pooling == "last"
    assert type(detach_safety_head(model)) is LlamaForCausalLM


def test_a_failed_second_attachment_leaves_the_first_one_in_place(always, tokenizer):
    wrong = build_head(build_model(num_hidden_layers=3))
    with pytest.raises(HeadMismatchError):
        attach_safety_head(always, wrong, tokenizer=tokenizer)
    with pytest.raises(UnsupportedRequestError, match="always=True"):
        always.generate(PROMPT, **SHORT, safespec=False)


def test_a_head_can_be_given_as_a_folder(target, never, tokenizer, tmp_path):
    never.save_pretrained(tmp_path)
    assert is_guarded(attach_safety_head(target, str(tmp_path), tokenizer=tokenizer))


def test_the_tokenizer_beside_the_model_is_found(target, never, tokenizer, tmp_path):
    target.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert is_guarded(attach_safety_head(model, never))


def test_a_tokenizer_can_be_given_to_generate_instead(target, never, tokenizer):
    model = attach_safety_head(target, never)
    with pytest.raises(UnsupportedRequestError, match="Pass `tokenizer=`"):
        model.generate(PROMPT, **SHORT, safespec=True)
    assert isinstance(model.generate(PROMPT, **SHORT, safespec=True, tokenizer=tokenizer), torch.Tensor)


def test_a_tokenizer_that_is_not_the_heads_is_refused_by_generate_too(target, tokenizer):
    model = attach_safety_head(target, build_head(target, tokenizer=tokenizer), tokenizer=tokenizer)
    with pytest.raises(HeadMismatchError, match="`tokenizer`"):
        model.generate(PROMPT, **SHORT, safespec=True, tokenizer=build_tokenizer(39))


def test_another_targets_head_is_refused_and_can_be_excused(target, tokenizer):
    head = build_head(build_model(vocab_size=41))
    with pytest.raises(HeadMismatchError, match="`vocab_size`"):
        attach_safety_head(target, head, tokenizer=tokenizer)
    assert type(target) is LlamaForCausalLM
    assert is_guarded(attach_safety_head(target, head, tokenizer=tokenizer, ignore_mismatches=("vocab_size",)))


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), None, "org/name"])
def test_only_models_that_generate_can_be_guarded(wrong, never):
    with pytest.raises(TypeError, match="must be a transformers model that can generate"):
        attach_safety_head(wrong, never)


def test_an_encoder_decoder_is_refused(never):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedRequestError, match="is an encoder-decoder"):
        attach_safety_head(model, never)
    assert type(model) is T5ForConditionalGeneration


def test_a_pipeline_runs_guarded_when_the_head_is_always_on(always, tokenizer):
    text = tokenizer.decode(PROMPT[0])
    generator = pipeline("text-generation", model=always, tokenizer=tokenizer)
    (answer,) = generator(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    expected = always.generate(PROMPT, **SHORT, safespec=True)
    assert answer["generated_text"] == tokenizer.decode(expected[0, 3:], skip_special_tokens=True)
    assert not torch.equal(expected, build_model().generate(PROMPT, **SHORT))


def test_always_guards_calls_that_do_not_ask_for_it(always):
    output = always.generate(PROMPT, **SHORT, return_dict_in_generate=True)
    assert isinstance(output, SafeSpecOutput)
    assert output.events[0]


@pytest.mark.parametrize("where", ["argument", "model"])
@pytest.mark.parametrize("value", [True, POLICY])
def test_safespec_in_a_generation_config_is_honoured(guarded, where, value):
    config = GenerationConfig(**SHORT, pad_token_id=0, return_dict_in_generate=True)
    config.safespec = value
    if where == "model":
        guarded.generation_config = config
    output = guarded.generate(PROMPT, **({"generation_config": config} if where == "argument" else {}))
    assert isinstance(output, SafeSpecOutput)


def test_the_argument_wins_over_the_generation_config(guarded):
    config = GenerationConfig(**SHORT, pad_token_id=0, return_dict_in_generate=True)
    config.safespec = True
    assert not isinstance(guarded.generate(PROMPT, config, safespec=False), SafeSpecOutput)


def test_a_model_without_a_head_refuses_safespec(target):
    with pytest.raises(ValueError, match="safespec"):
        target.generate(PROMPT, **SHORT, safespec=True)


@pytest.mark.parametrize("value", ["yes", 1, {"num_candidates": 3}])
def test_safespec_of_a_wrong_type_is_refused(guarded, value):
    with pytest.raises(TypeError, match="must be a bool or a SafeSpecConfig"):
        guarded.generate(PROMPT, **SHORT, safespec=value)


def test_switching_an_always_guarded_model_off_is_refused(always):
    with pytest.raises(UnsupportedRequestError, match="detach_safety_head"):
        always.generate(PROMPT, **SHORT, safespec=False)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_on_an_always_guarded_model(always, name):
    with pytest.raises(UnsupportedRequestError, match=name):
        getattr(always, name)([[11, 12]])


def test_positional_arguments_after_the_config_are_refused(guarded):
    with pytest.raises(TypeError, match="by name"):
        guarded.generate(PROMPT, None, [], safespec=True)


@pytest.mark.parametrize("with_draft", [False, True])
def test_several_sequences_per_prompt_are_rows_of_their_own(flagging, with_draft):
    draft = {"assistant_model": perturb(build_model())} if with_draft else {}
    arguments = {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 4, "return_dict_in_generate": True}
    prompts = torch.cat([PROMPT, PROMPT + 1])
    output = flagging.generate(prompts, **arguments, **draft, safespec=POLICY)
    assert output.sequences.shape[0] == len(output.events) == len(output.finish_reasons) == 8
    assert torch.equal(output.sequences[:, :3], prompts.repeat_interleave(4, dim=0))
    assert len({tuple(row) for row in output.sequences[:4].tolist()}) > 1


def test_reflection_words_are_read_but_not_returned(flagging):
    # neither word is a likely one, so that they would stand out in 24 tokens
    output = flagging.generate(
        PROMPT, max_new_tokens=24, do_sample=False, safespec=POLICY, return_dict_in_generate=True
    )
    text = output.sequences[0].tolist()
    assert any(event.outcome == "recovered" for event in output.events[0])
    assert all(pair != (PAUSE, THINK) for pair in pairwise(text))


def test_guarded_calls_need_no_gradient(guarded):
    sequences = guarded.generate(PROMPT, **SHORT, safespec=True, return_dict_in_generate=True)
    assert not sequences.risks.requires_grad


def risks(model, **arguments):
    output = model.generate(PROMPT, **SHORT, safespec=True, return_dict_in_generate=True, **arguments)
    return output.risks.nan_to_num(-1)


def test_attaching_before_the_first_forward_reads_the_same_states(target, never, tokenizer):
    attach_safety_head(target, never, tokenizer=tokenizer)
    states = target(PROMPT, output_hidden_states=True).hidden_states
    expected = build_model()(PROMPT, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 3
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))


@pytest.mark.parametrize("when", ["before", "after"])
def test_risks_are_the_same_in_training_mode(tokenizer, when):
    model = build_model(attention_dropout=0.5)
    head, draft = build_head(model, dropout=0.9), perturb(build_model(attention_dropout=0.5))
    expected = risks(attach_safety_head(model, head, tokenizer=tokenizer), assistant_model=draft)
    if when == "after":
        model.train(), head.train(), draft.train()
    else:
        detach_safety_head(model)
        attach_safety_head(model.train(), head.train(), tokenizer=tokenizer)
    assert torch.equal(risks(model, assistant_model=draft), expected)
    assert model.training
    assert head.training


def test_attaching_leaves_the_head_as_it_was(target, never, tokenizer):
    never.train()
    attach_safety_head(target, never, tokenizer=tokenizer)
    assert never.training


CHANGED = [
    ("risk_threshold", 1.5),
    ("risk_threshold", float("nan")),
    ("risk_threshold", 0.0),
    ("risk_threshold", -1),
    ("risk_threshold", "0.5"),
    ("risk_threshold", None),
    ("hidden_layers", [9]),
    ("hidden_layers", [0, 1]),
    ("hidden_layers", None),
    ("hidden_size", 16),
    ("pooling", "mena"),
    ("span", "all"),
    ("unsafe_label", 3),
    ("ewma_decay", 2.0),
]


@pytest.mark.parametrize(("name", "value"), CHANGED)
def test_a_head_that_was_changed_after_loading_is_refused_when_attached_and_when_called(
    target, noisy, tokenizer, name, value
):
    guarded = attach_safety_head(target, noisy, tokenizer=tokenizer)
    guarded.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    setattr(noisy.config, name, value)
    with pytest.raises(UnsupportedRequestError, match=name):
        guarded.generate(PROMPT, **SHORT, safespec=True)
    with pytest.raises(ValueError, match=name):
        attach_safety_head(build_model(), noisy, tokenizer=tokenizer)


def test_weights_that_turn_nan_flag_everything(guarded):
    guarded.safety.head.mlp[0].weight.data.fill_(float("nan"))
    output = guarded.generate(PROMPT, **SHORT, safespec=True, return_dict_in_generate=True)
    assert output.finish_reasons == ["safety_refusal"]


def test_what_is_attached_can_be_read_and_not_changed(target, noisy, tokenizer):
    model = attach_safety_head(target, noisy, tokenizer=tokenizer, policy=POLICY, always=True)
    safety = model.safety
    assert (safety.head, safety.policy, safety.tokenizer, safety.always) == (noisy, POLICY, tokenizer, True)
    assert safety.risk_threshold == noisy.config.risk_threshold
    with pytest.raises(AttributeError):
        safety.head = None
    with pytest.raises(AttributeError):
        model.safety = None


def test_the_default_policy_is_what_true_means(target, noisy, tokenizer):
    model = attach_safety_head(target, noisy, tokenizer=tokenizer, policy=SafeSpecConfig(risk_threshold=1.0))
    assert model.safety.risk_threshold == 1.0
    assert torch.equal(model.generate(PROMPT, **SHORT, safespec=True), model.generate(PROMPT, **SHORT))
    assert not torch.equal(model.generate(PROMPT, **SHORT, safespec=POLICY), model.generate(PROMPT, **SHORT))


def test_a_tokenizer_holds_for_the_call_that_it_was_given_to(target, never, tokenizer):
    model = attach_safety_head(target, never)
    model.generate(PROMPT, **SHORT, safespec=True, tokenizer=tokenizer)
    with pytest.raises(UnsupportedRequestError, match="Pass `tokenizer=`"):
        model.generate(PROMPT, **SHORT, safespec=True)


def test_the_tokenizer_of_the_attachment_stays_the_default(flagging, tokenizer):
    other = build_tokenizer()
    other.add_tokens(["refused"])
    policy = SafeSpecConfig(refusal="refused", max_recoveries=0)
    given = flagging.generate(PROMPT, **SHORT, safespec=policy, tokenizer=other)
    own = flagging.generate(PROMPT, **SHORT, safespec=policy)
    assert given[0, -1] == 40
    assert own[0, -1] == tokenizer.unk_token_id
    assert flagging.safety.tokenizer is tokenizer


def test_an_attached_draft_drafts_where_a_call_brings_none(target, never, draft, tokenizer):
    model = attach_safety_head(target, never, tokenizer=tokenizer, draft=draft)
    assert model.safety.draft is draft
    constant = SafeSpecConfig(adaptive_drafts=False)
    output = model.generate(PROMPT, **SHORT, safespec=constant, return_dict_in_generate=True)
    assert output.statistics.num_draft_forwards > 0
    assert torch.equal(output.sequences, model.generate(PROMPT, **SHORT))


def test_a_draft_of_another_vocabulary_is_refused_when_it_is_attached(target, never, tokenizer):
    other = build_model(vocab_size=20)
    with pytest.raises(UnsupportedRequestError, match="vocabulary"):
        attach_safety_head(target, never, tokenizer=tokenizer, draft=other)
    assert type(target) is LlamaForCausalLM


def test_only_a_model_can_be_attached_as_a_draft(target, never, tokenizer):
    with pytest.raises(TypeError, match="transformers model"):
        attach_safety_head(target, never, tokenizer=tokenizer, draft="owner/draft")
