"""What comes back of every step besides the tokens is what plain `generate` gives, whatever was drafted."""

import copy

import pytest
import torch
from architectures import build_architecture
from test_caches import fill
from tiny import DRAFTING, PROMPT, REFLECTION, REFUSAL, attach, build_coin_head, build_head, build_model, drafting
from vision import IMAGE, VISION, build_vision, look

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.engine.cache import CACHE_NAME

OUTPUTS = ("scores", "logits", "hidden_states", "attentions")
PADDED = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
BATCH = {"inputs": PADDED, "attention_mask": (PADDED != 0).long()}
ASKED = {f"output_{name}": True for name in OUTPUTS} | {"return_dict_in_generate": True, "max_new_tokens": 12}
POLICY = SafeSpecConfig(adaptive_drafts=False)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums that depend on the shape of a block


def eager(kind="llama", **config):
    return build_model(kind, attn_implementation="eager", **config)


def assert_alike(ours, theirs, is_real=None):
    """`is_real`: of the places in the last dimension but one; what is said of padding before a prompt is chance."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_alike(*pair, is_real)
    elif theirs is not None:
        assert (ours.shape, ours.dtype, ours.is_inference()) == (theirs.shape, theirs.dtype, False)
        if is_real is not None and theirs.shape[-2] >= is_real.shape[1]:
            places = torch.nn.functional.pad(is_real, (0, theirs.shape[-2] - is_real.shape[1]), value=True)
            places = places.view(len(places), *[1] * (theirs.dim() - 3), -1, 1)
            ours, theirs = ours.where(places, 0), theirs.where(places, 0)
        torch.testing.assert_close(ours, theirs, **CLOSE)


def agree(model, drafts, **arguments):
    arguments = ASKED | arguments
    theirs = model.generate(**copy.deepcopy(arguments))  # of a cache, which is filled
    ours = model.generate(**arguments, **drafts, safespec=POLICY)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    mask = arguments.get("attention_mask")
    for name in OUTPUTS:
        has_places = name in ("hidden_states", "attentions") and mask is not None
        assert_alike(ours.get(name), theirs.get(name), mask.bool() if has_places else None)
    return ours


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("kind", ["llama", "alternating", "gpt2"])
def test_every_step_is_that_of_plain_decoding(kind, source, tokenizer):
    model = attach(eager(kind), tokenizer)
    agree(model, drafting(source, model), inputs=PROMPT, do_sample=False, repetition_penalty=1.3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_rows_of_a_batch_go_on_with_padding_as_in_plain_decoding(kind, use_cache, tokenizer):
    model = attach(eager(kind), tokenizer)
    end = int(model.generate(**BATCH, max_new_tokens=5, do_sample=False)[0, -1])  # the first row ends early
    output = agree(model, {}, **BATCH, do_sample=False, eos_token_id=end, use_cache=use_cache)
    assert output.finish_reasons[0] == "eos"
    assert (output.past_key_values if "past_key_values" in output else output.get("cache")) is None or use_cache


RAGGED = {
    "inputs": torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]]),
    "attention_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]]),
}


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_right_is_read_as_in_plain_decoding(kind, source, tokenizer):
    model = attach(eager(kind), tokenizer)
    agree(model, drafting(source, model), **RAGGED, do_sample=False)


def test_padding_on_the_right_is_refused_where_it_would_be_read_otherwise(tokenizer):
    model = attach(eager("sliding"), tokenizer)
    agree(model, {"prompt_lookup_num_tokens": 3}, **RAGGED, do_sample=False, max_new_tokens=4)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(UnsupportedRequestError, match="Right padding"):
        model.generate(**RAGGED, max_new_tokens=5, safespec=True)


def test_what_attention_does_not_give_is_none_as_in_plain_decoding(guarded):
    agree(guarded, {}, inputs=PROMPT, do_sample=False)


def test_only_what_was_asked_for_comes_back_and_nothing_without_a_dict(guarded):
    output = guarded.generate(
        PROMPT, max_new_tokens=4, output_logits=True, return_dict_in_generate=True, safespec=True
    )
    assert [output.get(name) is not None for name in OUTPUTS] == [False, True, False, False]
    assert guarded.generate(PROMPT, max_new_tokens=4, output_logits=True, safespec=True).shape == (1, 8)


def test_what_is_sampled_has_the_scores_that_it_was_drawn_from(guarded):
    fields = {"do_sample": True, "temperature": 0.7, "top_k": 3, **ASKED, "safespec": POLICY}
    output = guarded.generate(PROMPT, prompt_lookup_num_tokens=3, num_return_sequences=3, **fields)
    new = output.sequences[:, PROMPT.shape[1] :]
    chosen = torch.stack(output.scores, dim=1).gather(2, new[..., None])
    assert bool(chosen.isfinite().all())


@pytest.mark.parametrize("fields", [{"keep_reflection": True}, {"reflection_scope": "recovery"}], ids=str)
def test_after_a_recovery_scores_are_of_the_tokens_that_came_back(fields, tokenizer):
    model = eager()
    attach(model, tokenizer, build_coin_head(model, 0.2, seed=3))
    policy = SafeSpecConfig(max_segment_tokens=4, num_candidates=4, reflection=REFLECTION, refusal=REFUSAL, **fields)
    arguments = {**BATCH, **ASKED, "max_new_tokens": 24, "do_sample": False}
    output = model.generate(**arguments, safespec=policy)
    num_new = output.sequences.shape[1] - PADDED.shape[1]
    assert any(event.outcome == "recovered" for events in output.events for event in events)
    assert {len(output[name]) for name in OUTPUTS} == {num_new}
    # what the target chose itself is what its scores say
    for row, origins in enumerate(output.provenance):
        for step, origin in enumerate(origins.tolist()):
            if origin in (0, 1):
                assert int(output.scores[step][row].argmax()) == int(output.sequences[row, PADDED.shape[1] + step])


@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "nemotron_h", "zamba", "zamba2"])
def test_models_that_say_themselves_how_many_logits_they_keep_give_those_of_every_step(name, tokenizer):
    model, ids = build_architecture(name), torch.randint(10, 40, (1, 7), generator=torch.Generator().manual_seed(0))
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    arguments |= {"output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **arguments)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    guarded = model.generate(ids, safespec=True, **arguments)
    torch.testing.assert_close(guarded.scores, plain.scores, atol=5e-3, rtol=0)  # scans that are split otherwise


@pytest.fixture(scope="module")
def seeing():
    return {name: build_vision(name) for name in VISION}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", VISION)
def test_images_are_shown_as_often_as_in_plain_decoding(name, use_cache, seeing, tokenizer):
    model, source = attach(seeing[name], tokenizer), {"prompt_lookup_num_tokens": 3}
    asked = {"output_attentions": False, "suppress_tokens": [IMAGE], "use_cache": use_cache}
    agree(model, source, **look(name, (9, 11)), **asked, do_sample=False)


@pytest.mark.parametrize("wanted", [("scores",), OUTPUTS])
@pytest.mark.parametrize("name", VISION)
def test_an_answer_may_have_tokens_that_stand_for_images(name, wanted, seeing, tokenizer):
    model, inputs = attach(seeing[name], tokenizer), look(name, (9, 11))
    words = [12, IMAGE, 13, 14, IMAGE]
    asked = {f"output_{each}": each in wanted and each != "attentions" for each in OUTPUTS}
    asked |= {"prefix_allowed_tokens_fn": lambda _, ids: [words[(len(ids) - 11) % 5]], "max_new_tokens": 6}
    agree(model, {}, **inputs, **asked, do_sample=False)


@pytest.mark.parametrize("wanted", [("logits",), OUTPUTS])
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("name", [name for name in VISION if name != "qwen3_5"])
def test_after_a_cache_steps_know_what_no_token_tells(name, num_rows, wanted, seeing, tokenizer):
    model = attach(seeing[name], tokenizer)
    inputs = look(name, (9, 11)[:num_rows])
    first = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[15, 16]] * num_rows)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1)
    asked = {f"output_{each}": each in wanted and each != "attentions" for each in OUTPUTS}
    given = {"input_ids": ids, "attention_mask": mask, CACHE_NAME: first[CACHE_NAME]}
    agree(model, {"prompt_lookup_num_tokens": 3}, **given, **asked, do_sample=False)


@pytest.mark.parametrize("kind", ["llama", "sliding", "alternating", "gpt2"])
def test_after_a_cache_steps_are_those_of_plain_decoding(kind, tokenizer):
    model = attach(eager(kind), tokenizer)
    for num_cached in (1, 3):
        given = {"inputs": PROMPT, CACHE_NAME: fill(model, num_cached, PROMPT)}
        agree(model, {"prompt_lookup_num_tokens": 3}, **given, do_sample=False)
    other = fill(model, 3, PROMPT + 1)  # a cache is the caller's word on what was read
    agree(model, {}, **{"inputs": PROMPT, CACHE_NAME: other}, do_sample=False)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("kind", ["llama", "sliding", "alternating", "gpt2"])
def test_after_a_batchs_cache_steps_are_those_of_plain_decoding(kind, implementation, tokenizer):
    model = attach(eager(kind), tokenizer)
    embeds = model.get_input_embeddings()(PADDED).detach() * 1.3
    ways = [{"inputs": PADDED}] if implementation else [{"inputs": PADDED}, {"inputs_embeds": embeds}]
    for way in ways:
        asked = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        asked |= {"cache_implementation": "static", "max_cache_len": 40} if implementation else {}
        mask = BATCH["attention_mask"]
        given = {name: value[:, :3] for name, value in way.items()}
        cache = model.generate(**given, attention_mask=mask[:, :3], **asked)[CACHE_NAME]
        given = {**way, "attention_mask": mask, CACHE_NAME: cache}
        agree(model, {"prompt_lookup_num_tokens": 3}, **given, do_sample=False)
