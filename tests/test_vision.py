"""Prompts with images: what comes after them is what plain `generate` says, and can be taken back like any other."""

from dataclasses import replace

import pytest
import torch
from tiny import FIELDS, VOCAB_SIZE, attach, build_head, build_tokenizer, perturb
from vision import IMAGE, VISION, build_vision, look, reread

from safespec_hf import Provenance, SafeSpecConfig

BATCH = (9, 14, 11)
GREEDY = {"max_new_tokens": 14, "do_sample": False}
CONSTANT = SafeSpecConfig(adaptive_drafts=False)
# reflections are visible, so that what is returned is what was read
FLAGS = {**FIELDS, "adaptive_drafts": False, "lookup_drafts": False, "max_recoveries": 6}
RECOVERING = SafeSpecConfig(**FLAGS, keep_reflection=True)
BARE = SafeSpecConfig(**FLAGS | {"reflection": ""})


@pytest.fixture(scope="module")
def built():
    return {name: build_vision(name) for name in VISION}


def drafting(source, model):
    return {
        "none": {},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "draft": {"assistant_model": perturb(model)},  # it sees no image, only the tokens in its place
    }[source]


def check_risks(model, inputs, output):
    """Holds risks against those of plain steps, whose logits it returns."""
    logits, states = reread(model, inputs, output.sequences)
    risks, is_scored = model.safety.head.risk(states).detach(), ~output.risks[:, :-1].isnan()
    # the same float32 sums in another order
    torch.testing.assert_close(output.risks[:, :-1][is_scored], risks[is_scored], atol=2e-4, rtol=0.0)
    return logits


@pytest.mark.parametrize("name", VISION)
def test_greedy_text_depends_on_the_image_and_is_that_of_plain_generate(built, tokenizer, name):
    model = attach(built[name], tokenizer)
    inputs = look(name, BATCH)
    plain = model.generate(**inputs, **GREEDY)
    other = model.generate(**inputs | {"pixel_values": -inputs["pixel_values"]}, **GREEDY)
    assert not torch.equal(plain, other)
    for source in ("none", "lookup", "draft"):
        output = model.generate(**inputs, **GREEDY, safespec=CONSTANT, **drafting(source, model))
        assert torch.equal(output, plain), source


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("num_known", [VOCAB_SIZE, IMAGE])
def test_a_draft_need_not_know_what_stands_for_an_image(built, name, num_known):
    model = attach(built[name], build_tokenizer(num_known))  # what is above was added to the target
    draft = build_vision(name)
    draft.resize_token_embeddings(num_known)
    arguments = {**GREEDY, "assistant_model": draft, "return_dict_in_generate": True}
    output = model.generate(**look(name), safespec=CONSTANT, **arguments)
    assert output.statistics.num_accepted_tokens > 0


def test_segments_are_judged_after_an_image(built):
    model, inputs = built["qwen2_5_vl"], look("qwen2_5_vl", BATCH)
    attach(model, build_tokenizer(has_digits=True), build_head(model, pooling="last"))
    policy = SafeSpecConfig(
        **FLAGS, keep_reflection=True, verification="segment", quality_prompt="w27 w28", quality_threshold=4
    )
    arguments = {**GREEDY, "assistant_model": perturb(model), "return_dict_in_generate": True}
    output = model.generate(**inputs, **arguments, safespec=risky(model, inputs, policy, **arguments))
    assert output.statistics.num_segments_by_target > 0 < output.statistics.num_flags
    check_risks(model, inputs, output)


def risky(model, inputs, policy, **arguments):
    """The policy, with a threshold that some tokens of an answer reach."""
    silent = model.generate(**inputs, **arguments, safespec=CONSTANT)
    return replace(policy, risk_threshold=float(silent.risks.nanquantile(0.9)))


FLAGGED = [("qwen2_5_vl", BARE, "target"), ("qwen3_5", BARE, "target"), ("gemma3", BARE, "draft")]


@pytest.mark.parametrize(("name", "policy", "source"), [(name, RECOVERING, "draft") for name in VISION] + FLAGGED)
def test_after_recoveries_tokens_and_risks_are_those_of_plain_steps(built, tokenizer, name, policy, source):
    model, inputs = built[name], look(name, BATCH)
    attach(model, tokenizer, build_head(model, pooling="last"))
    arguments = {**GREEDY, "return_dict_in_generate": True, "assistant_model": perturb(model)}
    policy = risky(model, inputs, replace(policy, candidate_source=source), **arguments)
    output = model.generate(**inputs, **arguments, safespec=policy)
    assert output.statistics.num_flags > 0
    assert not bool((output.risks >= policy.risk_threshold).any())
    logits = check_risks(model, inputs, output)
    is_own = (output.provenance == Provenance.TARGET) | (output.provenance == Provenance.DRAFTED)
    assert is_own.any()
    assert torch.equal(output.sequences[:, -logits.shape[1] :][is_own], logits.argmax(dim=-1)[is_own])
