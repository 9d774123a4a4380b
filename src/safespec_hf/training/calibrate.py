"""Makes risks probabilities, and chooses a threshold with a finite-sample guarantee on false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import SafeSpecError
from ..heads.safety_head import SafetyHead
from .data import Example
from .metrics import ScoredAnswers

OPERATING_POINTS = {"strict": 0.05, "balanced": 0.02, "permissive": 0.005}
"""Bounds on the share of benign answers that are flagged anywhere, by name."""
LONG_ANSWER = 1000  # tokens, of the answers from which false alarms per 1,000 tokens are counted


def num_answers_needed(alpha: float) -> int:
    """The smallest number of benign answers from which a threshold with false-alarm rate `alpha` can be chosen.

    Raises:
        SafeSpecError: If `alpha` is not in (0, 1), or next to 0.

    Example:

        >>> num_answers_needed(0.02)
        49
    """
    if not 0 < alpha < 1:
        raise SafeSpecError(f"`alpha` must be in (0, 1), but it is {alpha!r}.")
    if math.isinf(1 / alpha):
        raise SafeSpecError(f"`alpha` must be a share that answers can be counted for, but it is {alpha!r}.")
    # rounded first, so that 1 / 0.05 - 1 is 19 and not 19.000000000000004
    return max(1, math.ceil(round(1 / alpha - 1, 9)))


def check_answers(benign: Sequence[Example], labelled: Sequence[Example], alpha: float) -> None:
    """Raises for answers that a head can't be calibrated on, before any model is loaded.

    Args:
        benign (`Sequence[Example]`): Answers to choose the threshold by.
        labelled (`Sequence[Example]`): Answers of both classes for the temperature, or none.
        alpha (`float`): Bound on the false-alarm rate, in (0, 1).

    Raises:
        SafeSpecError: If a benign answer is labelled unsafe, if `alpha` needs more of them, or if the labelled answers
            are of one class.
    """
    if unsafe := [example.id for example in benign if example.label == 1]:
        raise SafeSpecError(
            f"Answers to calibrate on must be benign, but {len(unsafe)} of {len(benign)} are labelled unsafe, "
            f"{unsafe[0]!r} for instance: the threshold would rise above what they score. Leave them out."
        )
    _check_num_answers(len(benign), alpha)
    if len({example.label for example in labelled}) == 1:
        raise SafeSpecError(
            f"A temperature needs answers of both classes, but all {len(labelled)} labelled ones are of one."
        )


def _check_num_answers(num: int, alpha: float) -> None:
    if num < (needed := num_answers_needed(alpha)):
        enough = f", or take alpha >= {math.ceil(1e4 / (num + 1)) / 1e4:g}" if num else ""
        raise SafeSpecError(
            f"alpha={alpha} needs at least {needed} benign answers to calibrate on, got {num}. Collect more{enough}."
        )


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
    num_scores = len(scores)
    _check_num_answers(num_scores, alpha)
    if not all(0 <= score <= 1 for score in scores):
        raise SafeSpecError("Risks must be in [0, 1], but some are not: the head or its target is broken.")
    rank = max(1, math.ceil(round((num_scores + 1) * (1 - alpha), 9)))  # next to 1, what is left of it is rounded off
    chosen = np.float32(sorted(scores)[rank - 1])
    if chosen >= 1:
        raise SafeSpecError(
            f"The {rank}-th smallest of {num_scores} benign risks is 1: this head can't have alpha={alpha}."
        )
    return float(np.nextafter(chosen, np.float32(1)))


def threshold_if_any(scores: Sequence[float], alpha: float) -> float | None:
    """[`conformal_threshold`], or `None` if there are too few answers, or if one that may not be flagged has risk 1.

    Args:
        scores, alpha: As for [`conformal_threshold`], of answers of which the whole has a threshold already.
    """
    with suppress(SafeSpecError):
        return conformal_threshold(scores, alpha)
    return None


def thresholds_by_source(scores: Mapping[str, Sequence[float]], alpha: float) -> dict[str, dict[str, Any]]:
    """For every source its own threshold, where it has answers enough, since exchangeability ends at a source.

    Args:
        scores (`Mapping[str, Sequence[float]]`): Highest risks of benign answers, by source.
        alpha (`float`): Bound on the false-alarm rate, in (0, 1).

    Returns:
        `dict`: By source, `num_answers` and `risk_threshold`, which is `None` as [`threshold_if_any`] says.
    """
    return {
        source: {"num_answers": len(values), "risk_threshold": threshold_if_any(values, alpha)}
        for source, values in scores.items()
    }


def fit_temperature(logits_N: Tensor, labels_N: Tensor) -> float:
    """The temperature that gives logits the least cross-entropy with labels that are not quite sure.

    Of n answers of a class a new one is of it with probability (n + 1) / (n + 2), by [Platt's
    targets](https://www.cs.colorado.edu/~mozer/Teaching/syllabi/6622/papers/Platt1999.pdf). If all answers are told
    apart, sure labels would have the lowest temperature there is, at which risks are 0 and 1 alone.

    Args:
        logits_N (`torch.Tensor` of shape `(N,)`): For unsafe.
        labels_N (`torch.Tensor` of shape `(N,)`): 1 is unsafe.

    Example:

        >>> import torch
        >>> fit_temperature(torch.tensor([9.0, 9.0, -9.0, -9.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])) > 10
        True
    """
    logits_N, is_unsafe_N = logits_N.double(), labels_N == 1
    num_unsafe, num_safe = int(is_unsafe_N.sum()), int((~is_unsafe_N).sum())
    targets_N = torch.where(is_unsafe_N, (num_unsafe + 1) / (num_unsafe + 2), 1 / (num_safe + 2)).double()

    def loss(log_temperature: float) -> float:
        return float(binary_cross_entropy_with_logits(logits_N / math.exp(log_temperature), targets_N))

    return math.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)


@torch.no_grad()
def fold_temperature(head: SafetyHead, temperature: float) -> None:
    """Divides a head's logits by a temperature, by way of its last layer, in float32. No order of risks changes.

    A head in 16 bits is cast: its weights would be rounded, and risks with them, across the threshold.
    """
    last = head.float().mlp[-1]
    assert isinstance(last, nn.Linear)
    last.weight.div_(temperature)
    last.bias.div_(temperature)


def calibrate_head(
    head: SafetyHead, benign: ScoredAnswers, labelled: ScoredAnswers | None, alpha: float
) -> dict[str, Any]:
    """Folds a temperature into a head and sets its threshold.

    Args:
        head ([`SafetyHead`]): Changed in place. It is in float32 afterwards, as it must be where it gives the risks.
        benign ([`ScoredAnswers`]): Safe answers that it was not trained on, with their risks.
        labelled ([`ScoredAnswers`], *optional*): Answers of both classes for the temperature; without them it stays 1.
        alpha (`float`): Bound on the share of benign answers that are flagged anywhere, in (0, 1).

    Returns:
        `dict`: For the head's record: `alpha`, `num_answers`, `temperature`, `risk_threshold`, `by_source`,
        `operating_points` and `lengths`, tokens of the benign answers as they were read.

    Raises:
        SafeSpecError: As [`check_answers`] and [`conformal_threshold`]. The head is then as it was.
    """
    check_answers(benign.examples, labelled.examples if labelled else (), alpha)
    logits = torch.logit(torch.tensor(benign.highest()))  # a risk of 1 stays one: how far above it lies is not known
    temperature = 1.0
    if labelled is not None:
        highest = torch.logit(torch.tensor(labelled.highest()), eps=1e-9)
        temperature = fit_temperature(highest, torch.tensor(labelled.labels))
    scores = torch.sigmoid(logits / temperature).tolist()
    threshold = conformal_threshold(scores, alpha)
    fold_temperature(head, temperature)
    points = find_operating_points(benign, labelled, temperature)
    of_prompts = head.config.prompt_thresholds
    head.config.operating_points = dict(points) or None
    head.config.set_prompt_thresholds(of_prompts)
    head.config.risk_threshold = threshold
    by_source: dict[str, list[float]] = {}
    for example, score in zip(benign.examples, scores, strict=True):
        by_source.setdefault(example.source, []).append(score)
    return {
        "alpha": alpha,
        "num_answers": len(scores),
        "temperature": temperature,
        "risk_threshold": threshold,
        "by_source": thresholds_by_source(by_source, alpha),
        "operating_points": points,
        "lengths": describe_lengths(benign.risks),
    }


def find_operating_points(
    benign: ScoredAnswers, labelled: ScoredAnswers | None, temperature: float = 1.0
) -> dict[str, dict[str, Any]]:
    """The thresholds of [`OPERATING_POINTS`] for which there are answers enough, and what was measured at each.

    Args:
        benign ([`ScoredAnswers`]): Safe answers that the head was not trained on, with its risks before scaling.
        labelled ([`ScoredAnswers`], *optional*): Answers of both classes.
        temperature (`float`, defaults to 1.0): By which logits will be divided.

    Returns:
        `dict`: By name `risk_threshold`, `alpha`, `num_answers`, `false_alarms_per_1000_tokens` on benign answers of
        1,000 tokens and more (`None` without such), and `recall` on labelled unsafe answers (`None` without those).
    """
    scaled = scale_risks(benign, temperature)
    unsafe = None if labelled is None else scale_risks(labelled.of_label(1), temperature)
    points = {}
    for name, alpha in OPERATING_POINTS.items():
        threshold = threshold_if_any(scaled.highest().tolist(), alpha)
        if threshold is None:
            continue
        points[name] = {
            "risk_threshold": threshold,
            "alpha": alpha,
            "num_answers": len(scaled.examples),
            "false_alarms_per_1000_tokens": alarms_per_1000_tokens(scaled.risks, threshold),
            "recall": float((unsafe.highest() >= threshold).mean()) if unsafe and unsafe.examples else None,
        }
    return points


def scale_risks(scored: ScoredAnswers, temperature: float) -> ScoredAnswers:
    """The risks that a head gives once its logits are divided by a temperature, without another forward."""
    risks = [torch.sigmoid(torch.logit(risks_T.double()) / temperature) for risks_T in scored.risks]
    return ScoredAnswers(scored.examples, risks)


def alarms_per_1000_tokens(risks: Sequence[Tensor], threshold: float) -> float | None:
    """False alarms in 1,000 tokens of long benign answers: a longer answer has more chances to be flagged.

    Neighbouring tokens above the threshold are one alarm.

    Args:
        risks (`Sequence[torch.Tensor]`): Of benign answers, each of shape `(T,)`.
        threshold (`float`): In (0, 1].

    Returns:
        `float`, *optional*: `None` if no answer has 1,000 tokens.

    Example:

        >>> import torch
        >>> risks_T = torch.zeros(2000)
        >>> risks_T[[10, 11, 500]] = 0.9
        >>> alarms_per_1000_tokens([risks_T], threshold=0.5)  # two alarms in 2,000 tokens
        1.0
    """
    long = [risks_T for risks_T in risks if len(risks_T) >= LONG_ANSWER]
    if not long:
        return None
    num_alarms = 0
    for risks_T in long:
        is_flagged_T = risks_T >= threshold
        num_alarms += int(is_flagged_T[0]) + int((is_flagged_T[1:] & ~is_flagged_T[:-1]).sum())
    return 1000 * num_alarms / sum(map(len, long))


def describe_lengths(risks: Sequence[Tensor]) -> dict[str, int]:
    """Tokens of answers: the median, the 95th percentile and the most."""
    lengths = np.array([len(risks_T) for risks_T in risks])
    return {
        "median": int(np.median(lengths)),
        "p95": int(np.quantile(lengths, 0.95, method="higher")),
        "most": int(lengths.max()),
    }
