"""The demo's risk curve can be read: low risks show, and only what reaches the threshold fills a block."""

import math
import runpy
from pathlib import Path

import pytest

risk_bars = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "demo.py"))["risk_bars"]


def test_low_risks_are_visible_and_told_apart():
    assert risk_bars([1e-5, 0.002, 0.02, 0.2], 0.74) == "▁▂▄▆"


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.74, 1.0])
def test_only_risks_at_the_threshold_are_full(threshold):
    assert risk_bars([threshold * 0.9999, threshold], threshold) == "▇█"


def test_a_token_without_a_risk_is_a_dot():
    assert risk_bars([math.nan, 0.0], 0.5) == "·▁"
