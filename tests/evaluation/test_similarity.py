import pytest

from safespec_hf.evaluation import similarity
from safespec_hf.evaluation.similarity import by_embedding, find_similarity


def test_an_answer_that_repeats_its_request_is_all_about_it(embedder):
    same, other, blank = by_embedding(embedder)(["w10 w11"] * 3, ["w10 w11", "w30 w31 w32", ""])
    assert same == pytest.approx(1.0, abs=1e-5)
    assert other < 1 - 1e-3
    assert blank == 0.0


def test_without_an_encoder_nothing_is_said(monkeypatch):
    monkeypatch.setattr(similarity, "find_spec", lambda _: None)
    assert find_similarity() is None
