"""What the benchmark of the invariants holds, as far as it takes no model of any size."""

import sys
from pathlib import Path

import tiny

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from refusals import not_refused, refusals


def test_what_can_not_be_met_is_refused_before_any_forward():
    cases = refusals(tiny.Recorder())
    assert len(cases) >= 26
    assert not_refused(cases) == []
