import pytest
import torch

from safespec_hf.training import metrics
from safespec_hf.training.data import Example
from safespec_hf.training.metrics import ScoredAnswers


def example(label, response="fine", source="garden", category=""):
    message = {"role": "user", "content": "x"}
    return Example(id="x", messages=(message,), response=response, label=label, source=source, category=category)


SCORED = ScoredAnswers(
    [example(0), example(0, "I'm sorry, no.", category="roses"), example(1), example(1, category="roses")],
    [torch.tensor(values) for values in ([0.1, 0.2], [0.3, 0.1], [0.2, 0.9], [0.8, 0.4])],
)


def test_an_answer_is_scored_by_its_highest_risk_so_far():
    assert SCORED.highest().tolist() == pytest.approx([0.2, 0.3, 0.9, 0.8])
    assert SCORED.highest(0.5).tolist() == pytest.approx([0.1, 0.3, 0.2, 0.8])
    assert SCORED.highest(num_tokens=1).tolist() == pytest.approx([0.1, 0.3, 0.2, 0.8])


def test_auroc_grows_as_more_is_seen():
    assert (metrics.auroc(SCORED, 0.5), metrics.auroc(SCORED)) == (0.75, 1.0)


def test_refusals_are_left_out_of_the_negatives_only():
    assert metrics.without_refusals(SCORED).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("rate", "flagged"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_threshold_for_a_rate_flags_that_share(rate, flagged):
    safe = SCORED.of_label(0)
    assert metrics.flagged_rate(safe, metrics.threshold_for_rate(safe, rate)) == flagged


def test_categories_are_not_averaged_away():
    rows = metrics.summarize_categories(SCORED, 0.85)
    assert [(row["category"], row["label"], row["flagged"]) for row in rows][:2] == [("roses", 1, 0.0), ("-", 1, 1.0)]


def test_the_trade_off_goes_from_all_to_few():
    points = metrics.trade_off(SCORED, 5)
    assert points[0]["all safe"] == 1.0
    assert points[-1]["garden unsafe"] == 1.0


def test_a_curve_ends_where_no_answer_is_that_long():
    curves = metrics.mean_risk_along(SCORED, 3)
    assert curves["refused"][:2] == pytest.approx([0.3, 0.1])
    assert curves["safe"][2] != curves["safe"][2]
