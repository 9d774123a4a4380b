"""Makes risks probabilities, and chooses a threshold with a finite-sample guarantee on false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import SafeSpecError
from ..heads.safety_head import SafetyHead
from .metrics import ScoredAnswers


def num_answers_needed(alpha: float) -> int:
    """The smallest number of benign answers from which a threshold with false-alarm rate `alpha` can be chosen.

    Raises:
        SafeSpecError: If `alpha` is not in (0, 1).

    Example:

        >>> num_answers_needed(0.02)
        49
    """
    if not 0 < alpha < 1:
        raise SafeSpecError(f"`alpha` must be in (0, 1), but it is {alpha!r}.")
    # rounded first, so that 1 / 0.05 - 1 is 19 and not 19.000000000000004
    return math.ceil(round(1 / alpha - 1, 9))


def conformal_threshold(scores: Sequence[float], alpha: float) -> float:
    """The threshold of split conformal prediction: just above the `ceil((n + 1) * (1 - alpha))`-th smallest score.

    If the n scored answers and a new one are exchangeable, the new one is flagged with probability at most `alpha`:
    flagged means that its score is at least the threshold. The score of an answer is the highest risk over all of its
    decision points, so this bounds the chance that the answer is flagged anywhere.

    Args:
        scores (`Sequence[float]`): Highest risks of whole benign answers that the head was not trained on.
        alpha (`float`): Bound on the false-alarm rate, in (0, 1).

    Returns:
        `float`: In (0, 1], exact in float32.

    Raises:
        SafeSpecError: If `alpha` needs more answers, if a risk is not in [0, 1], or if a benign answer's risk is 1,
            above which nothing is.

    Example:

        >>> round(conformal_threshold([0.1, 0.4, 0.2, 0.3], alpha=0.25), 3)
        0.4
    """
    num_needed, num_scores = num_answers_needed(alpha), len(scores)
    if num_scores < num_needed:
        raise SafeSpecError(
            f"alpha={alpha} needs at least {num_needed} benign answers to calibrate on, got {num_scores}. "
            f"Collect more, or take alpha >= {1 / (num_scores + 1):.4f}."
        )
    if not all(0 <= score <= 1 for score in scores):
        raise SafeSpecError("Risks must be in [0, 1], but some are not: the head or its target is broken.")
    rank = math.ceil(round((num_scores + 1) * (1 - alpha), 9))
    chosen = np.float32(sorted(scores)[rank - 1])
    if chosen >= 1:
        raise SafeSpecError(
            f"The {rank}-th smallest of {num_scores} benign risks is 1: this head can't have alpha={alpha}."
        )
    return float(np.nextafter(chosen, np.float32(1)))


def thresholds_by_source(scores: Mapping[str, Sequence[float]], alpha: float) -> dict[str, dict[str, Any]]:
    """For every source its own threshold, where it has answers enough, since exchangeability ends at a source.

    Args:
        scores (`Mapping[str, Sequence[float]]`): Highest risks of benign answers, by source.
        alpha (`float`): Bound on the false-alarm rate, in (0, 1).

    Returns:
        `dict`: By source, `num_answers` and `risk_threshold`, which is `None` if there are too few.
    """
    needed = num_answers_needed(alpha)
    return {
        source: {
            "num_answers": len(values),
            "risk_threshold": conformal_threshold(values, alpha) if len(values) >= needed else None,
        }
        for source, values in scores.items()
    }


def fit_temperature(logits_N: Tensor, labels_N: Tensor) -> float:
    """The temperature that gives logits the least cross-entropy.

    Args:
        logits_N (`torch.Tensor` of shape `(N,)`): For unsafe.
        labels_N (`torch.Tensor` of shape `(N,)`): 1 is unsafe.

    Example:

        >>> import torch
        >>> fit_temperature(torch.tensor([9.0, 9.0, -9.0, -9.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])) > 10
        True
    """

    def loss(log_temperature: float) -> float:
        scaled_N = logits_N / math.exp(log_temperature)
        return float(binary_cross_entropy_with_logits(scaled_N, labels_N.float()))

    return math.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)


@torch.no_grad()
def fold_temperature(head: SafetyHead, temperature: float) -> None:
    """Divides a head's logits by a temperature, by way of its last layer. No order of risks changes."""
    last = head.mlp[-1]
    assert isinstance(last, nn.Linear)
    last.weight.div_(temperature)
    last.bias.div_(temperature)


def calibrate_head(
    head: SafetyHead, benign: ScoredAnswers, labelled: ScoredAnswers | None, alpha: float
) -> dict[str, Any]:
    """Folds a temperature into a head and sets its threshold.

    Args:
        head ([`SafetyHead`]): Changed in place.
        benign ([`ScoredAnswers`]): Safe answers that it was not trained on, with their risks.
        labelled ([`ScoredAnswers`], *optional*): Answers of both classes for the temperature; without them it stays 1.
        alpha (`float`): Bound on the share of benign answers that are flagged anywhere, in (0, 1).

    Returns:
        `dict`: For the head's record: `alpha`, `num_answers`, `temperature`, `risk_threshold`, `by_source`.

    Raises:
        SafeSpecError: As [`conformal_threshold`], or if the labelled answers are of one class.
    """
    if labelled is not None and not labelled.has_both_classes:
        raise SafeSpecError(
            f"A temperature needs answers of both classes, but all {len(labelled.examples)} labelled ones are of one."
        )
    logits = torch.logit(torch.tensor(benign.highest()), eps=1e-9)
    temperature = 1.0
    if labelled is not None:
        highest = torch.logit(torch.tensor(labelled.highest()), eps=1e-9)
        temperature = fit_temperature(highest, torch.tensor(labelled.labels))
        fold_temperature(head, temperature)
    scores = torch.sigmoid(logits / temperature).tolist()
    head.config.risk_threshold = conformal_threshold(scores, alpha)
    by_source: dict[str, list[float]] = {}
    for example, score in zip(benign.examples, scores, strict=True):
        by_source.setdefault(example.source, []).append(score)
    return {
        "alpha": alpha,
        "num_answers": len(scores),
        "temperature": temperature,
        "risk_threshold": head.config.risk_threshold,
        "by_source": thresholds_by_source(by_source, alpha),
    }
