"""How often one of K candidates is safe, counted, against 1 - (1 - p)^K of independent ones. All pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .metrics import Interval, bootstrap_mean, mean, ratio
from .rows import Row

CANDIDATE_COUNTS = (1, 2, 5, 10, 20)
TESTS = ("confirmed", "dismissed")


class Attempt(NamedTuple):
    """One recovery attempt: how many candidates were sampled, and how many of them were safe."""

    num: int
    num_safe: int


def attempts_of(rows: Sequence[Row]) -> list[Attempt]:
    """The first attempt after each flag. Later ones steer away from what was found unsafe: they are other draws.

    Attempts that stop sampling at the first safe candidate would flatter p: their rows don't belong here. Nor do tests
    for a false alarm, whose candidates read no reflection, and end with the first that is not harmless.
    """
    attempts = []
    for row in rows:
        before: Any = None
        for event in row["events"]:
            place = (event["position"], event["rolled_back_to"])
            if event.get("outcome") in TESTS:
                continue
            if event["candidate_risks"] and place != before:
                attempts.append(_attempt(event, row["risk_threshold"]))
            before = place
    return attempts


def _attempt(event: dict[str, Any], threshold: float) -> Attempt:
    if num_unsafe := event.get("num_unsafe_candidates", 0):
        # the rest ended early, and nobody knows
        return Attempt(event["num_safe_candidates"] + num_unsafe, event["num_safe_candidates"])
    risks = event["candidate_risks"]
    return Attempt(len(risks), sum(risk is not None and risk < threshold for risk in risks))


def success_at(attempts: Sequence[Attempt], k: int) -> Interval:
    """The chance that one of K of an attempt's candidates is safe, over all subsets of K that it has.

    Example:

        >>> success_at([Attempt(4, 1)], 2).mean
        0.5
    """
    return bootstrap_mean([1 - math.comb(a.num - a.num_safe, k) / math.comb(a.num, k) for a in attempts if a.num >= k])


def intraclass_correlation(attempts: Sequence[Attempt]) -> float:
    """How alike the candidates of one attempt are: 0 if they are independent draws of one p, 1 if all are alike.

    The moment estimate of a beta-binomial: by how much the counts vary more than a binomial does. NaN if all
    candidates are safe, or none.

    Example:

        >>> intraclass_correlation([Attempt(8, 8), Attempt(8, 0)])
        1.0
    """
    many = [attempt for attempt in attempts if attempt.num > 1]
    p = ratio(sum(a.num_safe for a in many), sum(a.num for a in many))
    if math.isnan(p) or p in (0, 1):
        return math.nan
    size = mean([attempt.num for attempt in many])
    spread = mean([(a.num_safe - a.num * p) ** 2 / (a.num * p * (1 - p)) for a in many])
    return (spread - 1) / (size - 1)


def recovery_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Success at K beside what independent candidates of the same p would reach.

    Args:
        rows (`Sequence[Mapping]`): Of one method.

    Returns:
        `dict`: `num_attempts`, `p_safe`, `correlation`, and `by_k`: for each K that was sampled, `measured` with `low`
        and `high`, `independent`, and `effective`, the number of independent candidates that are worth as much.
    """
    attempts = attempts_of(rows)
    p = ratio(sum(a.num_safe for a in attempts), sum(a.num for a in attempts))
    most = max((attempt.num for attempt in attempts), default=0)
    counts = sorted({k for k in (*CANDIDATE_COUNTS, most) if 1 <= k <= most})
    return {
        "num_attempts": len(attempts),
        "p_safe": p,
        "correlation": intraclass_correlation(attempts),
        "by_k": [_at(attempts, k, p) for k in counts],
    }


def _at(attempts: Sequence[Attempt], k: int, p: float) -> dict[str, Any]:
    measured = success_at(attempts, k)
    effective = math.log1p(-measured.mean) / math.log1p(-p) if 0 < p < 1 and measured.mean < 1 else math.nan
    return {
        "k": k,
        "measured": measured.mean,
        "low": measured.low,
        "high": measured.high,
        "independent": 1 - (1 - p) ** k,
        "effective": effective,
    }
