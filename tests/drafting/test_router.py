"""Whose drafts a row gets: the lookup's or the model's; and what comes of drafts that fall short of the target."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from tiny import build_draft_head, build_head, build_model, build_noisy_head, build_tokenizer, cheap_drafts, make_row

from safespec_hf import Provenance, SafeSpecConfig, attach_safety_head
from safespec_hf.decoding import safety_mode
from safespec_hf.decoding.sampling import sample_segments
from safespec_hf.drafting.draft_length import DraftCosts
from safespec_hf.drafting.drafters import Proposal, fill_gaps
from safespec_hf.drafting.router import DraftRouter


@torch.no_grad()
def test_a_longer_match_is_preferred_to_a_draft_model_that_is_never_right(target):
    router = DraftRouter(target, max_matching_ngram_size=3, costs=DraftCosts(draft=0.3))
    row = make_row([11, 12, 13, 14, 15, 11, 12, 13])
    for _ in range(30):
        router.model.length.record([5], [])
    assert router.draft([row], [2]).drafts == [[14, 15]]
    assert router.num_forwards == 0


def test_what_a_model_leaves_open_is_looked_up():
    made = Proposal([[7, 8], [], []], kinds=[[9, 9], [], []], parents=[[-1, -1], [], []])
    found = Proposal([[1], [2, 3, 4], []], kinds=[[10], [11, 12, 13], []])
    proposal = fill_gaps(made, found)
    assert proposal.drafts == [[7, 8], [2, 3, 4], []]
    assert proposal.kinds == [[9, 9], [11, 12, 13], []]
    assert proposal.parents == [[-1, -1], [-1, 0, 1], []]


def test_a_token_that_was_looked_up_beside_sampled_ones_is_certain():
    probs = torch.full((2, 1, 5), 0.2) * torch.tensor([[[1.0]], [[0.0]]])
    proposal = fill_gaps(Proposal([[3], []], probs), Proposal([[], [2, 4]]))
    assert proposal.probs_BGV[0].tolist() == [[0.0] * 5, pytest.approx([0.2] * 5)]
    assert proposal.probs_BGV[1].argmax(-1).tolist() == [2, 4]


@torch.no_grad()
def test_what_was_looked_up_grows_in_the_tree_of_a_draft_head(target):
    router = DraftRouter(
        build_draft_head(target).bind(target),
        max_matching_ngram_size=3,
        costs=DraftCosts(draft=0.01),
        takes_trees=True,
    )
    row = make_row([11, 12, 13, 14, 15, 11, 12])
    row.append(13, Provenance.TARGET)
    router.observe(0, 0, torch.zeros(7, router.model.head.config.num_features))
    for _ in range(4):  # it is less sure of itself than it was
        router.lookup.length.record([12], [])
    proposal = router.draft([row], [3])
    tokens, kinds = proposal.drafts[0], proposal.kinds[0]
    assert any(10 <= kind < 18 for kind in kinds)
    assert any(kind < 10 for kind in kinds)
    assert {14, 15} <= set(tokens)
    router.record([[0]])
    assert router._pace.token_cost < 1


@torch.no_grad()
def test_without_any_drafter_nothing_is_drafted_and_no_round_counts_as_plain():
    router = DraftRouter()
    assert router.draft([make_row([11])], [3]).drafts == [[]]
    assert (router.num_forwards, router.num_plain_rounds, router.layers, router.models) == (0, 0, [], [])


# Guarded answers with a draft that falls short of its target.

PROMPTS = torch.tensor([[0] * 12 + [11, 17], [0, 0, *range(12, 24)], list(range(20, 34))])
MASK = (PROMPTS != 0).long()
FIELDS = {"reflection": "pause think", "refusal": "no thanks", "max_segment_tokens": 6, "min_segment_tokens": 2}
POLICY = SafeSpecConfig(**FIELDS, num_candidates=3, num_draft_tokens=5, lookup_drafts=False, adaptive_drafts=False)
SHORT = {
    "gpt2": lambda: build_model("gpt2", n_positions=32),
    "few": lambda: build_model("gpt2", n_positions=4),
    "llama": lambda: build_model(max_position_embeddings=32),
    "vocabulary": lambda: build_model(vocab_size=36),
    "training": lambda: build_model("gpt2", resid_pdrop=0.5).train(),
    "bfloat16": lambda: build_model().to(torch.bfloat16),
    "nan": lambda: build_model().to(torch.float16).apply(lambda module: module.register_forward_hook(overflow)),
}


def overflow(module, args, output):
    return output * torch.nan if isinstance(module, torch.nn.Linear) else output


def answer(target, head, draft, policy, rows=slice(None), **arguments):
    arguments = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, **arguments}
    model = attach_safety_head(target, head, tokenizer=build_tokenizer(36))  # what is above counts as padding
    prompts = {"inputs": PROMPTS[rows], "attention_mask": MASK[rows]}
    with cheap_drafts():
        return model.generate(**prompts, assistant_model=draft, safespec=policy, **arguments)


@pytest.mark.parametrize("policy", [POLICY, SafeSpecConfig(**FIELDS, num_candidates=3)], ids=["constant", "adaptive"])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 3)], ids=["batch", "one"])
@pytest.mark.parametrize("kind", SHORT)
def test_greedy_text_is_the_targets_whatever_the_draft_lacks(target, kind, rows, policy):
    arguments = {"max_new_tokens": 30, "do_sample": False}
    expected = target.generate(PROMPTS[rows], attention_mask=MASK[rows], **arguments)
    output = answer(target, build_head(target), SHORT[kind](), policy, rows)
    assert torch.equal(output.sequences, expected)
    assert output.statistics.num_draft_forwards > 0 or kind == "few"


@pytest.mark.parametrize("kind", SHORT)
def test_answers_are_sampled_whatever_the_draft_lacks(target, kind):
    output = answer(target, build_head(target), SHORT[kind](), POLICY, do_sample=True)
    assert output.finish_reasons == ["length"] * 3


@pytest.mark.parametrize("kind", sorted(SHORT.keys() - {"nan"}))
def test_recoveries_get_by_with_any_draft(target, kind):
    policy = replace(POLICY, candidate_source="draft")
    output = answer(target, build_noisy_head(target), SHORT[kind](), policy)
    assert set(output.finish_reasons) <= {"length", "safety_refusal"}
    assert sum(map(len, output.events)) > 0


def test_a_head_with_a_short_table_drafts_up_to_its_end(target):
    head = build_draft_head(target)  # of 64 positions
    arguments = {"max_new_tokens": 80, "do_sample": False}
    expected = target.generate(PROMPTS, attention_mask=MASK, **arguments)
    output = answer(target, build_head(target), head, POLICY, max_new_tokens=80)
    assert torch.equal(output.sequences, expected)


def test_the_target_samples_where_the_draft_has_no_positions_left(target):
    draft, sources = build_model(max_position_embeddings=24), []

    def record(sampler, *args, **kwargs):
        sources.append(sampler.model is draft)
        return sample_segments(sampler, *args, **kwargs)

    with patch.object(safety_mode, "sample_segments", record):
        answer(target, build_noisy_head(target, quantile=0.9), draft, POLICY)
    assert True in sources
    assert False in sources


def test_a_draft_is_left_in_the_mode_that_it_was_in(target):
    draft = build_model("gpt2").train()
    draft.transformer.h[1].eval()
    before = [module.training for module in draft.modules()]
    answer(target, build_head(target), draft, POLICY)
    assert [module.training for module in draft.modules()] == before
