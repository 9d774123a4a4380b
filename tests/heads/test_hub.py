"""Heads survive the way to the Hub and back through its real client, and what is damaged on the way is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from head_files import CONFIG, ID, WEIGHTS, pickled, with_config
from hub_server import TOKEN
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tiny import build_head, build_model, is_before
from transformers import AutoModel
from typer.testing import CliRunner

from safespec_hf import (
    HeadFileError,
    SafeSpecError,
    SafetyHead,
    attach_safety_head,
)
from safespec_hf.cli import app
from safespec_hf.heads.hub import describe_push, keep_report, push_head, save_head, show_head

# huggingface_hub 2.4 uploads LFS files with an argument that its HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Through the client


def test_a_pushed_head_is_the_head_that_comes_back(hub, head, folder):
    assert push_head(folder, ID, token=TOKEN) == f"{hub.endpoint}/{ID}"
    for load in (SafetyHead.from_pretrained, AutoModel.from_pretrained):
        loaded = load(ID)
        assert same_weights(loaded, head)
        assert (loaded.config.target, loaded.config.risk_threshold) == (head.config.target, 0.875)
        assert not loaded.training
        assert loaded.name_or_path == ID


def test_a_head_in_memory_can_be_pushed_and_attached_by_id(hub, head, target, tokenizer):
    push_head(head, ID, token=TOKEN)
    attach_safety_head(target, ID, tokenizer=tokenizer)
    ids = tokenizer("w10 w11", return_tensors="pt").input_ids
    out = target.generate(ids, safespec=True, max_new_tokens=3, return_dict_in_generate=True)
    assert out.sequences.shape[0] == 1


def test_everything_that_belongs_to_a_head_is_published_and_nothing_else(hub, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "roc.png").write_bytes(b"")
    push_head(folder, ID, token=TOKEN)
    expected = {CONFIG, WEIGHTS, "README.md", "report.json", "roc.png", ".eval_results/safespec.yaml"}
    assert set(hub.files(ID)) == expected
    assert {file.rfilename for file in HfApi().model_info(ID).siblings} == expected


def test_a_folder_without_a_card_gets_one_that_names_its_repository(hub, head, tmp_path):
    head.save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    push_head(tmp_path, ID, token=TOKEN)
    assert f'"{ID}"' in hub.files(ID)["README.md"].decode()
    assert not (tmp_path / "README.md").exists()


def test_the_snippet_of_a_published_card_loads_from_its_repository(hub, folder):
    push_head(folder, ID, token=TOKEN)
    card = ModelCard.load(ID)
    assert f'"{ID}"' in card.text
    assert "path/to/this/folder" not in card.text


@pytest.mark.parametrize("kind", ["branch", "commit"])
def test_a_revision_can_be_pushed_and_loaded(hub, head, kind):
    push_head(head, ID, token=TOKEN)
    revision = "v2" if kind == "branch" else hub.repos[ID].branches["main"]
    old = build_head(build_model(), 0.875)
    with torch.no_grad():
        head.mlp[-1].bias += 1.0
    push_head(head, ID, token=TOKEN, revision="v2" if kind == "branch" else None)
    assert same_weights(SafetyHead.from_pretrained(ID, revision=revision), head if kind == "branch" else old)
    assert same_weights(SafetyHead.from_pretrained(ID), old if kind == "branch" else head)


def test_pushing_a_branch_twice_adds_to_it(hub, head):
    for _ in range(2):
        address = push_head(head, ID, token=TOKEN, revision="v2")
    assert address == f"{hub.endpoint}/{ID}/tree/v2"
    assert hub.files(ID) == {}


@pytest.mark.skipif(is_before("5.21"), reason="transformers loses the token on the way to a config")
def test_a_private_head_needs_the_token(hub, head):
    push_head(head, ID, token=TOKEN, private=True)
    assert same_weights(SafetyHead.from_pretrained(ID, token=TOKEN), head)
    with pytest.raises(HeadFileError, match=ID):
        SafetyHead.from_pretrained(ID, force_download=True)


def test_a_push_without_a_token_is_refused_by_the_hub(hub, head):
    with pytest.raises(HfHubHTTPError, match="401"):
        push_head(head, ID)
    assert hub.repos == {}


def test_a_dry_run_checks_and_sends_nothing(hub, folder):
    assert push_head(folder, ID, dry_run=True) == f"{hub.endpoint}/{ID}"
    (folder / WEIGHTS).unlink()
    with pytest.raises(HeadFileError):
        push_head(folder, ID, dry_run=True)
    assert hub.requests == []


def test_a_described_push_is_what_a_push_publishes(hub, folder):
    (folder / "notes.txt").write_text("mine")
    said = describe_push(folder, ID, revision="v2")
    assert hub.requests == []
    push_head(folder, ID, token=TOKEN)
    rows = [f"  {name}, {len(content):,} bytes" for name, content in sorted(hub.files(ID).items())]
    card = hub.files(ID)["README.md"].decode()
    assert said.split("\n", len(rows) + 2) == [f"To {hub.endpoint}/{ID}/tree/v2:", *rows, "README.md:", card]


def test_the_command_pushes_to_a_branch_or_only_shows_what_it_would(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["push", str(folder), ID, "--revision", "v2", "--license", "mit"]
    assert WEIGHTS in CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False).output
    assert hub.requests == []
    assert CliRunner().invoke(app, command, catch_exceptions=False).stdout == f"{hub.endpoint}/{ID}/tree/v2\n"
    assert WEIGHTS in hub.files(ID, "v2")
    assert hub.files(ID) == {}


def test_the_hub_accepts_the_metadata(hub, folder):
    push_head(folder, ID, token=TOKEN)
    assert "POST /api/validate-yaml" in hub.requests


OFFLINE = f"""
from safespec_hf import HeadFileError, SafetyHead
from safespec_hf.heads.hub import show_head
print(SafetyHead.from_pretrained("{ID}").mlp[-1].weight.sum().item())
print("held_out" in show_head("{ID}"))
try:
    SafetyHead.from_pretrained("owner/another")
except HeadFileError as error:
    print(error)
"""


def test_a_fresh_process_loads_it_offline_from_the_cache(hub, head, folder, tmp_path):
    push_head(folder, ID, token=TOKEN)
    show_head(ID)
    num_requests = len(hub.requests)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.endpoint}
    run = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120, check=True)
    total, has_report, error = done.stdout.strip().split("\n", 2)
    assert float(total) == head.mlp[-1].weight.sum().item()
    assert has_report == "True"
    assert "owner/another" in error
    assert len(hub.requests) == num_requests


# What may be published


def test_a_pickle_in_the_folder_is_not_published(folder):
    (folder / "training_args.bin").write_bytes(pickled(folder))
    with pytest.raises(HeadFileError, match=r"training_args\.bin.*not published"):
        push_head(folder, ID, dry_run=True)


def test_a_head_without_a_target_is_not_published(head):
    head.config.target = None
    with pytest.raises(HeadFileError, match="bound to no target"):
        push_head(head, ID, dry_run=True)


@pytest.mark.parametrize(("stale", "message"), [("README.md", "doesn't state"), ("report.json", "was measured at")])
def test_a_card_or_report_of_another_threshold_is_not_published(folder, stale, message):
    other = "report.json" if stale == "README.md" else "README.md"
    (folder / other).unlink()
    (folder / CONFIG).write_bytes(with_config(folder, risk_threshold=0.5)[CONFIG])
    with pytest.raises(HeadFileError, match=message):
        push_head(folder, ID, dry_run=True)


def test_an_id_is_no_folder_to_publish(hub):
    with pytest.raises(HeadFileError, match="not a folder"):
        push_head("owner/other", ID, dry_run=True)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["head", "bad id/x", "owner/", "a/b/c", "", "owner/a..b"])
def test_an_id_that_can_be_none_is_refused(head, repo_id):
    with pytest.raises(SafeSpecError, match="`repo_id` must"):
        push_head(head, repo_id, dry_run=True)


@pytest.mark.parametrize("revision", ["a b", "a..b", "/a", "a/", ""])
def test_a_branch_that_can_be_none_is_refused(head, revision):
    with pytest.raises(SafeSpecError, match="`revision` must"):
        push_head(head, ID, revision=revision, dry_run=True)


def published_card(hub):
    return ModelCard(hub.files(ID)["README.md"].decode())


def test_no_licence_is_chosen_for_anybody(hub, head, caplog):
    push_head(head, ID, token=TOKEN)
    assert published_card(hub).data.license is None
    assert "license: not chosen" in caplog.text


def test_the_licence_that_was_chosen_is_published(hub, head, tmp_path):
    save_head(head, tmp_path, license="mit")
    push_head(tmp_path, ID, token=TOKEN)
    assert published_card(hub).data.license == "mit"
    push_head(tmp_path, ID, token=TOKEN, license="cc-by-4.0")
    assert published_card(hub).data.license == "cc-by-4.0"


@pytest.mark.parametrize("license", ["", "Apache 2.0", "MIT"])
def test_a_licence_that_the_hub_would_not_know_is_refused(head, license):
    with pytest.raises(SafeSpecError, match="`license` must"):
        push_head(head, ID, license=license, dry_run=True)


def test_a_head_pushes_itself_as_push_head_does(hub, head):
    assert head.push_to_hub(ID, token=TOKEN, license="mit", tags=["garden"]) == f"{hub.endpoint}/{ID}"
    assert published_card(hub).data.license == "mit"
    assert "garden" in published_card(hub).data.tags
    head.config.target = None
    with pytest.raises(HeadFileError, match="bound to no target"):
        head.push_to_hub(ID, token=TOKEN)


def test_a_head_saves_itself_as_save_head_does(head, tmp_path):
    head.save_pretrained(tmp_path / "itself", license="mit")
    save_head(head, tmp_path / "saved", license="mit")
    for file in (tmp_path / "saved").iterdir():
        assert file.read_bytes() == (tmp_path / "itself" / file.name).read_bytes()


def test_saving_can_push_as_in_transformers(hub, head, tmp_path):
    head.save_pretrained(tmp_path / "head", push_to_hub=True, repo_id=ID, token=TOKEN, commit_message="First")
    assert set(hub.files(ID)) == {CONFIG, WEIGHTS, "README.md"}
    with pytest.raises(SafeSpecError, match="`repo_id` must name its owner"):
        head.save_pretrained(tmp_path / "other", push_to_hub=True)
    assert not (tmp_path / "other").exists()


def test_an_edited_card_is_published_as_it_is(hub, folder):
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("## Limits", "## My own limits"))
    push_head(folder, ID, token=TOKEN)
    assert "## My own limits" in published_card(hub).text


def test_an_unedited_card_follows_what_lies_beside_it(hub, head, report, tmp_path):
    save_head(head, tmp_path / "head")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps({**report, "results": {**report["results"]}}))
    keep_report(tmp_path / "report", tmp_path / "head")
    push_head(tmp_path / "head", ID, token=TOKEN)
    assert "| held_out | 50 | 60 | 0.930" in published_card(hub).text


def test_a_head_without_an_evaluation_says_so(hub, head, caplog):
    push_head(head, ID, token=TOKEN)
    assert "No evaluation is published" in caplog.text


def test_a_push_that_breaks_off_is_told(hub, head, monkeypatch):
    def break_off(*_, **__):
        raise HTTPError("gone")

    monkeypatch.setattr(HfApi, "upload_folder", break_off)
    with pytest.raises(SafeSpecError, match="broke off"):
        push_head(head, ID, token=TOKEN)
