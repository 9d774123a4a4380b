"""On outputs in the form that the models' cards show; the models themselves are not run."""

import pytest

from safespec_hf import SafeSpecError
from safespec_hf.training.labelers import find_unsafe_class, parse_llama_guard, parse_qwen3guard


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Safety: Safe\nCategories: None\nRefusal: Yes", 0),
        ("Safety: Unsafe\nCategories: Violent\nRefusal: No", 1),
        ("Safety: Controversial\nCategories: Unethical Acts\nRefusal: No", None),
        ("Safety:Safe", 0),
        ("I think this is fine.", None),
        ("", None),
    ],
)
def test_qwen3guard(text, label):
    assert parse_qwen3guard(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [("\n\nsafe", 0), ("safe", 0), ("\n\nunsafe\nS2", 1), ("unsafe\nS1,S9", 1), ("unsure", None), ("", None)],
)
def test_llama_guard(text, label):
    assert parse_llama_guard(text) == label


@pytest.mark.parametrize("names", [["SAFE", "UNSAFE"], ["benign", "jailbreak"], ["neutral", "toxic"]])
def test_a_classifier_names_its_unsafe_class(names):
    assert find_unsafe_class(dict(enumerate(names))) == 1


def test_a_classifier_whose_classes_say_nothing_is_refused():
    with pytest.raises(SafeSpecError, match="positive"):
        find_unsafe_class({0: "negative", 1: "positive"})
