"""What `export_guarded` writes, where it refuses, and that a light export points where its parts came from."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from tiny import attach, build_head, build_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from safespec_hf import (
    SafeSpecConfig,
    SafeSpecError,
    SafetyHead,
    UnsupportedRequestError,
    detach_safety_head,
    export_guarded,
)
from safespec_hf.exporting.manifest import read_manifest

FULL = [
    "README.md",
    "config.json",
    "custom_generate",
    "draft",
    "generation_config.json",
    "guarded.py",
    "head",
    "target",
]
TOKENIZER = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def source(target, chat_tokenizer):
    head = build_head(target, tokenizer=chat_tokenizer)
    return attach(target, chat_tokenizer, head, draft=tiny.build_draft_head(target))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_export_has_everything(source, tmp_path):
    folder = export_guarded(source, tmp_path / "new" / "export", license="apache-2.0")
    assert names(folder) == sorted(FULL + TOKENIZER)
    assert names(folder / "custom_generate") == ["generate.py", "requirements.txt"]
    assert (folder / "target" / "model.safetensors").is_file()
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert "custom_generate" in (folder / "README.md").read_text()


def test_the_requirements_bound_our_version(source, tmp_path):
    text = (export_guarded(source, tmp_path) / "custom_generate" / "requirements.txt").read_text()
    assert text.startswith("safespec-hf>=")


def test_an_export_replaces_an_earlier_one_and_keeps_a_card_that_was_edited(source, tmp_path):
    export_guarded(source, tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy own words\n")
    (tmp_path / ".exporting-killed").mkdir()
    without_draft = attach(build_model(), source.safety.tokenizer, source.safety.head)
    export_guarded(without_draft, tmp_path)
    assert names(tmp_path) == sorted({*FULL, *TOKENIZER} - {"draft"})
    assert "My own words" in (tmp_path / "README.md").read_text()
    assert read_manifest(tmp_path, {}).draft is None


def test_nothing_of_an_earlier_tokenizer_is_left_and_all_of_the_users(source, tokenizer, tmp_path):
    source.safety.tokenizer.chat_template = {"default": "one", "tools": "two"}
    export_guarded(source, tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tools.jinja").is_file()
    (tmp_path / "added_tokens.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("of the user")
    other = attach(build_model(), tokenizer)
    assert names(export_guarded(other, tmp_path)) == sorted(
        {*FULL, *TOKENIZER, "notes.txt"} - {"draft", "chat_template.jinja"}
    )
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True).chat_template is None


def test_vocabulary_files_are_those_of_the_earlier_tokenizers_class(source, tmp_path):
    export_guarded(source, tmp_path)
    (tmp_path / "vocab.txt").write_text("of the user")
    assert "vocab.txt" in names(export_guarded(source, tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert "vocab.txt" not in names(export_guarded(source, tmp_path))


@pytest.mark.parametrize("content", ["notes.txt", "config.json"])
def test_a_folder_with_something_else_is_left_alone(source, tmp_path, content):
    (tmp_path / content).write_text("{}")
    with pytest.raises(SafeSpecError, match="holds something else"):
        export_guarded(source, tmp_path)
    assert names(tmp_path) == [content]


def test_a_file_is_no_place_for_an_export(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SafeSpecError, match="is a file"):
        export_guarded(source, tmp_path / "file")


def test_an_interrupted_export_is_no_model_and_is_taken_up_again(source, tmp_path, monkeypatch):
    def interrupt(source, place):
        if Path(place).name == "guarded.py":
            raise KeyboardInterrupt
        shutil.move(source, place)

    export_guarded(source, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("safespec_hf.exporting.export.os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_guarded(source, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert (export_guarded(source, tmp_path) / "config.json").exists()


def test_a_model_without_a_head_is_refused(target, tmp_path):
    with pytest.raises(TypeError, match="has none"):
        export_guarded(target, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": SafeSpecConfig(policy="observe")}, "guards nothing"),
        ({"policy": SafeSpecConfig(verification="segment", num_draft_segments=2)}, "`num_draft_segments=2` needs"),
        ({"tokenizer": None}, "needs the tokenizer"),
    ],
)
def test_what_would_not_be_guarded_is_refused_before_anything_is_written(target, tokenizer, tmp_path, change, message):
    arguments = {"tokenizer": tokenizer, **change}
    model = attach(target, arguments.pop("tokenizer"), **arguments)
    with pytest.raises(SafeSpecError, match=message):
        export_guarded(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_model_with_code_of_its_own_is_refused(tokenizer, tmp_path):
    class OwnCode(type(build_model())):
        pass

    model = build_model()
    model.__class__ = OwnCode
    with pytest.raises(UnsupportedRequestError, match="not a class of transformers"):
        export_guarded(attach(model, tokenizer), tmp_path)


def test_a_bad_licence_is_refused(source, tmp_path):
    with pytest.raises(SafeSpecError, match="abbreviated"):
        export_guarded(source, tmp_path, license="my own!")


def test_a_draft_of_another_target_is_refused(source, tmp_path):
    draft = tiny.build_draft_head(build_model(num_hidden_layers=3))
    with pytest.raises(SafeSpecError, match="num_layers"):
        export_guarded(source, tmp_path, draft=draft)


def test_a_light_export_needs_a_target_on_the_hub(source, target_folder, tmp_path):
    source.config.name_or_path = str(target_folder)
    with pytest.raises(UnsupportedRequestError, match="points to its target on the Hub"):
        export_guarded(source, tmp_path / "export", light=True)


@pytest.fixture
def published(hub, target_folder, head, tmp_path, chat_tokenizer):
    """A target and a head that were loaded from the Hub, and the parts of a light export of them."""
    head.save_pretrained(tmp_path / "head")
    for name, folder in (("owner/target", target_folder), ("owner/head", tmp_path / "head")):
        hub.put(name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    model = AutoModelForCausalLM.from_pretrained("owner/target")
    return attach(model, chat_tokenizer, SafetyHead.from_pretrained("owner/head"))


def light_parts(model, folder, **arguments):
    return json.loads((export_guarded(model, folder, light=True, **arguments) / "config.json").read_text())["safespec"]


@pytest.mark.parametrize(
    "change",
    [
        lambda head: setattr(head.config, "risk_threshold", 0.1),
        lambda head: setattr(head.config, "pooling", "last"),
        lambda head: head.mlp[-1].bias.data.add_(1.0),
        lambda head: head.bfloat16(),
    ],
    ids=["threshold", "reading", "weights", "precision"],
)
def test_a_head_that_was_changed_since_it_was_loaded_is_copied(published, tmp_path, change):
    change(published.safety.head)
    assert light_parts(published, tmp_path / "light")["head"] == {"folder": "head"}
    copied = SafetyHead.from_pretrained(tmp_path / "light" / "head")
    assert copied.config.risk_threshold == published.safety.head.config.risk_threshold
    assert torch.equal(copied.mlp[-1].bias, published.safety.head.mlp[-1].bias)


def test_a_head_that_was_loaded_at_another_revision_is_copied_unless_that_is_said(hub, published, tmp_path):
    before = hub.repos["owner/head"].branches["main"]
    published.safety.head.config.risk_threshold = 0.25
    published.safety.head.save_pretrained(tmp_path / "other")
    hub.put("owner/head", {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()})
    loaded = SafetyHead.from_pretrained("owner/head", revision=before)
    tokenizer = published.safety.tokenizer
    model = attach(detach_safety_head(published), tokenizer, loaded)
    assert light_parts(model, tmp_path / "light")["head"] == {"folder": "head"}
    assert light_parts(model, tmp_path / "said", revisions={"head": before})["head"]["revision"] == before


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_light_export_of_changed_weights_says_that_they_are_left_behind(published, tmp_path, caplog, is_changed):
    if is_changed:
        published.model.layers[1].mlp.up_proj.weight.data.add_(0.5)
    light_parts(published, tmp_path / "light")
    assert ("not those of owner/target" in caplog.text) == is_changed


def test_a_light_export_points_to_what_came_from_the_hub_and_copies_the_rest(
    hub, target_folder, chat_tokenizer, head, tmp_path
):
    hub.put("owner/target", {path.name: path.read_bytes() for path in target_folder.iterdir() if path.is_file()})
    head.save_pretrained(tmp_path / "head")
    hub.put("owner/head", {path.name: path.read_bytes() for path in (tmp_path / "head").iterdir() if path.is_file()})
    model = AutoModelForCausalLM.from_pretrained("owner/target")
    guarded = attach(model, chat_tokenizer, SafetyHead.from_pretrained("owner/head"))
    folder = export_guarded(guarded, tmp_path / "light", draft=tiny.build_draft_head(model), light=True)
    entry = json.loads((folder / "config.json").read_text())["safespec"]
    commits = {name: hub.repos[name].branches["main"] for name in hub.repos}
    assert (entry["target"]["repo_id"], entry["target"]["revision"]) == ("owner/target", commits["owner/target"])
    assert (entry["head"]["repo_id"], entry["head"]["revision"]) == ("owner/head", commits["owner/head"])
    assert entry["draft"] == {"folder": "draft"}
    assert not any((folder / name).exists() for name in ("target", "head"))
