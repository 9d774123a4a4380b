"""Every way in which a request for safety can reach a model guards the answer, or raises."""

import functools
import inspect
from dataclasses import replace

import peft
import pytest
import torch
from tiny import build_head, build_model, build_tokenizer, perturb
from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM, pipeline
from transformers.generation.continuous_batching import ContinuousMixin

from safespec_hf import SafeSpecConfig, SafeSpecOutput, UnsupportedRequestError, attach_safety_head, detach_safety_head
from safespec_hf.decoding.doors import GENERATING

PROMPT = torch.tensor([[11, 17, 23]])
SHORT = {"max_new_tokens": 8, "do_sample": False}
POLICY = SafeSpecConfig(max_segment_tokens=4, reflection="pause think", refusal="no thanks", seed=3)
# Every public method of what transformers gives a model that generates. "guards": takes `safespec`. "refuses": raises
# if safety is asked for. "helps": generates nothing by itself.
DOORS = {
    "generate": "guards",
    "generate_batch": "refuses",
    "init_continuous_batching": "refuses",
    "continuous_batching_context_manager": "refuses",
    "adjust_generation_fn": "helps",
    "compute_transition_scores": "helps",
    "destroy_cached_continuous_batching_manager": "helps",
    "heal_tokens": "helps",  # calls `generate`
    "load_custom_generate": "helps",  # returns a function of its own
    "prepare_inputs_for_generation": "helps",
}
BATCHING = [name for name, kind in DOORS.items() if kind == "refuses"]


@pytest.fixture
def flagging(target, noisy, tokenizer):
    return attach_safety_head(target, noisy, tokenizer=tokenizer, policy=POLICY)


@pytest.fixture
def expected(target, noisy, tokenizer):
    """What a guarded answer is; an unguarded one differs."""
    model = attach_safety_head(build_model(), noisy, tokenizer=tokenizer)
    answer = model.generate(PROMPT, **SHORT, safespec=POLICY)
    assert not torch.equal(answer, model.generate(PROMPT, **SHORT))
    return answer


def test_every_door_of_transformers_is_known():
    found = {name for mixin in (GenerationMixin, ContinuousMixin) for name, _ in inspect.getmembers(mixin, callable)}
    new = {name for name in found if not name.startswith("_")} - set(DOORS)
    assert new == set(), "does it generate? then it must guard or refuse (`GuardedModel`); say which one in DOORS"
    assert {name for name, kind in DOORS.items() if kind != "helps"} == set(GENERATING)


@pytest.mark.parametrize("name", BATCHING)
@pytest.mark.parametrize("way", ["argument", "policy", "given config", "positional config", "own config", "json"])
def test_continuous_batching_refuses_every_request(flagging, name, way):
    config = GenerationConfig(safespec=POLICY.to_dict() if way == "json" else True)
    inputs = ([[11, 12]],) if name == "generate_batch" else ()
    arguments = {"argument": {"safespec": True}, "policy": {"safespec": POLICY}}.get(way, {})
    if way in ("given config", "json"):
        arguments = {"generation_config": config}
    elif way == "positional config":
        inputs = (*inputs, config)
    elif way == "own config":
        flagging.generation_config.safespec = True
    with pytest.raises(UnsupportedRequestError, match=f"`{name}` can't be guarded"):
        getattr(flagging, name)(*inputs, **arguments)


@pytest.mark.parametrize("safespec", [None, False])
def test_continuous_batching_without_a_request_is_what_it_was(flagging, safespec):
    assert flagging.generate_batch([], safespec=safespec) == {}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_partial_and_a_compiled_model_guard(flagging, expected):
    assert torch.equal(functools.partial(flagging.generate, safespec=True)(PROMPT, **SHORT), expected)
    assert torch.equal(torch.compile(flagging).generate(PROMPT, **SHORT, safespec=True), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
def test_a_peft_wrapper_guards(noisy, tokenizer, expected):
    model = peft.get_peft_model(build_model(), peft.LoraConfig(target_modules=["q_proj"]))  # starts as no change
    attach_safety_head(model.get_base_model(), noisy, tokenizer=tokenizer, policy=POLICY)
    assert torch.equal(model.generate(input_ids=PROMPT, **SHORT, safespec=True), expected)


@pytest.mark.parametrize("when", ["made", "called", "config"])
@pytest.mark.parametrize("safespec", [True, POLICY])
def test_a_pipeline_guards(flagging, tokenizer, expected, when, safespec):
    given = {"safespec": safespec}
    if when == "config":
        flagging.generation_config.safespec = safespec
    generator = pipeline("text-generation", flagging, tokenizer=tokenizer, **(given if when == "made" else {}))
    (answer,) = generator(
        tokenizer.decode(PROMPT[0]), return_full_text=False, **SHORT, **(given if when == "called" else {})
    )
    assert answer["generated_text"] == tokenizer.decode(expected[0, 3:], skip_special_tokens=True)


@pytest.mark.parametrize("custom", ["org/name", lambda *_, **__: None])
@pytest.mark.parametrize("way", ["argument", "config"])
def test_another_decoding_strategy_is_refused_however_safety_was_asked_for(flagging, custom, way):
    arguments = {"safespec": True} if way == "argument" else {"generation_config": GenerationConfig(safespec=True)}
    with pytest.raises(UnsupportedRequestError, match="custom_generate"):
        flagging.generate(PROMPT, custom_generate=custom, **arguments)


class Forgetful(LlamaForCausalLM):
    """Stands for models with a `generate` of their own."""

    def generate(self, inputs, generation_config=None, custom_generate=None, **kwargs):
        return super().generate(inputs, generation_config, **kwargs)


def test_a_generate_that_drops_the_guard_gives_no_answer(tokenizer):
    model = Forgetful(build_model().config)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    with pytest.raises(UnsupportedRequestError, match="Forgetful"):
        model.generate(PROMPT, **SHORT, safespec=True)


@pytest.mark.parametrize("name", GENERATING)
def test_a_generate_that_was_put_on_the_instance_is_refused(target, never, tokenizer, name):
    setattr(target, name, functools.partial(getattr(target, name)))  # as `from_pretrained` does for remote code
    with pytest.raises(UnsupportedRequestError, match=f"del model.{name}"):
        attach_safety_head(target, never, tokenizer=tokenizer)


@pytest.mark.parametrize("value", [True, POLICY])
@pytest.mark.parametrize("is_guarded_when_saved", [False, True])
def test_a_request_in_the_models_config_survives_saving_and_loading(
    target, noisy, tokenizer, expected, tmp_path, value, is_guarded_when_saved
):
    if is_guarded_when_saved:
        attach_safety_head(target, noisy, tokenizer=tokenizer)
    target.generation_config.safespec = value
    target.save_pretrained(tmp_path)
    model = attach_safety_head(LlamaForCausalLM.from_pretrained(tmp_path), noisy, tokenizer=tokenizer, policy=POLICY)
    assert torch.equal(model.generate(PROMPT, **SHORT), expected)
    assert model.generation_config.safespec == (True if value is True else POLICY.to_dict())


def test_a_request_in_a_config_that_replaced_the_models_is_saved_too(flagging, noisy, tokenizer, expected, tmp_path):
    flagging.generation_config = GenerationConfig.from_model_config(flagging.config)
    flagging.generation_config.safespec = POLICY
    flagging.save_pretrained(tmp_path)
    model = attach_safety_head(LlamaForCausalLM.from_pretrained(tmp_path), noisy, tokenizer=tokenizer)
    assert torch.equal(model.generate(PROMPT, **SHORT), expected)


@pytest.mark.parametrize("value", [True, POLICY])
def test_a_given_config_guards_after_saving_and_loading(flagging, expected, tmp_path, value):
    GenerationConfig(**SHORT, safespec=value).save_pretrained(tmp_path)
    assert torch.equal(flagging.generate(PROMPT, GenerationConfig.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize(
    ("entry", "named"),
    [({"num_candidate": 3}, "num_candidate"), ({"num_candidates": "3"}, "num_candidates"), ("yes", "str"), (1, "int")],
)
@pytest.mark.parametrize("where", ["given", "own"])
def test_an_entry_that_is_no_policy_raises_and_names_it(flagging, entry, named, where):
    config = GenerationConfig(**SHORT, safespec=entry)
    flagging.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    if where == "own":
        flagging.generation_config = config
    with pytest.raises((TypeError, ValueError), match=named):
        flagging.generate(PROMPT, config if where == "given" else None)


def test_a_head_is_not_detached_while_the_config_asks_for_it(flagging):
    flagging.generation_config.safespec = True
    with pytest.raises(UnsupportedRequestError, match=r"del model\.generation_config\.safespec"):
        detach_safety_head(flagging)
    del flagging.generation_config.safespec
    assert type(detach_safety_head(flagging)) is LlamaForCausalLM


@pytest.mark.parametrize("value", [True, POLICY, {"num_candidates": 3}])
def test_without_a_head_the_argument_raises_and_a_config_is_ignored_as_documented(target, value):
    with pytest.raises(ValueError, match="safespec"):
        target.generate(PROMPT, **SHORT, safespec=value)
    plain = target.generate(PROMPT, **SHORT)
    assert torch.equal(target.generate(PROMPT, GenerationConfig(**SHORT, safespec=value)), plain)


DRAFTS = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
# a round that only scores the last token would count as one without drafts
CONSTANT = SafeSpecConfig(adaptive_drafts=False, lookup_drafts=False, risk_threshold=1.0, score_last_token=False)


def num_drafted(model, policy=CONSTANT, own=None, assistants=None, **arguments):
    """Tokens drafted per round, for a draft that is the target itself."""
    draft = build_model()
    model.generation_config.num_assistant_tokens = own
    draft.generation_config.num_assistant_tokens = assistants
    output = model.generate(PROMPT, **DRAFTS, assistant_model=draft, safespec=policy, **arguments)
    assert isinstance(output, SafeSpecOutput)
    return max(round(30 / output.statistics.num_rounds) - 1, 0)


def test_how_many_drafts_were_asked_for_goes_in_a_documented_order(flagging):
    given = {"generation_config": GenerationConfig(num_assistant_tokens=4, **DRAFTS)}
    fixed = replace(CONSTANT, num_draft_tokens=1)
    everything = {"own": 5, "assistants": 9}
    assert num_drafted(flagging, fixed, num_assistant_tokens=2, **everything) == 1
    assert num_drafted(flagging, num_assistant_tokens=2, **everything) == 2
    assert num_drafted(flagging, **given, **everything) == 4
    assert num_drafted(flagging, **everything) == 5
    assert num_drafted(flagging, assistants=9) == 9
    assert num_drafted(flagging) in (8, 7)  # the last round is a short one


@pytest.mark.parametrize("number", [0, -1, "5", True, 2.5])
@pytest.mark.parametrize("where", ["argument", "config", "assistant"])
def test_a_number_of_drafts_that_is_none_is_refused(flagging, number, where):
    draft, arguments = perturb(build_model()), {}
    if where == "argument":
        arguments = {"num_assistant_tokens": number}
    else:
        (draft if where == "assistant" else flagging).generation_config.num_assistant_tokens = number
    with pytest.raises(UnsupportedRequestError, match="num_assistant_tokens"):
        flagging.generate(PROMPT, **SHORT, assistant_model=draft, safespec=True, **arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"tokenizer": "name"}, "tokenizer"), ({"policy": True}, "policy"), ({"alway": True}, "alway")],
)
def test_an_argument_of_attach_that_would_be_lost_is_refused(target, never, arguments, named):
    with pytest.raises(TypeError, match=named):
        attach_safety_head(target, never, **{"tokenizer": build_tokenizer(), **arguments})
