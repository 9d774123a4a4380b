"""Transformers' own contract for drafts, and the segments that Safety Mode samples."""

import random
from unittest.mock import patch

import pytest
import torch
from scipy.stats import chisquare
from scripted import ScriptedModel, count_after, count_up
from tiny import VOCAB_SIZE, build_draft_head, build_model, make_row, perturb
from transformers import (
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)

from safespec_hf import (
    SafeSpecCandidateGenerator,
    SafeSpecConfig,
    SafeSpecLogitsProcessor,
    UnsupportedRequestError,
)
from safespec_hf.drafting.candidates import draw, sample_segments
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


@torch.no_grad()
def sample(model, num, **kwargs):
    row = kwargs.pop("row", None) or make_row([9, 10])
    steer = kwargs.pop("steer", SafeSpecLogitsProcessor(2, []))
    fields = {"num_segments": num, "max_tokens": 6, "end_ids": frozenset(), **kwargs}
    sampler = CachedModel(model, 1)
    return sample_segments(sampler, row, steer=steer, generator=torch.Generator().manual_seed(0), **fields)[0]


def test_tokens_are_drawn_by_their_probabilities():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(probs.expand(20_000, -1), torch.Generator().manual_seed(0))[:, 0]
    counts = drawn.bincount(minlength=6)
    assert counts[probs == 0].sum() == 0
    # of sound draws one in a thousand fails; the seed is fixed
    assert chisquare(counts[probs > 0], probs[probs > 0].double() * 20_000).pvalue > 0.001


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0 - 2**-53])
def test_a_token_without_probability_is_never_drawn(monkeypatch, share):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, share, dtype=torch.double))
    assert draw(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])).item() == (1 if share < 0.5 else 3)


def test_segments_are_sampled_independently_and_end_at_the_limit():
    segments = sample(ScriptedModel(count_after({10: {20: 0.5, 30: 0.5}})), 32)
    assert {tuple(segment) for segment in segments} == {tuple(range(20, 26)), tuple(range(30, 36))}


def test_an_end_token_outside_of_the_vocabulary_is_passed_over():
    assert sample(ScriptedModel(count_up), 2, end_ids=frozenset({10**6})) == [list(range(11, 17))] * 2


def test_a_segment_ends_with_an_end_token():
    assert sample(ScriptedModel(count_up), 2, end_ids=frozenset({14})) == [[11, 12, 13, 14]] * 2


def test_an_end_token_waits_until_the_segment_is_long_enough():
    model = ScriptedModel(count_after({10: {13: 0.99, 20: 0.01}}))
    for num_least, first in ((1, 13), (2, 20)):
        row = make_row([9, 10], policy=SafeSpecConfig(min_segment_tokens=num_least))
        assert {segment[0] for segment in sample(model, 4, row=row, end_ids=frozenset({13}))} == {first}


def test_an_end_that_the_caller_forces_does_not_wait():
    forced = LogitsProcessorList([ForcedEOSTokenLogitsProcessor(3, 13)])
    row = make_row([9, 10], processors=forced)
    assert sample(ScriptedModel(count_up), 2, row=row, end_ids=frozenset({13})) == [[13]] * 2


@pytest.mark.parametrize(("newline", "length"), [(11, 6), (12, 2), (14, 4)])
def test_a_newline_ends_a_segment_of_at_least_two_tokens(newline, length):
    row = make_row([9, 10], newline_ids=frozenset({newline}), policy=SafeSpecConfig(min_segment_tokens=2))
    assert sample(ScriptedModel(count_up), 1, row=row) == [list(range(11, 11 + length))]


def test_segments_that_end_early_do_not_cut_the_others():
    model = ScriptedModel(count_after({10: {20: 0.5, 30: 0.5}}))
    segments = sample(model, 16, end_ids=frozenset({23}))
    assert {tuple(segment) for segment in segments} == {(20, 21, 22, 23), tuple(range(30, 36))}


def test_steering_acts_on_first_tokens_only():
    model = ScriptedModel(count_after({10: {20: 0.5, 30: 0.5}, 21: {20: 0.5, 22: 0.5}}))
    steer = SafeSpecLogitsProcessor(2, [30, 22], penalty=20.0)
    assert {tuple(segment[:3]) for segment in sample(model, 32, steer=steer)} == {(20, 21, 20), (20, 21, 22)}


def test_a_low_temperature_takes_the_likeliest():
    model = ScriptedModel(count_after({10: {20: 0.6, 30: 0.4}}))
    row = make_row([9, 10], policy=SafeSpecConfig(recovery_temperature=0.01))
    assert {segment[0] for segment in sample(model, 32, row=row)} == {20}


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([20]), -torch.inf)


def test_the_callers_processors_hold_for_candidates():
    model = ScriptedModel(count_after({10: {20: 0.9, 30: 0.1}}))
    row = make_row([9, 10], processors=LogitsProcessorList([Ban()]))
    assert {segment[0] for segment in sample(model, 32, row=row)} == {30}
