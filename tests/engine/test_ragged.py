"""Rows that are read in groups are read as rows that are read together, with less padding."""

import itertools

import pytest
import torch
from tiny import build_draft_head, build_head, build_model, cheap_drafts, perturb

from safespec_hf import attach_safety_head
from safespec_hf.engine import ragged
from safespec_hf.engine.cache import CachedModel
from safespec_hf.engine.ragged import FORWARD_TOKENS, divide

LENGTHS = (110, 3, 90, 1, 5, 40)


def tokens(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 40, (length,), generator=generator).tolist() for length in lengths]


def cost(groups, lengths):
    return sum(len(rows) * max(lengths[row] for row in rows) + FORWARD_TOKENS for rows in groups)


@pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 5), (1,), (900, 1, 1, 1), (200, 210, 10, 12, 400)])
def test_no_other_division_costs_less(lengths):
    groups = divide(lengths)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        other = [[order[0]]]
        for row, is_cut in zip(order[1:], cuts, strict=True):
            if is_cut:
                other.append([row])
            else:
                other[-1].append(row)
        assert cost(groups, lengths) <= cost(other, lengths)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_in_groups_are_read_as_each_alone(kind):
    model = build_model(kind)
    blocks = tokens(LENGTHS)
    cached = CachedModel(model, len(blocks), layers=[1, 2])
    first = cached.forward(blocks, 3)
    assert cached.usage.num_forwards == len(divide(LENGTHS)) > 1
    assert cached.lengths == list(LENGTHS)
    cached.keep([max(length - 2, 1) for length in LENGTHS])
    more = tokens([2, 4, 1, 3, 3, 2], seed=1)
    then = cached.forward(more, 1)
    for row, block in enumerate(blocks):
        alone = CachedModel(model, 1, layers=[1, 2])
        expected = alone.forward([block], 3)
        num = expected.logits_BTV.shape[1]
        torch.testing.assert_close(first.logits_BTV[row, -num:], expected.logits_BTV[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first.hidden_BTF[row, -len(block) :], expected.hidden_BTF[0], atol=1e-4, rtol=1e-4)
        alone.keep([max(len(block) - 2, 1)])
        expected = alone.forward([more[row]], 1)
        torch.testing.assert_close(then.logits_BTV[row], expected.logits_BTV[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_draft_head_reads_states_in_the_same_groups(monkeypatch):
    monkeypatch.setattr(ragged, "FORWARD_TOKENS", 8)
    lengths = (50, 3, 40, 1, 5, 20)
    head, blocks = build_draft_head(build_model()), tokens(lengths)
    states = torch.randn(len(blocks), max(lengths), head.width, generator=torch.Generator().manual_seed(0))
    cached = CachedModel(head, len(blocks))
    found = cached.forward(blocks, 1, states_BTF=states)
    assert cached.usage.num_forwards == len(divide(lengths)) > 1
    more = torch.randn(len(blocks), 1, head.width, generator=torch.Generator().manual_seed(1))
    then = cached.forward([[11]] * len(blocks), 1, states_BTF=more)
    for row, block in enumerate(blocks):
        alone = CachedModel(head, 1)
        for output, each, given in ((found, block, states[row, -len(block) :]), (then, [11], more[row])):
            expected = alone.forward([each], 1, states_BTF=given[None])
            torch.testing.assert_close(output.logits_BTV[row], expected.logits_BTV[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(
                output.hidden_BTF[row, -len(each) :], expected.hidden_BTF[0], atol=1e-4, rtol=1e-4
            )


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "lengths"), [("sliding", LENGTHS), ("alternating", LENGTHS), ("llama", (60, 50, 55))]
)
def test_other_states_and_even_rows_are_read_at_once(kind, lengths):
    cached = CachedModel(build_model(kind), len(lengths))
    cached.forward(tokens(lengths), 1)
    assert cached.usage.num_forwards == 1


def test_uneven_prompts_are_answered_as_each_alone(tokenizer):
    model = build_model()
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    prompts = tokens((110, 4, 90, 6))
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    arguments = {"max_new_tokens": 8, "do_sample": False, "safespec": True, "assistant_model": perturb(model)}
    arguments |= {"return_dict_in_generate": True}
    with cheap_drafts():
        together = model.generate(padded, attention_mask=(padded > 0).long(), **arguments)
        for row, prompt in enumerate(prompts):
            alone = model.generate(torch.tensor([prompt]), **arguments)
            assert torch.equal(together.sequences[row, width:], alone.sequences[0, len(prompt) :])
            torch.testing.assert_close(
                together.risks[row].nan_to_num(), alone.risks[0].nan_to_num(), atol=1e-4, rtol=1e-4
            )
