"""A guarded model stays the model it was, and refuses whatever can't be guarded before its first forward."""

import copy
import pickle
from itertools import pairwise

import mypy.api
import pytest
import torch
from safetensors import safe_open
from tiny import PAUSE, THINK, build_head, build_model, build_noisy_head, build_tokenizer, perturb
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from safespec_hf import (
    GuardedModel,
    HeadMismatchError,
    SafeSpecConfig,
    SafeSpecOutput,
    UnsupportedRequestError,
    attach_safety_head,
    detach_safety_head,
)
from safespec_hf.engine.cache import CACHE_NAME

PROMPT = torch.tensor([[11, 17, 23]])
SHORT = {"max_new_tokens": 8, "do_sample": False}
POLICY = SafeSpecConfig(max_segment_tokens=4, reflection="pause think", refusal="no thanks")


@pytest.fixture
def guarded(target, never, tokenizer):
    return attach_safety_head(target, never, tokenizer=tokenizer)


@pytest.fixture
def flagging(target, noisy, tokenizer):
    return attach_safety_head(target, noisy, tokenizer=tokenizer)


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


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
def test_copies_keep_the_guard(target, never, tokenizer, duplicate):
    # before the first forward: transformers' own hooks for hidden states can't be pickled afterwards
    other = duplicate(attach_safety_head(target, never, tokenizer=tokenizer, always=True))
    assert isinstance(other, LlamaForCausalLM)
    assert is_guarded(other)
    with pytest.raises(UnsupportedRequestError, match="always=True"):
        other.generate(PROMPT, **SHORT, safespec=False)


def test_a_deep_copy_can_be_detached_without_touching_the_original(guarded):
    other = detach_safety_head(copy.deepcopy(guarded))
    assert type(other) is LlamaForCausalLM
    assert is_guarded(guarded)


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


def fill(model, num_tokens, prompt=PROMPT):
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt[:, :num_tokens], **{CACHE_NAME: cache})
    return cache


def check_cache(model, cache, sequence):
    """The cache holds the beginning of what the caller sees: the next logits agree with those of no cache."""
    length = cache.get_seq_length()
    assert all(layer.get_seq_length() == length for layer in cache.layers)
    assert 0 < length < sequence.shape[1]
    with torch.no_grad():
        logits = model(sequence[:, length:], **{CACHE_NAME: copy.deepcopy(cache)}).logits[0, -1]
        expected = model(sequence).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # the same float32 sums in another order


@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("num_cached", [1, 2])
@pytest.mark.parametrize("quantile", [0.5, 0.8, None])
def test_a_users_cache_is_continued_and_left_consistent(target, tokenizer, with_draft, num_cached, quantile):
    head = build_head(target) if quantile is None else build_noisy_head(target, quantile)
    model = attach_safety_head(target, head, tokenizer=tokenizer)
    draft = {"assistant_model": perturb(build_model())} if with_draft else {}
    cache = fill(model, num_cached)
    arguments = {"max_new_tokens": 24, "do_sample": False, "safespec": POLICY, "return_dict_in_generate": True}
    output = model.generate(PROMPT, **{CACHE_NAME: cache}, **arguments, **draft)
    assert bool(output.events[0]) is (quantile is not None)
    assert torch.equal(output.sequences, model.generate(PROMPT, **arguments, **draft).sequences)
    assert output[CACHE_NAME] is cache
    check_cache(model, cache, output.sequences)


@pytest.mark.parametrize("quantile", [0.5, 0.8, None])
@pytest.mark.parametrize("keep_reflection", [False, True])
def test_the_returned_cache_holds_the_beginning_of_the_returned_tokens(target, tokenizer, quantile, keep_reflection):
    head = build_head(target) if quantile is None else build_noisy_head(target, quantile)
    model = attach_safety_head(target, head, tokenizer=tokenizer)
    policy = SafeSpecConfig(
        max_segment_tokens=4, reflection="pause think", refusal="no thanks", keep_reflection=keep_reflection
    )
    output = model.generate(PROMPT, max_new_tokens=24, do_sample=False, safespec=policy, return_dict_in_generate=True)
    check_cache(model, output[CACHE_NAME], output.sequences)


def test_a_silent_head_leaves_as_much_in_the_cache_as_plain_generate(guarded):
    caches = [DynamicCache(), DynamicCache()]
    guarded.generate(PROMPT, **{CACHE_NAME: caches[0]}, **SHORT)
    guarded.generate(PROMPT, **{CACHE_NAME: caches[1]}, **SHORT, safespec=True)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 3 + 8 - 1


@pytest.mark.parametrize("is_user_defined", [False, True])
def test_autograd_can_go_on_with_what_comes_back(target, tokenizer, is_user_defined):
    model = attach_safety_head(target, build_head(target), tokenizer=tokenizer)
    given = {CACHE_NAME: fill(model, 1)} if is_user_defined else {}
    output = model.generate(PROMPT, **given, **SHORT, safespec=True, return_dict_in_generate=True)
    last = output.sequences[:, output[CACHE_NAME].get_seq_length() :]
    model(last, **{CACHE_NAME: output[CACHE_NAME]}).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("pack_weights", [False, True])
def test_a_model_made_for_inference_only_is_guarded_too(tokenizer, pack_weights):
    with torch.inference_mode():
        model = build_model()
        attach_safety_head(model, build_head(model), tokenizer=tokenizer)
        policy = SafeSpecConfig(risk_threshold=1.0, pack_weights=pack_weights)
        assert torch.equal(model.generate(PROMPT, **SHORT, safespec=policy), model.generate(PROMPT, **SHORT))


class Interrupt(StoppingCriteria):
    def __init__(self, after):
        self.after = after

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.after:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("after", [5, 9, 14])
@pytest.mark.parametrize("quantile", [0.9, None])
def test_an_exception_leaves_a_cache_that_can_be_continued(target, tokenizer, after, quantile):
    head = build_head(target) if quantile is None else build_noisy_head(target, quantile)
    model, cache = attach_safety_head(target, head, tokenizer=tokenizer), fill(target, 2)
    arguments = {
        "max_new_tokens": 24,
        "do_sample": False,
        "safespec": POLICY,
        "assistant_model": perturb(build_model()),
    }
    whole = model.generate(PROMPT, **arguments)
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            PROMPT, **{CACHE_NAME: cache}, stopping_criteria=StoppingCriteriaList([Interrupt(after)]), **arguments
        )
    assert cache.get_seq_length() >= 2
    # what it holds is the prompt at least, and so the whole prompt can be continued from its beginning
    kept = min(cache.get_seq_length(), 2)
    cache.crop(kept - cache.get_seq_length())
    assert torch.equal(model.generate(PROMPT, **{CACHE_NAME: cache}, **arguments), whole)


@pytest.mark.parametrize("call", [3, 5, 8])
def test_an_exception_inside_a_forward_leaves_layers_of_equal_length(guarded, call):
    cache, calls = fill(guarded, 2), []

    def fail_late(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    guarded.model.layers[1].register_forward_pre_hook(fail_late)
    with pytest.raises(KeyboardInterrupt):
        guarded.generate(PROMPT, **{CACHE_NAME: cache}, max_new_tokens=24, do_sample=False, safespec=POLICY)
    assert len({layer.get_seq_length() for layer in cache.layers}) == 1
    assert cache.get_seq_length() == call + 1


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


class Theirs:
    """Stands for what FSDP and others put before a model's class."""


def put_on_top(model):
    cls = type(model)
    model.__class__ = type(f"FSDP{cls.__name__}", (Theirs, cls), {})
    return model


def test_a_class_on_top_of_ours_guards_copies_and_is_kept_by_detaching(guarded):
    model = put_on_top(guarded)
    assert is_guarded(model)
    for other in (copy.deepcopy(model), copy.copy(model)):
        assert isinstance(other, Theirs)
        assert is_guarded(other)
    plain = detach_safety_head(model)
    assert isinstance(plain, (Theirs, LlamaForCausalLM))
    assert not isinstance(plain, GuardedModel)
    assert type(plain).__name__ == "FSDPLlamaForCausalLM"
    assert plain.generate(PROMPT, **SHORT).shape == (1, 11)
    with pytest.raises(ValueError, match="safespec"):
        plain.generate(PROMPT, **SHORT, safespec=True)


def test_attaching_twice_under_a_class_on_top_replaces_the_head(guarded, tokenizer):
    model = put_on_top(guarded)
    attach_safety_head(model, build_head(model, pooling="last"), tokenizer=tokenizer)
    assert model.safety.head.config.pooling == "last"
    assert type(model).__mro__.count(GuardedModel) == 1
    assert type(detach_safety_head(model)).__bases__ == (Theirs, LlamaForCausalLM)


def test_a_head_can_be_attached_after_a_class_was_put_on_top(target, never, tokenizer):
    put_on_top(target)
    theirs = type(target)
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    assert is_guarded(model)
    assert is_guarded(copy.deepcopy(model))
    assert type(detach_safety_head(model)) is theirs


def test_a_class_that_is_bound_to_ours_is_refused_by_detaching(guarded):
    class Bound(type(guarded)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    guarded.__class__ = Bound
    assert is_guarded(guarded)
    with pytest.raises(UnsupportedRequestError, match="Undo it first"):
        detach_safety_head(guarded)
    assert is_guarded(guarded)


def test_a_parametrized_model_is_guarded_and_detached(guarded):
    guarded.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    torch.nn.utils.parametrize.register_parametrization(guarded, "scale", torch.nn.Identity())
    assert is_guarded(copy.deepcopy(guarded))
    detach_safety_head(guarded)
    torch.nn.utils.parametrize.remove_parametrizations(guarded, "scale")
    assert type(guarded) is LlamaForCausalLM


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_model_that_was_compiled_in_place_is_copied(target, never, tokenizer, duplicate):
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    model.compile()
    assert duplicate(model)._compiled_call_impl is None
    assert type(duplicate(model)) is type(model)


TYPED = """
from transformers import LlamaForCausalLM
from safespec_hf import SafeSpecConfig, SafeSpecOutput, SafetyHead, attach_safety_head

plain: LlamaForCausalLM = LlamaForCausalLM.from_pretrained("x")
model = attach_safety_head(plain, "head", policy=SafeSpecConfig())
"""
GOOD = """
from torch import Tensor

tokens: Tensor = model.generate(None, safespec=True, max_new_tokens=3)
output: SafeSpecOutput = model.generate(None, safespec=SafeSpecConfig(), return_dict_in_generate=True)
head: SafetyHead = model.safety.head
threshold: float = model.safety.risk_threshold
model.model.layers[0]
model.config.vocab_size
model.generate(None, None, [], max_new_tokens=3)
"""
BAD = """
model.generate(None, safespec="yes")
model.generate(None, safespec=1)
model.generate(None, safespec={"num_candidates": 3})
number: int = model.generate(None, safespec=True)
model.safety.head = None
model.safety.nothing
"""


# Reading all of transformers takes a minute, and what it says of its models is not what is tested here.
SETTINGS = """
[mypy]
[mypy-transformers.*,huggingface_hub.*,safetensors.*]
follow_imports = skip
"""


def test_type_checkers_know_what_a_guarded_model_takes_and_gives(tmp_path):
    for name, code in (("good.py", GOOD), ("bad.py", BAD), ("mypy.ini", "")):
        (tmp_path / name).write_text(TYPED + code if code else SETTINGS)
    options = ["--strict", "--no-error-summary", f"--cache-dir={tmp_path}", f"--config-file={tmp_path / 'mypy.ini'}"]
    report, errors, _ = mypy.api.run([*options, str(tmp_path / "good.py"), str(tmp_path / "bad.py")])
    assert errors == ""
    found = [line for line in report.splitlines() if ": error:" in line and str(tmp_path) in line]
    assert [line for line in found if "good.py" in line] == []
    lines = {int(line.split("bad.py:")[1].split(":")[0]) - TYPED.count("\n") for line in found}
    assert lines == set(range(2, BAD.count("\n") + 1))
