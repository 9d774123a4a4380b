"""A name that can't be loaded is answered within seconds: no such folder, Hub unreachable, or no such repo."""

import contextlib
import socket
import time

import pytest
from hub_server import serve
from huggingface_hub import close_session, constants

from safespec_hf import DraftHead, HeadFileError, SafetyHead, attach_safety_head
from safespec_hf.cli import run
from safespec_hf.heads import loading
from safespec_hf.heads.hub import push_head, show_head
from safespec_hf.heads.loading import hub_arguments, is_hub_reachable

LOADERS = [SafetyHead.from_pretrained, DraftHead.from_pretrained, show_head]


@contextlib.contextmanager
def nobody():
    """An address at which nothing listens."""
    yield "http://127.0.0.1:9"


@contextlib.contextmanager
def silence():
    """An address at which connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def hub():
    with serve() as server:
        yield server.endpoint


@pytest.fixture
def use(monkeypatch, tmp_path):
    """`use(endpoint)` makes that the Hub."""

    def change(endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(loading, "_silent_until", {})
        close_session()

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield change
    close_session()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["./typo", "typo", "a/b/c", "../typo/head", "/typo", "~/typo", "bad id/x", ""])
def test_what_can_only_be_a_folder_asks_nobody(load, name, use):
    use("http://127.0.0.1:9")
    with pytest.raises(HeadFileError, match="no such folder"):
        load(name)
    assert loading._silent_until == {}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("place", [nobody, silence])
def test_a_hub_that_is_not_there_is_told_within_five_seconds(load, place, use):
    start = time.monotonic()
    with place() as endpoint:
        use(endpoint)
        with pytest.raises(HeadFileError, match="Hub unreachable"):
            load("nowhere/head")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("load", LOADERS)
def test_a_repository_that_is_not_there_is_told(load, use):
    with hub() as endpoint:
        use(endpoint)
        with pytest.raises(HeadFileError, match="no such repo on the Hub"):
            load("nowhere/head")


def test_a_silent_hub_is_asked_once(use, monkeypatch):
    with silence() as endpoint:
        use(endpoint)
        assert not is_hub_reachable()
        monkeypatch.setattr(loading, "_probe", None)
        assert not is_hub_reachable()


def test_what_is_cached_is_used_without_a_hub(use):
    use("http://127.0.0.1:9")
    assert hub_arguments("owner/head", {"revision": "v2"})["local_files_only"]


def test_no_hub_is_asked_offline(use, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HeadFileError, match="HF_HUB_OFFLINE is set"):
        SafetyHead.from_pretrained("owner/head")


def test_an_attached_head_answers_as_fast(target, tokenizer, use):
    use("http://127.0.0.1:9")
    for name, message in (("owner/head", "Hub unreachable"), ("x", "no such folder")):
        with pytest.raises(HeadFileError, match=message):
            attach_safety_head(target, name, tokenizer=tokenizer)


@pytest.mark.parametrize(("name", "message"), [("owner/target", "Hub unreachable"), ("./typo", "no such folder")])
def test_a_mistyped_target_answers_as_fast(name, message, use, tmp_path, capsys):
    use("http://127.0.0.1:9")
    (tmp_path / "x.jsonl").write_text('{"prompt": "w10", "response": "w11", "label": 0}')
    assert run(["features", str(tmp_path / "x.jsonl"), "--target", name, "--cache", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_nothing_is_pushed_to_a_hub_that_is_not_there(head, use):
    use("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="Hub unreachable"):
        push_head(head, "owner/head")
