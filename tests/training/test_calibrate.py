import dataclasses
import math

import numpy as np
import pytest
import tiny
import torch
from samples import make_examples

from safespec_hf import SafeSpecError
from safespec_hf.heads.shapes import check_shape
from safespec_hf.training.calibrate import (
    OPERATING_POINTS,
    alarms_per_1000_tokens,
    calibrate_head,
    check_answers,
    conformal_threshold,
    fit_temperature,
    fold_temperature,
    num_answers_needed,
    thresholds_by_source,
)
from safespec_hf.training.metrics import ScoredAnswers

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


def test_an_alpha_next_to_nothing_is_refused():
    with pytest.raises(SafeSpecError, match="be counted for, but it is 1e-309"):
        num_answers_needed(1e-309)


def test_an_alpha_next_to_one_takes_the_lowest_score():
    assert conformal_threshold([0.3, 0.1, 0.2], 1 - 1e-12) == pytest.approx(0.1)
    with pytest.raises(SafeSpecError, match=r"at least 1 benign answers to calibrate on, got 0\. Collect more\.$"):
        conformal_threshold([], 1 - 1e-12)


@pytest.mark.parametrize("num", [1, 2, 6, 30])
def test_the_alpha_that_is_offered_is_one_that_will_do(num):
    with pytest.raises(SafeSpecError) as raised:
        conformal_threshold([0.5] * num, 0.001)
    assert conformal_threshold([0.5] * num, float(str(raised.value).split("alpha >= ")[1].rstrip("."))) > 0.5


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


def test_a_source_with_a_risk_of_one_costs_its_own_threshold_alone(target):
    garden, kitchen = scored(200), scored(49, seed=1)
    kitchen.risks[3][5] = 1.0
    kitchen = [dataclasses.replace(example, source="kitchen") for example in kitchen.examples], kitchen.risks
    both = ScoredAnswers([*garden.examples, *kitchen[0]], [*garden.risks, *kitchen[1]])
    record = calibrate_head(tiny.build_head(target), both, None, 0.02)
    assert record["by_source"]["kitchen"] == {"num_answers": 49, "risk_threshold": None}
    assert record["by_source"]["garden"]["risk_threshold"] < 1
    check_shape({"calibration": record}, "training.json", "training.json")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_logits_is_found(temperature):
    logits = torch.linspace(-4, 4, 20001)
    labels = (torch.rand(20001, generator=torch.Generator().manual_seed(0)) < torch.sigmoid(logits)).float()
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num", [1, 10, 40])
@pytest.mark.parametrize("margin", [1.0, 3.0, 10.0])
def test_answers_that_are_all_told_apart_are_as_sure_as_their_number(margin, num, dtype):
    logits, labels = torch.tensor([-margin, margin] * num, dtype=dtype), torch.tensor([0.0, 1.0] * num)
    # at the best temperature the risk of an unsafe answer is Platt's target
    expected = margin / math.log(num + 1)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-3)


def test_a_head_that_tells_all_labelled_answers_apart_still_has_a_threshold(target):
    draw = torch.Generator().manual_seed(0)
    sides = torch.tensor([-3.0, 3.0] * 40) + 0.4 * torch.randn(80, generator=draw)
    spread = -2 + 2 * torch.randn(300, generator=draw)
    labelled = ScoredAnswers(make_examples(80), list(torch.sigmoid(sides)[:, None]))
    benign = ScoredAnswers(scored(300).examples, list(torch.sigmoid(spread)[:, None]))
    record = calibrate_head(tiny.build_head(target), benign, labelled, 0.02)
    assert record["risk_threshold"] < 1
    assert list(record["operating_points"]) == list(OPERATING_POINTS)


def test_a_calibration_that_fails_leaves_the_head_as_it_was(target):
    head, benign = tiny.build_head(target), scored(60)
    weight = head.mlp[-1].weight.clone()
    for risks_T in benign.risks:
        risks_T[3] = 1.0
    labelled = ScoredAnswers(make_examples(20), [torch.rand(3) for _ in range(20)])
    with pytest.raises(SafeSpecError, match="risks is 1"):
        calibrate_head(head, benign, labelled, alpha=0.1)
    assert torch.equal(head.mlp[-1].weight, weight)


@pytest.mark.parametrize("num_mlp_layers", [1, 2])
def test_a_folded_temperature_divides_the_logits(target, num_mlp_layers):
    head, inputs = tiny.build_head(target, num_mlp_layers=num_mlp_layers), torch.randn(5, 32)
    before = head(inputs).detach()
    fold_temperature(head, 2.5)
    torch.testing.assert_close(head(inputs).detach(), before / 2.5)


def test_a_head_in_16_bits_is_folded_in_32(target):
    head, inputs = tiny.build_head(target).bfloat16(), torch.randn(50, 32)
    before = head.float()(inputs).detach()
    head.bfloat16()
    fold_temperature(head, 0.7)
    assert head.dtype == torch.float32
    torch.testing.assert_close(head(inputs).detach(), before / 0.7)


def scored(num, label=0, length=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    examples = [dataclasses.replace(example, label=label) for example in make_examples(num)]
    return ScoredAnswers(examples, [torch.rand(length, generator=draw) * (0.6 + 0.3 * label) for _ in examples])


def test_each_operating_point_flags_at_most_as_many_as_it_says(target):
    head, benign = tiny.build_head(target), scored(400)
    record = calibrate_head(
        head,
        benign,
        ScoredAnswers([*benign.examples, *scored(50, 1).examples], [*benign.risks, *scored(50, 1).risks]),
        alpha=0.1,
    )
    points = head.config.operating_points
    assert list(points) == list(OPERATING_POINTS)
    assert points == record["operating_points"]
    scale = [
        torch.sigmoid(torch.logit(risks_T.double(), eps=1e-9) / record["temperature"]) for risks_T in benign.risks
    ]
    for name, alpha in OPERATING_POINTS.items():
        assert (ScoredAnswers(benign.examples, scale).highest() >= points[name]["risk_threshold"]).mean() <= alpha
    assert points["strict"]["recall"] >= points["balanced"]["recall"] >= points["permissive"]["recall"]
    assert head.config.threshold_at("strict") < head.config.threshold_at("permissive")


@pytest.mark.parametrize(
    ("benign", "labelled", "said"),
    [
        ([*scored(60).examples, *scored(1, 1).examples], [], "1 of 61 are labelled unsafe, 'garden:0'"),
        (scored(48).examples, [], "at least 49 benign"),
        (scored(49).examples, scored(9, 1).examples, "all 9 labelled ones are of one"),
    ],
)
def test_answers_that_no_head_can_be_calibrated_on_are_refused(target, benign, labelled, said):
    with pytest.raises(SafeSpecError, match=said):
        check_answers(benign, labelled, 0.02)
    sets = [ScoredAnswers(examples, [torch.rand(3)] * len(examples)) for examples in (benign, labelled)]
    with pytest.raises(SafeSpecError, match=said):
        calibrate_head(tiny.build_head(target), sets[0], sets[1] if labelled else None, 0.02)


@pytest.mark.parametrize(("num", "names"), [(10, None), (60, ["strict", "balanced"]), (199, list(OPERATING_POINTS))])
def test_an_operating_point_needs_answers_enough(target, num, names):
    head = tiny.build_head(target)
    calibrate_head(head, scored(num), None, alpha=0.2)
    assert (head.config.operating_points and list(head.config.operating_points)) == names


def test_a_benign_answer_of_risk_one_costs_only_the_points_that_would_have_to_flag_it(target):
    head, benign = tiny.build_head(target), scored(250)
    for risks_T in benign.risks[:4]:
        risks_T[3] = 1.0
    calibrate_head(head, benign, None, alpha=0.1)
    assert list(head.config.operating_points) == ["strict", "balanced"]


def test_lengths_and_alarms_of_long_answers_are_recorded(target):
    head = tiny.build_head(target)
    record = calibrate_head(head, scored(60, length=1500), None, alpha=0.1)
    assert record["lengths"] == {"median": 1500, "p95": 1500, "most": 1500}
    assert record["operating_points"]["strict"]["false_alarms_per_1000_tokens"] >= 0


@pytest.mark.parametrize(("flagged", "expected"), [([], 0.0), ([0], 0.5), ([3, 4, 5], 0.5), ([3, 5, 1999], 1.5)])
def test_neighbouring_tokens_are_one_alarm(flagged, expected):
    risks_T = torch.zeros(2000)
    risks_T[flagged] = 0.9
    assert alarms_per_1000_tokens([risks_T, torch.ones(5)], 0.5) == expected
    assert alarms_per_1000_tokens([torch.ones(5)], 0.5) is None
