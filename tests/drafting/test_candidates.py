"""Drafts by model and by lookup, transformers' own contract for them, and the segments that Safety Mode samples."""

import random

import pytest
import torch
from scipy.stats import chisquare
from scripted import ScriptedModel, count_after, count_up
from tiny import VOCAB_SIZE, build_model, make_row, perturb
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from safespec_hf import Provenance, SafeSpecCandidateGenerator
from safespec_hf.drafting.lookup import NgramIndex


def reference_lookup(context, max_size, num_tokens):
    """The longest n-gram that the context ends with and that was there before; of those the last one."""
    for size in range(min(max_size, len(context) - 1), 0, -1):
        for end in range(len(context) - 1, size - 1, -1):
            if context[end - size : end] == context[-size:]:
                return context[end : end + num_tokens]
    return []


@pytest.mark.parametrize("max_size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_a_lookup_in_a_growing_context_equals_a_search_of_all_of_it(max_size, seed):
    choose = random.Random(seed)
    prompt, tokens, index = [choose.randrange(4) for _ in range(choose.randint(1, 9))], [], NgramIndex(max_size)
    for _ in range(30):
        num = choose.randint(0, 4)
        assert index.continuation(prompt, tokens, num)[0] == reference_lookup(prompt + tokens, max_size, num)
        tokens = tokens + [choose.randrange(4) for _ in range(choose.randint(1, 3))]


@pytest.mark.parametrize("seed", range(20))
def test_after_rollbacks_a_lookup_still_tells_what_really_followed(seed):
    choose = random.Random(seed)
    prompt, tokens, index, num_found = [1, 2, 3], [], NgramIndex(2), 0
    for _ in range(40):
        tokens = tokens[: choose.randint(max(0, len(tokens) - 6), len(tokens))]
        index.keep(len(prompt) + len(tokens))
        tokens = tokens + [choose.randrange(4) for _ in range(choose.randint(1, 8))]
        found, _ = index.continuation(prompt, tokens, 3)
        assert found == reference_lookup(prompt + tokens, 2, 3)
        num_found += bool(found)
    assert num_found > 5


def test_tokens_that_replaced_rolled_back_ones_are_found():
    index, prompt = NgramIndex(1), [9]
    index.continuation(prompt, [1, 2, 3, 4, 5, 6], 1)  # all but the last are indexed
    # four of them are rolled back, and five others come in their place before the next lookup
    index.keep(3)
    assert index.continuation(prompt, [1, 2, 30, 31, 32, 33, 30], 2) == ([31, 32], 1)


def test_a_rolled_back_occurrence_does_not_hide_an_earlier_one():
    index, prompt = NgramIndex(1), [1, 2, 3]
    index.continuation(prompt, [1, 8, 9], 1)  # the last 1 is now at the fourth place
    index.keep(3)
    assert index.continuation(prompt, [7, 1], 2) == ([2, 3], 1)


@pytest.mark.parametrize("prompt", [[5], [5, 6], [5, 6, 7]])
def test_without_a_repetition_nothing_is_found(prompt):
    assert NgramIndex(2).continuation(prompt, [], 4) == ([], 0)


@torch.no_grad()
def test_a_model_drafts_its_own_greedy_text(target):
    generator = SafeSpecCandidateGenerator(target, num_draft_tokens=6)
    expected = target.generate(torch.tensor([[11, 12, 13]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert generator.draft([make_row([11, 12, 13])], [6]).drafts == [expected]


@torch.no_grad()
def test_ragged_rows_are_drafted_as_each_row_alone(target):
    prompts, nums = [[11, 12, 13, 14], [15], [16, 17]], [4, 2, 0]
    rows = [make_row(prompt, index) for index, prompt in enumerate(prompts)]
    together = SafeSpecCandidateGenerator(target, num_rows=3).draft(rows, nums).drafts
    alone = [
        SafeSpecCandidateGenerator(target).draft([make_row(p)], [num]).drafts[0]
        for p, num in zip(prompts, nums, strict=True)
    ]
    assert together == alone


@torch.no_grad()
def test_drafting_goes_on_right_after_a_rollback(target):
    generator, row = SafeSpecCandidateGenerator(target), make_row([11, 12, 13])
    generator.draft([row], [5])
    for token in (20, 21, 22):
        row.append(token, Provenance.TARGET)
    generator.keep([3])
    fresh = SafeSpecCandidateGenerator(target).draft([make_row([11, 12, 13, 20, 21, 22])], [5])
    assert generator.draft([row], [5]).drafts == fresh.drafts


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 2])
def test_sampled_drafts_come_with_the_distribution_they_were_drawn_from(num_rows):
    model = ScriptedModel(count_after({11: {20: 0.7, 21: 0.2, 22: 0.1}}))
    counts, generator = torch.zeros(VOCAB_SIZE), None
    for _ in range(300):
        generator = SafeSpecCandidateGenerator(model, num_rows=num_rows, do_sample=True)
        proposal = generator.draft([make_row([10, 11], index) for index in range(num_rows)], [1] * num_rows)
        counts += torch.tensor([draft[0] for draft in proposal.drafts]).bincount(minlength=VOCAB_SIZE)
    # the chances are logits that are written down; what else has a logit of -30 weighs 1e-13 each
    torch.testing.assert_close(proposal.probs_BGV[0, 0, 20:23], torch.tensor([0.7, 0.2, 0.1]), atol=1e-6, rtol=0.0)
    share = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    assert chisquare(counts[20:23].double(), share * 300 * num_rows).pvalue > 1e-4


@torch.no_grad()
def test_distributions_of_ragged_drafts_are_aligned_to_the_right():
    generator = SafeSpecCandidateGenerator(ScriptedModel(count_up), num_rows=2, do_sample=True)
    proposal = generator.draft([make_row([10], 0), make_row([20], 1)], [3, 1])
    assert proposal.drafts == [[11, 12, 13], [21]]
    assert proposal.probs_BGV.argmax(-1).tolist() == [[11, 12, 13], [0, 0, 21]]
    assert proposal.probs_BGV[1, :2].sum() == 0


@torch.no_grad()
def test_processors_apply_to_drafts_position_by_position(target):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)])
    plain = target.generate(torch.tensor([[11, 12]]), max_new_tokens=8, do_sample=False, repetition_penalty=1.8)
    drafts = SafeSpecCandidateGenerator(target).draft([make_row([11, 12], processors=processors)], [8]).drafts
    assert drafts == [plain[0, 2:].tolist()]


@pytest.mark.parametrize("draft_size", [36, 48])
@pytest.mark.parametrize("do_sample", [False, True])
@torch.no_grad()
def test_a_padded_vocabulary_is_fitted_to_the_targets(draft_size, do_sample):
    model = build_model(vocab_size=draft_size)
    generator = SafeSpecCandidateGenerator(model, vocab_size=VOCAB_SIZE, num_draft_tokens=8, do_sample=do_sample)
    proposal = generator.draft([make_row([11, 12])], [8])
    assert max(proposal.drafts[0]) < min(draft_size, VOCAB_SIZE)
    assert proposal.probs_BGV is None or proposal.probs_BGV.shape[-1] == VOCAB_SIZE


def use_own_generator(model, monkeypatch, **kwargs):
    """transformers' assisted decoding, with our drafts in the place of its own."""

    def make(generation_config, logits_processor, **_):
        return SafeSpecCandidateGenerator(
            logits_processor=logits_processor, do_sample=generation_config.do_sample, **kwargs
        )

    monkeypatch.setattr(model, "_get_candidate_generator", make)


@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"eos_token_id": 23}]
)
@pytest.mark.parametrize("source", ["model", "lookup", "none"])
def test_transformers_own_loop_gives_plain_greedy_text_with_these_drafts(target, monkeypatch, source, settings):
    arguments = {"max_new_tokens": 24, "do_sample": False, **settings}
    expected = target.generate(torch.tensor([[11, 12, 13]]), **arguments)
    kwargs = {"model": {"assistant_model": perturb(target)}, "lookup": {"max_matching_ngram_size": 2}, "none": {}}
    use_own_generator(target, monkeypatch, **kwargs[source])
    assert torch.equal(
        target.generate(torch.tensor([[11, 12, 13]]), prompt_lookup_num_tokens=5, **arguments), expected
    )


def test_transformers_own_loop_samples_from_the_target_with_these_drafts(monkeypatch):
    target = ScriptedModel(count_after({10: {20: 0.6, 30: 0.4}}))
    draft = ScriptedModel(count_after({10: {20: 0.2, 30: 0.8}}))
    use_own_generator(target, monkeypatch, assistant_model=draft, num_draft_tokens=1)
    counts = torch.zeros(2, dtype=torch.float64)
    for _ in range(400):
        answer = target.generate(
            torch.tensor([[9, 10]]), max_new_tokens=2, do_sample=True, top_k=0, prompt_lookup_num_tokens=1
        )
        counts[int(answer[0, 2]) // 10 - 2] += 1
    assert chisquare(counts, torch.tensor([0.6, 0.4], dtype=torch.float64) * 400).pvalue > 1e-4
    assert chisquare(counts, torch.tensor([0.2, 0.8], dtype=torch.float64) * 400).pvalue < 1e-4


@torch.no_grad()
def test_get_candidates_appends_as_many_drafts_as_it_is_told(target):
    generator = SafeSpecCandidateGenerator(target, num_draft_tokens=3)
    candidates, logits = generator.get_candidates(torch.tensor([[11, 12]]))
    assert candidates.shape == (1, 5)
    assert candidates[0, :2].tolist() == [11, 12]
    assert logits is None


@torch.no_grad()
def test_get_candidates_follows_any_history_of_the_tokens(target):
    generator, choose = SafeSpecCandidateGenerator(target, num_draft_tokens=4), random.Random(1)
    ids = [11, 12, 13]
    for _ in range(20):
        fresh = SafeSpecCandidateGenerator(target, num_draft_tokens=4).get_candidates(torch.tensor([ids]))[0]
        candidates = generator.get_candidates(torch.tensor([ids]))[0]
        assert torch.equal(candidates, fresh)
        # some of the drafts, and then a token of its own; now and then the text is rolled back as well
        kept = min(len(ids) + choose.randint(0, 4), choose.randint(3, 40))
        ids = [*candidates[0, :kept].tolist(), choose.randrange(40)]
