"""Prompts that are more than tokens: embeddings, token types, positions of the caller's own."""

import copy
from dataclasses import replace

import pytest
import torch
from architectures import build_architecture
from tiny import ADAPTIVE, FIELDS, Recorder, attach, build_draft_head, build_model, build_noisy_head, perturb
from vision import build_vision, look, reread

from safespec_hf import Provenance, SafeSpecConfig, UnsupportedRequestError
from safespec_hf.decoding.prompts import check_prompts
from safespec_hf.engine.cache import CACHE_NAME

GREEDY = {"max_new_tokens": 14, "do_sample": False}
CONSTANT = SafeSpecConfig(adaptive_drafts=False)
BARE = SafeSpecConfig(**FIELDS | {"reflection": ""}, adaptive_drafts=False, lookup_drafts=False, max_recoveries=6)
LENGTHS = (7, 4)
KINDS = ["llama", "alternating", "gpt2", "qwen3_next"]


def build(kind):
    return build_architecture(kind) if kind == "qwen3_next" else build_model(kind)


@pytest.fixture(scope="module")
def built():
    return {kind: build(kind) for kind in KINDS}


def prompts(lengths=LENGTHS):
    """Left-padded."""
    width, generator = max(lengths), torch.Generator().manual_seed(4)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(10, 40, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def given(how, model, lengths=LENGTHS):
    """The arguments of `generate` for prompts that are more than their tokens."""
    inputs = prompts(lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    noise = 0.3 * torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(5))
    embeds = (model.get_input_embeddings()(ids) + noise).detach()
    return {
        "embeddings": {"inputs_embeds": embeds, "attention_mask": mask},
        "embeddings and ids": {"inputs_embeds": embeds, **inputs},
        "positions": {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0) * 2 + 3},
        "token types": {**inputs, "token_type_ids": ids % 3},
    }[how]


WAYS = [("llama", how) for how in ("embeddings", "embeddings and ids", "positions")]
WAYS += [("alternating", "embeddings"), ("qwen3_next", "embeddings"), ("gpt2", "positions"), ("gpt2", "token types")]


def drafts(model):
    yield {}
    yield {"prompt_lookup_num_tokens": 3}
    yield {"assistant_model": perturb(model)}


@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_greedy_text_is_that_of_plain_generate_and_not_that_of_the_tokens(built, tokenizer, kind, how):
    model = attach(built[kind], tokenizer)
    inputs = given(how, model)
    plain, start = model.generate(**inputs, **GREEDY), inputs.get("input_ids", torch.empty(2, 0)).shape[1]
    assert not torch.equal(plain[:, start:], model.generate(**prompts(), **GREEDY)[:, LENGTHS[0] :])
    for extra in drafts(model):
        output = model.generate(**inputs, **GREEDY, **extra, safespec=CONSTANT)
        assert torch.equal(output, plain), list(extra)


@pytest.mark.parametrize("source", ["draft", "target"])
@pytest.mark.parametrize(("kind", "how"), WAYS)
def test_after_recoveries_tokens_and_risks_are_those_of_plain_steps(built, tokenizer, kind, how, source):
    model = built[kind]
    attach(model, tokenizer, build_noisy_head(model, 0.7, pooling="last"))
    inputs = given(how, model)
    arguments = {**GREEDY, "assistant_model": perturb(model), "return_dict_in_generate": True}
    output = model.generate(**inputs, **arguments, safespec=replace(BARE, candidate_source=source))
    assert output.statistics.num_flags > 0
    assert not bool((output.risks >= model.safety.risk_threshold).any())
    logits, states = reread(model, inputs, output.sequences)
    is_scored = ~output.risks[:, :-1].isnan()
    risks = model.safety.head.risk(states).detach()
    # the same float32 sums in another order, of a scan for recurrent layers
    torch.testing.assert_close(output.risks[:, :-1][is_scored], risks[is_scored], atol=1e-3, rtol=0.0)
    is_own = (output.provenance == Provenance.TARGET) | (output.provenance == Provenance.DRAFTED)
    answers = output.sequences[:, -output.provenance.shape[1] :]
    assert torch.equal(answers[is_own], logits.argmax(dim=-1)[is_own])


@pytest.mark.parametrize("how", ["embeddings", "positions"])
def test_a_flag_at_the_first_token_goes_back_to_the_prompt_itself(built, tokenizer, how):
    model = built["llama"]
    attach(model, tokenizer, build_noisy_head(model, 0.7, pooling="last"))
    for source in ("draft", "target"):
        policy = replace(BARE, candidate_source=source, risk_threshold=1e-4, max_recoveries=2)
        arguments = {**GREEDY, "assistant_model": perturb(model), "return_dict_in_generate": True}
        output = model.generate(**given(how, model), **arguments, safespec=policy)
        assert output.finish_reasons == ["safety_refusal"] * 2
        assert [event.rolled_back_to for events in output.events for event in events] == [0] * 6


@pytest.mark.parametrize("kind", ["llama", "qwen3_next"])
def test_with_embeddings_only_new_tokens_and_a_cache_that_goes_on_are_returned(built, tokenizer, kind):
    model = attach(built[kind], tokenizer)
    inputs = given("embeddings", model, (7,))
    arguments = {**GREEDY, "return_dict_in_generate": True, "prompt_lookup_num_tokens": 3, "safespec": CONSTANT}
    output = model.generate(**inputs, **arguments)
    assert output.sequences.shape == output.risks.shape == (1, 14)
    cache = output[CACHE_NAME]
    read = cache.get_seq_length() - 7
    assert 0 < read <= 14
    longer = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(output.sequences)], dim=1)
    with torch.no_grad():
        steps = [model(output.sequences[:, at : at + 1], **{CACHE_NAME: cache}) for at in range(read, 14)]
        expected = model(inputs_embeds=longer, use_cache=False).logits[:, -1]
    if steps:
        torch.testing.assert_close(steps[-1].logits[:, -1], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("lengths", [(7,), LENGTHS])
@pytest.mark.parametrize(("kind", "how"), [(kind, how) for kind, how in WAYS if kind != "qwen3_next"])
def test_a_cache_of_the_callers_own_is_gone_on_with(built, tokenizer, kind, how, lengths):
    model = attach(built[kind], tokenizer)
    inputs, part = given(how, model, lengths), given(how, model, lengths)
    part = {name: value[:, :5] for name, value in part.items()}
    cache = model.generate(**part, max_new_tokens=1, return_dict_in_generate=True)[CACHE_NAME]
    assert cache.get_seq_length() == 5
    theirs = copy.deepcopy(cache)
    plain = model.generate(**inputs, **GREEDY, **{CACHE_NAME: theirs})
    is_real = torch.nn.functional.pad(inputs["attention_mask"], (0, 13), value=1).bool()
    for extra in [*drafts(model), {"assistant_model": build_draft_head(model)} if kind == "llama" else {}]:
        ours = copy.deepcopy(cache)
        output = model.generate(**inputs, **GREEDY, **extra, **{CACHE_NAME: ours}, safespec=CONSTANT)
        assert torch.equal(output, plain)
        for own, other in zip(ours.layers, theirs.layers, strict=True):
            assert own.keys.shape == other.keys.shape
            is_held = is_real[:, -own.keys.shape[2] :, None]
            torch.testing.assert_close(
                own.keys.movedim(1, 2).flatten(2).where(is_held, 0),
                other.keys.movedim(1, 2).flatten(2).where(is_held, 0),
                atol=1e-4,
                rtol=1e-4,
            )


def test_streamed_is_what_is_returned(built, tokenizer):
    model, streamer = attach(built["llama"], tokenizer), Recorder()
    output = model.generate(**given("embeddings", model, (7,)), **GREEDY, safespec=True, streamer=streamer)
    assert streamer.tokens == output[0].tolist()


def test_what_is_sampled_does_not_depend_on_drafts(built, tokenizer):
    model, answers = attach(built["llama"], tokenizer), []
    arguments = {"max_new_tokens": 14, "do_sample": True, "safespec": CONSTANT}
    for extra in ({}, {"prompt_lookup_num_tokens": 3}):
        torch.manual_seed(7)
        answers.append(model.generate(**given("embeddings", model), **arguments, **extra))
    assert torch.equal(*answers)


def test_several_answers_to_a_prompt_begin_with_the_same_image(tokenizer):
    model = attach(build_vision("qwen2_5_vl"), tokenizer)
    inputs, arguments = look("qwen2_5_vl", (9, 11)), {"do_sample": True, "top_k": 1, "max_new_tokens": 8}
    several = model.generate(**inputs, **arguments, num_return_sequences=2, safespec=CONSTANT)
    plain = model.generate(**look("qwen2_5_vl", (9, 11)), do_sample=False, max_new_tokens=8)
    assert torch.equal(several, plain.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("how", ["embeddings", "embeddings and ids", "positions"])
def test_draft_heads_and_trees_leave_greedy_text_as_it_is(built, tokenizer, how, cheap_drafts):
    model = attach(built["llama"], tokenizer)
    inputs = given(how, model)
    plain = model.generate(**inputs, **GREEDY)
    for assistant in (build_draft_head(model), perturb(model, 0.03)):
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=assistant, safespec=ADAPTIVE), plain)


def test_positions_of_the_callers_own_do_not_lead_past_the_last_one(built, tokenizer):
    model = attach(built["gpt2"], tokenizer)
    ids = torch.tensor([[11, 17, 23, 11, 17]])
    inputs = {"input_ids": ids, "position_ids": torch.arange(113, 118)[None]}  # of 128
    arguments = {"max_new_tokens": 11, "do_sample": False}
    for extra in drafts(model):
        output = model.generate(**inputs, **arguments, **extra, safespec=CONSTANT)
        assert torch.equal(output, model.generate(**inputs, **arguments))


def test_a_prompt_is_read_in_one_forward(built, tokenizer):
    model = attach(built["llama"], tokenizer)
    policy = SafeSpecConfig(score_last_token=False)
    arguments = {**GREEDY, "return_dict_in_generate": True, "safespec": policy}
    output = model.generate(**given("embeddings", model), **arguments)
    assert output.statistics.num_target_forwards == GREEDY["max_new_tokens"]


REFUSED = {
    "ids of other places": ({"inputs_embeds": torch.zeros(1, 5, 32)}, "not the same tokens"),
    "positions of fewer tokens": ({"position_ids": torch.tensor([[3, 4]])}, "must be as long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_before_the_first_forward(target, tokenizer, name):
    model, (arguments, message) = attach(target, tokenizer), REFUSED[name]
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(UnsupportedRequestError, match=message):
        model.generate(input_ids=torch.tensor([[11, 17, 23]]), **GREEDY, **arguments, safespec=True)


def test_arguments_that_change_from_token_to_token_are_refused_by_name(tokenizer, monkeypatch):
    model = attach(build_model("gpt2"), tokenizer)
    prepare = model.prepare_inputs_for_generation

    def count(ids, **kwargs):
        inputs = prepare(ids, **kwargs)
        return inputs | {"token_type_ids": torch.arange(ids.shape[1])[None, -inputs["input_ids"].shape[1] :]}

    monkeypatch.setattr(model, "prepare_inputs_for_generation", count)
    ids = torch.tensor([[11, 17, 23]])
    with pytest.raises(UnsupportedRequestError, match=r"can't go on with \['token_type_ids'\]"):
        model.generate(ids, token_type_ids=torch.zeros_like(ids), **GREEDY, safespec=True)


def test_images_that_cross_attention_keeps_are_refused(target, tokenizer):
    model = attach(target, tokenizer)
    model.config.cross_attention_layers = [1]
    with pytest.raises(UnsupportedRequestError, match="cross-attention"):
        check_prompts(model, torch.tensor([[11]]), {"pixel_values": torch.ones(1)})


def test_images_are_streamed_and_sampled_after_like_text(tokenizer):
    model, streamer = attach(build_vision("qwen2_5_vl"), tokenizer), Recorder()
    arguments = {"max_new_tokens": 8, "do_sample": True, "safespec": CONSTANT}
    output = model.generate(**look("qwen2_5_vl"), **arguments, streamer=streamer)
    assert streamer.tokens[-8:] == output[0, -8:].tolist()
    answers = []
    for extra in ({}, {"prompt_lookup_num_tokens": 3}):
        torch.manual_seed(7)
        answers.append(model.generate(**look("qwen2_5_vl"), **arguments, **extra))
    assert torch.equal(*answers)
