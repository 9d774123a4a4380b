"""To the Hub and back: what was exported and pushed answers there as here."""

import pytest
import tiny
import torch
from hub_server import TOKEN
from huggingface_hub import constants
from samples import run
from tiny import PROMPT, attach, build_model, build_noisy_head
from transformers import AutoModelForCausalLM, AutoTokenizer

from safespec_hf import HeadFileError, HeadMismatchError, SafeSpecConfig, SafeSpecError, SafetyHead, export_guarded
from safespec_hf.exporting import push_guarded

POLICY = SafeSpecConfig(**tiny.FIELDS, adaptive_drafts=False)
SHORT = {"max_new_tokens": 12, "do_sample": False}
TRUST = {"trust_remote_code": True}

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def exported(target, chat_tokenizer, tmp_path):
    target.config.name_or_path = "owner/target"
    head = build_noisy_head(target, tokenizer=chat_tokenizer)
    model = attach(target, chat_tokenizer, head, policy=POLICY)
    return export_guarded(model, tmp_path / "export", draft=tiny.build_draft_head(target), license="apache-2.0")


@pytest.fixture
def expected(target, exported):
    return target.generate(PROMPT, **SHORT, safespec=POLICY)


@pytest.fixture
def pushed(exported, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_guarded(exported, "owner/guarded")
    return hub


def test_what_was_pushed_answers_as_the_export_does(pushed, expected):
    model = AutoModelForCausalLM.from_pretrained("owner/guarded", **TRUST)
    assert torch.equal(model.generate(PROMPT, **SHORT), expected)
    assert model.config.name_or_path == "owner/target"  # which head and draft are bound to
    assert AutoTokenizer.from_pretrained("owner/guarded", trust_remote_code=False).chat_template
    for _ in range(2):
        assert torch.equal(model.generate(PROMPT, **SHORT, custom_generate="owner/guarded", **TRUST), expected)


def test_a_copy_of_a_target_from_a_folder_answers_to_the_id_that_its_head_knows(exported, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local = AutoModelForCausalLM.from_pretrained(exported / "target")
    head = SafetyHead.from_pretrained(exported / "head")
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    push_guarded(export_guarded(attach(local, tokenizer, head), tmp_path / "again"), "owner/again", license="mit")
    model = AutoModelForCausalLM.from_pretrained("owner/again", **TRUST)
    assert model.config.name_or_path == "owner/target"


def test_a_revision_is_loaded_as_a_whole(pushed, exported, expected):
    push_guarded(exported, "owner/guarded", revision="v2")
    pushed.put("owner/guarded", {"config.json": b"{}"})
    model = AutoModelForCausalLM.from_pretrained("owner/guarded", revision="v2", **TRUST)
    assert torch.equal(model.generate(PROMPT, **SHORT), expected)
    plain = build_model()
    arguments = {"custom_generate": "owner/guarded", "revision": "v2", **TRUST}
    for _ in range(2):
        assert torch.equal(plain.generate(PROMPT, **SHORT, **arguments), expected)


def test_the_card_is_told_its_name(pushed):
    card = pushed.files("owner/guarded")["README.md"].decode()
    assert 'pipeline("text-generation", "owner/guarded", trust_remote_code=True)' in card
    assert "base_model: owner/target" in card
    assert "license: apache-2.0" in card


def test_without_its_code_nothing_loads_from_the_hub_either(pushed):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained("owner/guarded", trust_remote_code=False)


def test_the_heads_of_another_model_are_refused_by_custom_generate(pushed):
    model = build_model()
    model.config.name_or_path = "owner/other"
    with pytest.raises(HeadMismatchError, match="model_id"):
        model.generate(PROMPT, **SHORT, custom_generate="owner/guarded", **TRUST)


@pytest.fixture
def light(hub, monkeypatch, target_folder, target, chat_tokenizer, tmp_path):
    """A light export, pushed, with its target and its head on the Hub too."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    target.config.name_or_path = "owner/target"
    build_noisy_head(target, tokenizer=chat_tokenizer).save_pretrained(tmp_path / "head")
    for name, folder in (("target", target_folder), ("head", tmp_path / "head")):
        hub.put(f"owner/{name}", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    command = ("export", tmp_path / "light", "--light", "--target", "owner/target", "--head", "owner/head")
    run(*command, "--license", "apache-2.0")
    run("push", tmp_path / "light", "owner/light")
    return hub


def test_a_light_repository_loads_guarded_and_is_pinned(light, target, chat_tokenizer):
    attach(target, chat_tokenizer, SafetyHead.from_pretrained("owner/head"))
    expected = target.generate(PROMPT, **SHORT, safespec=True)
    light.put("owner/target", {"config.json": b"{}"})  # later commits do not count
    light.put("owner/head", {"model.safetensors": b""})
    assert "target/model.safetensors" not in light.files("owner/light")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained("owner/light", **TRUST).generate(PROMPT, **SHORT), expected
    )
    plain = build_model()
    assert torch.equal(plain.generate(PROMPT, **SHORT, custom_generate="owner/light", **TRUST), expected)


def test_a_light_repository_whose_parts_are_gone_does_not_load(light, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "of-another-user"))
    del light.repos["owner/head"]
    with pytest.raises(HeadFileError, match="no such repo"):
        AutoModelForCausalLM.from_pretrained("owner/light", **TRUST)


def test_the_command_exports_and_shows_what_a_push_would_send(target_folder, target, chat_tokenizer, tmp_path):
    build_noisy_head(target, tokenizer=chat_tokenizer).save_pretrained(tmp_path / "head")
    run("export", tmp_path / "full", "--target", target_folder, "--head", tmp_path / "head", "--draft", "none")
    shown = run("push", tmp_path / "full", "owner/guarded", "--license", "mit", "--dry-run")
    assert "target/model.safetensors" in shown
    assert "https://huggingface.co/owner/guarded" in shown


def test_nothing_is_sent_of_what_is_not_whole_or_has_a_pickle_in_it(exported):
    (exported / "target" / "pytorch_model.bin").touch()
    with pytest.raises(HeadFileError, match="Pickles"):
        push_guarded(exported, "owner/guarded", dry_run=True)
    (exported / "target" / "pytorch_model.bin").unlink()
    (exported / "target" / "model.safetensors").unlink()
    with pytest.raises(HeadFileError, match="is not in"):
        push_guarded(exported, "owner/guarded", dry_run=True)
    (exported / "custom_generate" / "generate.py").unlink()
    with pytest.raises(HeadFileError, match="is missing"):
        push_guarded(exported, "owner/guarded", dry_run=True)


def test_bad_requests_are_refused_before_a_target_is_loaded(tmp_path):
    (tmp_path / "notes.txt").touch()
    for message, arguments in {
        "something else": (tmp_path,),
        "safety head": (tmp_path / "new", "--target", "owner/target"),
        "operating point": (tmp_path / "new", "--operating-point", "unknown"),
        "abbreviated": (tmp_path / "new", "--license", "my own!"),
    }.items():
        with pytest.raises(SafeSpecError, match=message):
            run("export", *arguments)
