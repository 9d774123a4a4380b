"""What an answer of the server tells beside its text. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from .rounds import GuardedResult

Reports = Literal["full", "outcome", "none"]


def report(result: GuardedResult, risk_threshold: float, reports: Reports = "full") -> Mapping[str, Any]:
    """What is told, ready for JSON.

    Args:
        result ([`GuardedResult`]): A finished answer.
        risk_threshold (`float`): Its own, in (0, 1].
        reports (`"full"` or `"outcome"`, defaults to `"full"`):
            Risks of all tokens and events, an unknown one as `None`; or only how it ended.
    """
    told: dict[str, Any] = {"finish_reason": result.finish_reason, "num_flags": result.statistics.num_flags}
    if result.failure is not None:
        told["failure"] = result.failure
    if reports == "full":
        told["risk_threshold"] = risk_threshold
        told["risks"] = [_number(risk) for risk in result.risks]
        told["events"] = [{name: _plain(value) for name, value in asdict(event).items()} for event in result.events]
    return told


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return _number(value)
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
