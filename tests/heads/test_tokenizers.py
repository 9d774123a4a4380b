"""A head knows its tokenizer again, also with tokens added after its vocabulary; a missing one is told at once."""

import time

import pytest
from tiny import build_head, build_model, build_tokenizer
from transformers import LlamaForCausalLM

from safespec_hf import HeadMismatchError, target_binding
from safespec_hf.heads import loading
from safespec_hf.heads.safety_head import check_target
from safespec_hf.heads.tokenizers import find_tokenizer, is_extension, tokenizer_fingerprint

FINGERPRINT = "2855e9055a13adab"  # of the tiny tokenizer, as heads of earlier versions have it


def extended(*tokens):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def test_the_fingerprint_is_that_of_earlier_versions(tokenizer):
    assert tokenizer_fingerprint(tokenizer) == FINGERPRINT


def test_a_fingerprint_follows_tokens_that_are_added_later():
    tokenizer = build_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before == tokenizer_fingerprint(tokenizer, 1)


@pytest.mark.parametrize("num_added", [1, 2, 20])
def test_added_tokens_leave_the_vocabulary_below_them_intact(num_added):
    assert is_extension(extended(*(f"<{index}>" for index in range(num_added))), FINGERPRINT)


@pytest.mark.parametrize("other", [build_tokenizer, lambda: build_tokenizer(41), lambda: build_tokenizer(39)])
def test_another_vocabulary_is_no_extension(other):
    assert not is_extension(other(), FINGERPRINT)


def test_tokens_added_to_another_vocabulary_are_no_extension():
    tokenizer = build_tokenizer(39)
    tokenizer.add_tokens(["new"])
    assert not is_extension(tokenizer, FINGERPRINT)


def test_a_head_takes_its_target_with_added_tokens_and_resized_embeddings(target, tokenizer):
    head, more = build_head(target, tokenizer=tokenizer), extended("<mine>")
    check_target(head, target, more)
    target.resize_token_embeddings(len(more))
    check_target(head, target, more)
    with pytest.raises(HeadMismatchError, match="`vocab_size`"):
        check_target(head, target, tokenizer)


def test_a_head_of_an_extended_tokenizer_refuses_the_shorter_one(target, tokenizer):
    with pytest.raises(HeadMismatchError, match="`tokenizer`"):
        check_target(build_head(target, tokenizer=extended("<mine>")), target, tokenizer)


@pytest.mark.parametrize("path", ["target", "./target", "../here/target", "models/v1/target"])
def test_a_relative_path_is_no_hub_id_when_the_directory_has_changed(tmp_path, monkeypatch, path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    target = build_model()
    target.config.name_or_path = "owner/target"
    head = build_head(target)
    target.save_pretrained(path)
    model = LlamaForCausalLM.from_pretrained(path)
    monkeypatch.chdir(tmp_path)
    assert target_binding(model)["model_id"] is None
    check_target(head, model, None)


def test_a_class_made_at_run_time_is_known_by_the_one_under_it(target):
    target.__class__ = type("FSDPLlamaForCausalLM", (type("FSDPModule", (), {}), type(target)), {})
    assert target_binding(target)["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["owner/nothing", "nothing", "./nothing", ""])
def test_a_missing_tokenizer_is_told_at_once_where_there_is_no_hub(monkeypatch, name):
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: False)
    start = time.perf_counter()
    assert find_tokenizer(name) is None
    assert time.perf_counter() - start < 5


def test_a_tokenizer_on_this_machine_is_found_without_asking_the_hub(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: pytest.fail("asked the Hub"))
    tokenizer.save_pretrained(tmp_path)
    assert find_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
