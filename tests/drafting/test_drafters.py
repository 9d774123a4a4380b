"""Drafts of a draft head, across rounds, rollbacks and rows, are those of a fresh start with all states at hand."""

import random

import pytest
import torch
from tiny import build_draft_head, build_model, make_row

from safespec_hf.drafting.candidates import SafeSpecCandidateGenerator
from safespec_hf.drafting.draft_length import DraftCosts
from safespec_hf.drafting.drafters import StateWindow
from safespec_hf.outputs import Provenance


@pytest.fixture
def model():
    return build_model()


@torch.no_grad()
def states_of(model, tokens):
    """All hidden states of a context, concatenated as the draft head reads them."""
    return torch.cat(model(torch.tensor([tokens]), output_hidden_states=True).hidden_states, dim=-1)


def observe(generator, model, row, index=0):
    """What a round of decoding would show: the states of all tokens but the last."""
    context = row.prompt + row.tokens
    generator.observe(index, 0, states_of(model, context[:-1])[0])


def fresh_drafts(model, context, num):
    generator, row = SafeSpecCandidateGenerator(build_draft_head(model)), make_row(context)
    observe(generator, model, row)
    return generator.draft([row], [num]).drafts[0]


def test_before_the_target_has_read_the_prompt_nothing_is_drafted(model):
    assert SafeSpecCandidateGenerator(build_draft_head(model)).draft([make_row([11, 12])], [3]).drafts == [[]]


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
    generator, choose = SafeSpecCandidateGenerator(build_draft_head(model)), random.Random(seed)
    row = make_row([11, 12, 13])
    for _ in range(12):
        observe(generator, model, row)
        drafts = generator.draft([row], [4]).drafts[0]
        assert drafts == fresh_drafts(model, row.prompt + row.tokens, 4)
        if row.tokens and choose.random() < 0.4:
            row.truncate(choose.randrange(len(row.tokens)))
            generator.keep([row.num_context - 1])
        for token in [*drafts[: choose.randint(0, 4)], choose.randrange(10, 40)]:
            row.append(token, Provenance.TARGET)
        generator.keep([row.num_context - 1])


@torch.no_grad()
def test_ragged_rows_are_drafted_as_each_row_alone(model):
    prompts = [[11, 12, 13, 14], [15, 16], [17, 18, 19]]
    rows = [make_row(prompt, index) for index, prompt in enumerate(prompts)]
    generator = SafeSpecCandidateGenerator(build_draft_head(model), num_rows=3)
    for index, row in enumerate(rows):
        observe(generator, model, row, index)
    assert generator.draft(rows, [3, 0, 2]).drafts == [
        fresh_drafts(model, prompts[0], 3),
        [],
        fresh_drafts(model, prompts[2], 2),
    ]


@torch.no_grad()
def test_a_longer_match_is_preferred_to_a_draft_model_that_is_never_right(model):
    generator = SafeSpecCandidateGenerator(model, max_matching_ngram_size=3, costs=DraftCosts(draft=0.3))
    row = make_row([11, 12, 13, 14, 15, 11, 12, 13])
    for _ in range(30):
        generator.model.length.record([5], [])
    assert generator.draft([row], [2]).drafts == [[14, 15]]
    assert generator.num_forwards == 0


def test_a_window_gives_zeros_for_positions_it_never_saw():
    window = StateWindow(2)
    window.append(3, torch.ones(2, 2))
    assert window.read(1, 5).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_a_window_is_the_list_of_the_last_states(seed):
    choose, window, states, start = random.Random(seed), StateWindow(1), [], 0
    for _ in range(60):
        num = choose.choice([1, 2, 90])
        window.append(len(states), torch.arange(len(states), len(states) + num).float()[:, None])
        states += range(len(states), len(states) + num)
        kept = choose.randint(start, len(states))
        window.keep(kept)
        states = states[:kept]
        start = choose.randint(start, len(states))
        window.forget_before(start)
        assert window.read(start, len(states)).flatten().tolist() == states[start:]
        assert window.end == len(states)
