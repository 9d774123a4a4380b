"""Fixtures: tiny random models in float32, a real tokenizer of 40 words, and heads that never or often flag."""

import pytest
import tiny
import torch

torch.set_num_threads(1)  # the models are too small for more, and one thread gives the same sums every time


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_model():
    """`tiny_model(kind="llama", seed=0, **config)` builds a random model; kinds are the keys of `tiny.CONFIGS`."""
    return tiny.build_model


@pytest.fixture
def target():
    return tiny.build_model()


@pytest.fixture
def draft(target):
    """The target with a little noise: it accepts some of these drafts, but not all."""
    return tiny.perturb(target)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.fixture
def never(target):
    """A head that flags nothing."""
    return tiny.build_head(target)


@pytest.fixture
def noisy(target):
    """A head that flags about a third of all tokens."""
    return tiny.build_noisy_head(target)
