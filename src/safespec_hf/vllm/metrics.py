"""What the guard counts, in the registry that vLLM shows at `/metrics`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from .request import GuardedRequest

RISK_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """Counters of one server.

    Args:
        registry (`prometheus_client.CollectorRegistry`, *optional*): Default: the one that `/metrics` shows.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY):
        self.flags = Counter("safespec_flags", "Tokens that were flagged.", registry=registry)
        self.recoveries = Counter("safespec_recoveries", "Flags after which a safe text went on.", registry=registry)
        self.refusals = Counter("safespec_refusals", "Answers that ended in a refusal or a stop.", registry=registry)
        self.fail_closed = Counter("safespec_fail_closed", "Those that could not be guarded.", registry=registry)
        self.risk = Histogram(
            "safespec_risk", "Highest risk along what was returned.", buckets=RISK_BOUNDS, registry=registry
        )
        self.head_seconds = Counter("safespec_head_seconds", "Host time of workers in the head.", registry=registry)
        self.entries = Gauge("safespec_state_entries", "Requests of which workers keep states.", registry=registry)
        self.state_bytes = Gauge("safespec_state_bytes", "Memory of these states.", registry=registry)
        self._head_seconds = 0.0

    def count(self, answer: GuardedRequest) -> None:
        """Counts an answer, whether it came to its end or nobody wanted it any more."""
        self.flags.inc(answer.statistics.num_flags)
        self.recoveries.inc(sum(event.outcome == "recovered" for event in answer.row.events))
        if not answer.is_finished:
            return
        result = answer.result()
        self.refusals.inc(result.finish_reason.startswith("safety"))
        self.fail_closed.inc(result.failure is not None)
        risks = [risk for risk in result.risks if not math.isnan(risk)]
        if risks:
            self.risk.observe(max(risks))

    def read_workers(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what workers count: `safespec_report` of each."""
        total = sum(float(report["head_seconds"]) for report in reports)
        self.head_seconds.inc(max(total - self._head_seconds, 0.0))
        self._head_seconds = total
        self.entries.set(sum(int(report["num_entries"]) for report in reports))
        self.state_bytes.set(sum(int(report["state_bytes"]) for report in reports))
