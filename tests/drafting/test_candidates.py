"""Transformers' own contract for drafts, and the segments that Safety Mode samples."""

import random
from unittest.mock import patch

import pytest
import torch
from scipy.stats import chisquare
from scripted import ScriptedModel, count_after
from tiny import VOCAB_SIZE, build_draft_head, build_model, perturb

from safespec_hf import (
    SafeSpecCandidateGenerator,
    UnsupportedRequestError,
)
from safespec_hf.drafting.draft_length import DraftCosts
from safespec_hf.engine.cache import CachedModel


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


@torch.no_grad()
def test_several_prompts_in_a_row_are_drafted_as_each_alone(target):
    generator = SafeSpecCandidateGenerator(target, max_matching_ngram_size=2, num_draft_tokens=4)
    for prompt in ([11, 12, 13, 14], [11, 12], [20], [11, 12, 20, 21, 11, 12], [11, 12]):
        fresh = SafeSpecCandidateGenerator(target, max_matching_ngram_size=2, num_draft_tokens=4)
        ids = torch.tensor([prompt])
        assert torch.equal(generator.get_candidates(ids)[0], fresh.get_candidates(ids, model_outputs=None)[0])


@torch.no_grad()
def test_rows_get_as_many_candidates_as_the_shortest_draft_with_their_own_probabilities():
    ids = torch.tensor([[11] * 27, [12] * 27])
    model = build_model(max_position_embeddings=32)
    generator = SafeSpecCandidateGenerator(model, num_rows=2, num_draft_tokens=8, do_sample=True)
    candidates, log_probs = generator.get_candidates(ids)
    assert candidates.shape == (2, 27 + 6)
    scores = model(candidates[:, :-1]).logits[:, 26:].log_softmax(-1)
    torch.testing.assert_close(log_probs, scores, atol=1e-4, rtol=1e-4)  # the same sums in other blocks


@torch.no_grad()
def test_no_drafts_have_no_probabilities():
    full = build_model(max_position_embeddings=4)
    generator = SafeSpecCandidateGenerator(full, do_sample=True)
    candidates, log_probs = generator.get_candidates(torch.tensor([[11] * 9]))
    assert (candidates.shape, log_probs) == ((1, 9), None)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "costs", [None, DraftCosts(draft=0.01, verify=0.002), DraftCosts(draft=0.9, verify=0.5)], ids=str
)
def test_transformers_own_loop_runs_with_every_length_of_drafts_past_the_drafts_end(monkeypatch, costs, do_sample):
    target, draft = build_model(), build_model(max_position_embeddings=24, vocab_size=36)
    use_own_generator(target, monkeypatch, assistant_model=draft, vocab_size=VOCAB_SIZE, costs=costs, takes_trees=True)
    arguments = {"max_new_tokens": 40, "do_sample": do_sample}
    answer = target.generate(torch.tensor([[11, 12, 13]]), prompt_lookup_num_tokens=5, **arguments)
    assert answer.shape == (1, 43)
    monkeypatch.undo()
    assert do_sample or torch.equal(answer, target.generate(torch.tensor([[11, 12, 13]]), **arguments))


def test_a_draft_model_left_in_training_mode_drafts_without_dropout_and_stays_in_it():
    draft = build_model("gpt2", resid_pdrop=0.9, embd_pdrop=0.9)
    expected = SafeSpecCandidateGenerator(draft).get_candidates(torch.tensor([[11, 12]]))[0]
    draft.train()
    draft.transformer.h[0].eval()
    for _ in range(3):
        assert torch.equal(SafeSpecCandidateGenerator(draft).get_candidates(torch.tensor([[11, 12]]))[0], expected)
    assert draft.training
    assert draft.transformer.drop.training
    assert not draft.transformer.h[0].training


@pytest.mark.parametrize("failing", [[11, 12, 30, 31], [20], [11, 12, 13, 40 - 1]])
def test_a_call_that_was_broken_off_leaves_no_trace(target, failing):
    generator, fresh = (SafeSpecCandidateGenerator(target, max_matching_ngram_size=2) for _ in range(2))
    generator.get_candidates(torch.tensor([[11, 12, 13]]))
    with patch.object(CachedModel, "forward", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        generator.get_candidates(torch.tensor([failing]))
    ids = torch.tensor([[11, 12, 13, 14, 11, 12]])
    assert torch.equal(generator.get_candidates(ids)[0], fresh.get_candidates(ids)[0])


def test_another_number_of_rows_is_refused(target):
    with pytest.raises(UnsupportedRequestError, match="must have 1 rows, but it has 2"):
        SafeSpecCandidateGenerator(target).get_candidates(torch.tensor([[11], [12]]))


def test_a_draft_head_is_refused(target):
    with pytest.raises(UnsupportedRequestError, match="reads hidden states of the target"):
        SafeSpecCandidateGenerator(build_draft_head(target))
