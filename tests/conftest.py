"""Fixtures: tiny random models in float32, a real tokenizer of 40 words, heads that never or often flag, and a folder
that a head is published from."""

import pytest
import tiny
import torch
from hub_server import serve_instead
from samples import make_examples

from safespec_hf import attach_safety_head
from safespec_hf.heads.hub import save_head

ROW = {"num_safe": 50, "num_unsafe": 60, "auroc": 0.93, "auroc_non_refusal": 0.9, "recall": 0.7, "false_alarms": 0.02}
SAFE_ONLY = {"num_safe": 9, "num_unsafe": 0, "auroc": None, "recall": float("nan"), "false_alarms": 0.0}

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


@pytest.fixture
def guarded(target, never, tokenizer):
    return attach_safety_head(target, never, tokenizer=tokenizer)


@pytest.fixture
def flagging(target, noisy, tokenizer):
    return attach_safety_head(target, noisy, tokenizer=tokenizer)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback in the place of the real one."""
    with serve_instead(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def head(target, tokenizer):
    """A head that names its target."""
    target.config.name_or_path = "owner/target"
    return tiny.build_head(target, 0.875, tokenizer=tokenizer)


@pytest.fixture
def report():
    """What `safespec report` writes, as far as cards use it."""
    return {
        "provenance": {"time": "2026-01-02T03:04:05Z", "data": {"test.jsonl": "ab" * 32}},
        "results": {
            "risk_threshold": 0.875,
            "sources": {"owner/benchmark": ROW, "held_out": ROW, "chat": SAFE_ONLY},
            "calibration": {"alpha": 0.02, "num_answers": 480, "risk_threshold": 0.875, "by_source": {"chat": {}}},
        },
        "training": {"provenance": {"data": {"train.jsonl": "cd" * 32}}},
        "data": [{"name": "owner/corpus", "license": "cc-by-4.0", "use": "training"}],
    }


@pytest.fixture
def folder(head, report, tmp_path):
    """The head, saved with its report and card."""
    save_head(head, tmp_path / "head", report)
    return tmp_path / "head"


@pytest.fixture
def examples():
    """Labelled answers in words of the tiny tokenizer."""
    return make_examples(24)


@pytest.fixture
def chat_tokenizer():
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}pause"
    return tokenizer


@pytest.fixture
def target_folder(tmp_path, target, chat_tokenizer):
    """The target, saved with its tokenizer."""
    target.save_pretrained(tmp_path / "target")
    chat_tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def cheap_drafts():
    with tiny.cheap_drafts():
        yield
