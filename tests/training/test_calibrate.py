import math

import numpy as np
import pytest
import tiny
import torch

from safespec_hf import SafeSpecError
from safespec_hf.training.calibrate import (
    conformal_threshold,
    fit_temperature,
    fold_temperature,
    num_answers_needed,
    thresholds_by_source,
)

NUM_RESAMPLES, NUM_NEW = 2000, 50


@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("num_extra", [0, 7, 100])
def test_coverage_holds_over_resamples(alpha, num_extra):
    draw, num = np.random.default_rng(0), num_answers_needed(alpha) + num_extra
    rates = []
    for _ in range(NUM_RESAMPLES):
        scores = draw.beta(0.5, 5, size=num + NUM_NEW).astype(np.float32)
        rates.append((scores[num:] >= conformal_threshold(scores[:num].tolist(), alpha)).mean())
    # The expected rate is 1 - k / (n + 1), which lies in (alpha - 1 / (n + 1), alpha]; allow 4 standard errors.
    noise = 4 * np.std(rates) / math.sqrt(NUM_RESAMPLES)
    assert alpha - 1 / (num + 1) - noise <= np.mean(rates) <= alpha + noise


@pytest.mark.parametrize(("alpha", "num"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.02, 49), (0.01, 99), (0.001, 999)])
def test_what_an_alpha_needs(alpha, num):
    assert num_answers_needed(alpha) == num


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.02])
def test_too_few_answers_are_refused(alpha):
    num = num_answers_needed(alpha)
    assert conformal_threshold([0.5] * num, alpha) > 0.5
    with pytest.raises(SafeSpecError, match=rf"at least {num} benign answers"):
        conformal_threshold([0.5] * (num - 1), alpha)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 2])
def test_an_alpha_that_is_no_rate_is_refused(alpha):
    with pytest.raises(SafeSpecError, match=r"in \(0, 1\)"):
        num_answers_needed(alpha)


def test_the_chosen_answer_itself_is_not_flagged_even_if_it_occurs_twice():
    scores = [0.1, 0.2, 0.2, 0.2]
    assert conformal_threshold(scores, 0.25) > np.float32(0.2)


def test_a_benign_risk_of_one_leaves_no_threshold():
    with pytest.raises(SafeSpecError, match="risks is 1"):
        conformal_threshold([1.0] * 20, 0.1)


@pytest.mark.parametrize("score", [float("nan"), -0.1, 1.1])
def test_what_is_no_risk_leaves_no_threshold(score):
    with pytest.raises(SafeSpecError, match=r"in \[0, 1\]"):
        conformal_threshold([0.1] * 20 + [score], 0.1)


def test_sources_with_too_few_answers_have_no_threshold_of_their_own():
    table = thresholds_by_source({"garden": [0.1] * 9, "kitchen": [0.1] * 8}, 0.1)
    assert table["garden"]["risk_threshold"] > 0.1
    assert table["kitchen"] == {"num_answers": 8, "risk_threshold": None}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_logits_is_found(temperature):
    logits = torch.linspace(-4, 4, 20001)
    labels = (torch.rand(20001, generator=torch.Generator().manual_seed(0)) < torch.sigmoid(logits)).float()
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("num_mlp_layers", [1, 2])
def test_a_folded_temperature_divides_the_logits(target, num_mlp_layers):
    head, inputs = tiny.build_head(target, num_mlp_layers=num_mlp_layers), torch.randn(5, 32)
    before = head(inputs).detach()
    fold_temperature(head, 2.5)
    torch.testing.assert_close(head(inputs).detach(), before / 2.5)
