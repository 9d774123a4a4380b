"""Drafts of networks that read the target's states: across rounds and rollbacks those of a fresh start."""

import random

import pytest
import torch
from drafting_methods import bigram_model, build_dflash, write_mtp
from tiny import PROMPT, build_head, build_model, make_row

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.decoding.companions import dflash_draft, mtp_draft
from safespec_hf.drafting.router import DraftRouter
from safespec_hf.outputs import Provenance


@pytest.fixture(params=["mtp", "dflash"])
def made(request, tmp_path):
    """A target, and what drafts for it, with random weights."""
    target = build_model()
    if request.param == "dflash":
        return target, dflash_draft(target, build_dflash(target))
    write_mtp(tmp_path, target)
    draft = mtp_draft(target)
    torch.manual_seed(0)
    for weight in draft.model.layers.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return target, draft


@torch.no_grad()
def observe(router, model, row):
    """What a round of decoding would show: the states of all tokens but the last."""
    context = row.prompt + row.tokens
    states = model(torch.tensor([context[:-1]]), output_hidden_states=True).hidden_states
    router.observe(0, 0, torch.cat([states[layer] for layer in router.layers], dim=-1)[0])


@torch.no_grad()
def drafts_after(made, router, row):
    observe(router, made[0], row)
    return router.draft([row], [4]).drafts[0]


@pytest.mark.parametrize("seed", range(3))
def test_rounds_and_rollbacks_leave_no_trace(made, seed):
    def fresh():
        return DraftRouter(made[1].model, make_drafter=made[1].make_drafter)

    router, choose, row = fresh(), random.Random(seed), make_row([11, 12, 13])
    for _ in range(12):
        drafts = drafts_after(made, router, row)
        assert drafts == drafts_after(made, fresh(), make_row(row.prompt + row.tokens))
        assert drafts
        if row.tokens and choose.random() < 0.4:
            row.truncate(choose.randrange(len(row.tokens)))
            router.keep([row.num_context - 1])
        for token in [*drafts[: choose.randint(0, 4)], choose.randrange(10, 40)]:
            row.append(token, Provenance.TARGET)
        router.keep([row.num_context - 1])


def test_before_the_target_has_read_the_prompt_nothing_is_drafted(made):
    router = DraftRouter(made[1].model, make_drafter=made[1].make_drafter)
    assert router.draft([make_row([11, 12])], [3]).drafts == [[]]


def test_mtp_layers_that_know_the_target_draft_what_it_says(tmp_path):
    target = bigram_model()
    write_mtp(tmp_path, target, num_layers=3)
    row, draft = make_row(PROMPT[0].tolist()), mtp_draft(target)
    router = DraftRouter(draft.model, make_drafter=draft.make_drafter)
    expected = target.generate(PROMPT, max_new_tokens=3, do_sample=False)[0, 4:].tolist()
    assert drafts_after((target, draft), router, row) == expected


@pytest.mark.parametrize("policy", [SafeSpecConfig(candidate_source="draft"), SafeSpecConfig(verification="segment")])
def test_they_can_t_write_by_themselves(made, tokenizer, policy):
    target, draft = made
    attach_safety_head(target, build_head(target), tokenizer=tokenizer)
    is_mtp = "Mtp" in type(draft.model).__name__
    arguments = {"use_mtp": True} if is_mtp else {"assistant_model": draft.model, "speculation_type": "dflash"}
    with pytest.raises(UnsupportedRequestError, match="reads states of the target"):
        target.generate(PROMPT, max_new_tokens=4, safespec=policy, **arguments)


def test_what_is_missing_is_named(guarded, draft, tmp_path):
    for arguments, message in (
        ({"use_mtp": True}, "no `num_mtp_layers`"),
        ({"use_mtp": True, "assistant_model": draft}, "Choose one"),
        ({"speculation_type": "dflash"}, "needs an `assistant_model`"),
        ({"speculation_type": "dflash", "assistant_model": draft}, "but it is LlamaForCausalLM"),
        ({"speculation_type": "dflash", "assistant_model": build_dflash(build_model(hidden_size=16))}, "16 wide"),
        ({"speculation_type": "dflash", "assistant_model": build_dflash(guarded, mask_token_id=40)}, "no token"),
    ):
        with pytest.raises(UnsupportedRequestError, match=message):
            guarded.generate(PROMPT, max_new_tokens=4, safespec=True, **arguments)
    guarded.config.num_mtp_layers = 1
    guarded.config.name_or_path = str(tmp_path)
    with pytest.raises(UnsupportedRequestError, match="could not be read from its checkpoint"):
        guarded.generate(PROMPT, max_new_tokens=4, safespec=True, use_mtp=True)
