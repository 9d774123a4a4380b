"""Drafts of a draft head, across rounds, rollbacks and rows, are those of a fresh start with all states at hand."""

import random

import pytest
import torch
from tiny import build_draft_head, build_model, make_row

from safespec_hf.drafting.router import DraftRouter
from safespec_hf.outputs import Provenance


@pytest.fixture
def model():
    return build_model()


@torch.no_grad()
def states_of(model, tokens):
    """All hidden states of a context, concatenated as the draft head reads them."""
    return torch.cat(model(torch.tensor([tokens]), output_hidden_states=True).hidden_states, dim=-1)


def observe(router, model, row, index=0):
    """What a round of decoding would show: the states of all tokens but the last."""
    context = row.prompt + row.tokens
    router.observe(index, 0, states_of(model, context[:-1])[0])


def fresh_drafts(model, context, num):
    router, row = DraftRouter(build_draft_head(model)), make_row(context)
    observe(router, model, row)
    return router.draft([row], [num]).drafts[0]


def test_before_the_target_has_read_the_prompt_nothing_is_drafted(model):
    assert DraftRouter(build_draft_head(model)).draft([make_row([11, 12])], [3]).drafts == [[]]


@torch.no_grad()
def test_a_draft_is_what_the_head_says_step_by_step(model):
    head, context = build_draft_head(model), [11, 12, 13, 14]
    states, tokens = torch.cat([torch.zeros(1, 1, 96), states_of(model, context[:-1])], dim=1), list(context)
    output = head(torch.tensor([context]), states)
    for _ in range(3):
        tokens.append(int(head.token_ids[output.logits[0, -1].argmax()]))
        last = {"cache": output.cache, "states": output.hidden_states[:, -1:]}
        output = head(torch.tensor([tokens[-1:]]), **last)
    assert fresh_drafts(model, context, 3) == tokens[4:]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_rounds_and_rollbacks_leave_no_trace(model, seed):
    router, choose = DraftRouter(build_draft_head(model)), random.Random(seed)
    row = make_row([11, 12, 13])
    for _ in range(12):
        observe(router, model, row)
        drafts = router.draft([row], [4]).drafts[0]
        assert drafts == fresh_drafts(model, row.prompt + row.tokens, 4)
        if row.tokens and choose.random() < 0.4:
            row.truncate(choose.randrange(len(row.tokens)))
            router.keep([row.num_context - 1])
        for token in [*drafts[: choose.randint(0, 4)], choose.randrange(10, 40)]:
            row.append(token, Provenance.TARGET)
        router.keep([row.num_context - 1])


@torch.no_grad()
def test_ragged_rows_are_drafted_as_each_row_alone(model):
    prompts = [[11, 12, 13, 14], [15, 16], [17, 18, 19]]
    rows = [make_row(prompt, index) for index, prompt in enumerate(prompts)]
    router = DraftRouter(build_draft_head(model), num_rows=3)
    for index, row in enumerate(rows):
        observe(router, model, row, index)
    assert router.draft(rows, [3, 0, 2]).drafts == [
        fresh_drafts(model, prompts[0], 3),
        [],
        fresh_drafts(model, prompts[2], 2),
    ]


@torch.no_grad()
def test_a_row_at_the_end_of_the_rotary_table_leaves_the_others_their_drafts(model):
    head = build_draft_head(model)
    rows = [make_row([11 + index % 20 for index in range(num)], at) for at, num in enumerate((62, 20, 66))]
    router = DraftRouter(head, num_rows=3)
    for index, row in enumerate(rows):
        observe(router, model, row, index)
    assert router.draft(rows, [4, 4, 4]).drafts == [[], fresh_drafts(model, rows[1].prompt, 4), []]
    assert len(fresh_drafts(model, rows[0].prompt, 4)) == 64 + 1 - 62


@torch.no_grad()
def test_a_row_whose_prompt_was_not_read_yet_does_not_hold_up_the_others(model):
    router = DraftRouter(build_draft_head(model), num_rows=2)
    rows = [make_row([11, 12], 0), make_row([13, 14, 15], 1)]
    observe(router, model, rows[1], 1)
    assert router.draft(rows, [3, 3]).drafts == [[], fresh_drafts(model, [13, 14, 15], 3)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_of_another_precision_than_its_target_drafts(model, dtype):
    head = build_draft_head(model).to(dtype).bind(model)
    router, row = DraftRouter(head, do_sample=True, vocab_size=40), make_row([11, 12, 13])
    observe(router, model, row)
    proposal = router.draft([row], [3])
    assert set(proposal.drafts[0]) <= set(head.token_ids.tolist())
    assert proposal.probs_BGV.dtype == torch.float32


def test_a_head_samples_no_segments(model):
    assert DraftRouter(build_draft_head(model)).sampler(0, make_row([11]), 1) is None
