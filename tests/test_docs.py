"""What the pages show is true: Python blocks run as written, and commands and their options exist.

A page's blocks run from top to bottom in one namespace, on what a reader has by then: the default target, a Hub with
`owner/target`, `owner/head` and `owner/draft` on it, and a folder with what the pages' commands leave there.
"""

import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from hub_server import TOKEN, serve_instead
from tiny import attach, build_model

from safespec_hf import SafetyHead, export_guarded
from safespec_hf.cli import app
from safespec_hf.defaults.default_target import DEFAULT_DRAFTS, DEFAULT_HEAD
from safespec_hf.heads.hub import save_head

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(path for folder in ("docs", "recipes") for path in (ROOT / folder).rglob("*.md")),
]
RUN, SHELL, INERT = {"python"}, {"bash", "console"}, {"text", "mermaid", "json", "bibtex"}
FOREIGN = {
    "hf",
    "transformers",
    "lm_eval",
    "bash",
    "cd",
    "mkdir",
    "pytest",
}  # commands of others, whose options are theirs
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        yield Block(page, line, fence[2], textwrap.dedent(fence[3]))


def name(page):
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON_PAGES = [page for page in PAGES if any(block.language in RUN for block in blocks(page))]
INLINE = [
    pytest.param(code, id=f"{name(page)} {code}")
    for page in PAGES
    for code in re.findall(r"`safespec\s([^`]+)`", page.read_text(encoding="utf-8"))
]


def commands(block):
    """The commands of a shell block, as lists of words; in a console, the lines after a prompt."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    parts = [part for line in lines for part in re.split(r"&&|\|", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


SHELL_COMMANDS = [
    pytest.param(words, id=f"{name(block.page)}:{block.line} {' '.join(words[:2])}")
    for block in BLOCKS
    if block.language in SHELL
    for words in commands(block)
]


@pytest.fixture
def reader(tmp_path, monkeypatch, head, draft, report, target_folder, chat_tokenizer):
    """Puts the models on the Hub and the results of earlier commands into the folder, and goes there."""
    report["results"]["risk_threshold"] = head.config.risk_threshold
    save_head(head, tmp_path / "owner-head", report)
    draft.save_pretrained(tmp_path / "owner-draft")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(report))
    shutil.copytree(DEFAULT_HEAD, tmp_path / "head")
    shutil.copytree(DEFAULT_DRAFTS[-1], tmp_path / "draft")
    monkeypatch.chdir(tmp_path)
    with serve_instead(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, folder in [("target", target_folder), ("draft", "owner-draft"), ("head", "owner-head")]:
            files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.is_file()}
            hub.put(f"owner/{name}", files)
        guarded = attach(build_model(), chat_tokenizer, SafetyHead.from_pretrained(tmp_path / "owner-head"))
        exported = export_guarded(guarded, tmp_path / "guarded")
        files = [path for path in exported.rglob("*") if path.is_file()]
        hub.put("owner/guarded", {path.relative_to(exported).as_posix(): path.read_bytes() for path in files})
        hub.repos["owner/head"].branches["v2"] = hub.repos["owner/head"].branches["main"]
        yield hub


def test_every_fence_is_seen_and_says_what_it_holds():
    fences = sum(len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= RUN | SHELL | INERT


# huggingface_hub 2.4 uploads LFS files with an argument that its HTTP library deprecates
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.real_model
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_python_runs_as_written(page, reader):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language in RUN:
            # empty lines before it, so that a traceback shows the page's own line
            exec(compile("\n" * block.line + block.text, page, "exec"), namespace)


@pytest.mark.parametrize("words", SHELL_COMMANDS)
def test_commands_exist(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_command(*words)


@pytest.mark.parametrize("code", INLINE)
def test_commands_in_running_text_exist(code):
    verb, *words = shlex.split(code)
    known = {option for parameter in COMMANDS[verb].params for option in parameter.opts} if verb in COMMANDS else set()
    assert {word for word in [verb, *words] if word.startswith("--")} <= known | {"--help", "--version"}


def check_command(program, *arguments):
    match Path(program).name:
        case "safespec":
            check_safespec(*arguments)
        case "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in arguments if "=" not in word} <= set(targets)
        case "python" | "python3":
            assert (ROOT / arguments[0]).is_file()
        case "pip":
            extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            named = re.findall(r"\[([\w,-]+)\]", " ".join(arguments))
            assert {extra for names in named for extra in names.split(",")} <= set(extras)
        case other:
            assert other in FOREIGN


def check_safespec(verb, *arguments):
    """The command line's own parser takes it, values included, once the files that it names are there."""
    for argument in arguments:
        if argument.endswith(".jsonl"):
            Path(argument).touch()
    for folder in ("head", "draft"):
        Path(folder).mkdir(exist_ok=True)
    COMMANDS[verb].make_context(verb, list(arguments))
