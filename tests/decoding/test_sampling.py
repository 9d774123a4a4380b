"""The segments that Safety Mode samples: independent, as long as they may be, and by their probabilities."""

import pytest
import torch
from scipy.stats import chisquare
from scripted import ScriptedModel, count_after, count_up
from tiny import make_row
from transformers import ForcedEOSTokenLogitsProcessor, LogitsProcessor, LogitsProcessorList

from safespec_hf import SafeSpecConfig, SafeSpecLogitsProcessor
from safespec_hf.decoding.sampling import draw, sample_segments
from safespec_hf.engine.cache import CachedModel


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


class Grammar(LogitsProcessor):
    """Knows nothing of a text that goes on after its end, 14."""

    def __call__(self, input_ids, scores):
        assert 14 not in input_ids[:, :-1]
        assert not input_ids[:, -1].eq(14).any()
        return scores


def test_processors_are_not_asked_how_an_ended_segment_goes_on():
    row = make_row([9, 10], LogitsProcessorList([Grammar()]), policy=SafeSpecConfig(min_segment_tokens=1))
    model = ScriptedModel(count_after({10: {13: 0.5, 20: 0.5}}))
    segments = sample(model, 16, row=row, end_ids=frozenset({14}))
    assert {tuple(segment) for segment in segments} == {(13, 14), tuple(range(20, 26))}


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


@pytest.mark.parametrize("temperature", [0.01, 1e-38, 1e-300])
def test_a_low_temperature_takes_the_likeliest(temperature):
    model = ScriptedModel(count_after({10: {20: 0.6, 30: 0.4}}))
    row = make_row([9, 10], policy=SafeSpecConfig(recovery_temperature=temperature))
    assert {segment[0] for segment in sample(model, 32, row=row)} == {20}


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([20]), -torch.inf)


def test_the_callers_processors_hold_for_candidates():
    model = ScriptedModel(count_after({10: {20: 0.9, 30: 0.1}}))
    row = make_row([9, 10], processors=LogitsProcessorList([Ban()]))
    assert {segment[0] for segment in sample(model, 32, row=row)} == {30}


class Spoil(LogitsProcessor):
    """Makes all scores after some token a value that no sample can be drawn from."""

    def __init__(self, token, value):
        self.token, self.value = token, value

    def __call__(self, input_ids, scores):
        return torch.where((input_ids[:, -1:] == self.token), self.value, scores)


@pytest.mark.parametrize("value", [float("nan"), -torch.inf, torch.inf])
@pytest.mark.parametrize("min_segment_tokens", [1, 4])
def test_a_segment_without_a_possible_token_has_failed_and_is_empty(value, min_segment_tokens):
    policy = SafeSpecConfig(min_segment_tokens=min_segment_tokens)
    row = make_row([9, 10], processors=LogitsProcessorList([Spoil(21, value)]), policy=policy)
    model = ScriptedModel(count_after({10: {20: 0.5, 30: 0.5}}))
    assert {tuple(segment) for segment in sample(model, 32, row=row, end_ids=frozenset({39}))} == {
        (),
        tuple(range(30, 36)),
    }


@pytest.mark.parametrize("probs", [[float("nan")] * 3, [0.0] * 3, [0.0, float("nan"), 1.0]])
def test_a_drawn_token_is_always_one_of_the_vocabulary(probs):
    assert 0 <= draw(torch.tensor([probs])).item() < 3
