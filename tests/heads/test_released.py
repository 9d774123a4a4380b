"""Heads that were released load and score as they did: their users upgrade the package, not the head."""

from pathlib import Path

import pytest
import torch

from safespec_hf import SafetyHead

FOLDER = Path(__file__).parent / "released" / "0.1"
RISKS = [0.0134249, 0.0056704, 0.4982004, 0.0927944]


def test_a_released_head_scores_as_before():
    head = SafetyHead.from_pretrained(FOLDER)
    states = torch.randn(4, head.config.num_features, generator=torch.Generator().manual_seed(0))
    assert head.risk(3 * states).tolist() == pytest.approx(RISKS, abs=1e-6)


def test_a_released_head_reads_and_flags_as_before():
    config = SafetyHead.from_pretrained(FOLDER).config
    assert (config.hidden_layers, config.pooling, config.span, config.ewma_decay) == (
        [12, 20, 26],
        "ewma",
        "answer",
        0.95,
    )
    assert config.num_features == 3 * 576
    assert config.threshold_at(None) == pytest.approx(0.7408092021942139)
    assert config.operating_points is None
