"""Whatever is wrong with a command line or the files it names: one line, an exit status, and no traceback."""

import contextlib
import io
import json
import shutil
import warnings

import pytest
import tiny
import torch
from command_lines import ARGUMENTS, COMMANDS, OPTIONS
from evaluated import answer_row
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from samples import make_examples, write_lines
from transformers import BertConfig

from safespec_hf.cli import run
from safespec_hf.heads import loading

ROW = {"prompt": "w10", "response": "w11 w12", "label": 1}
BAD_ROWS = [
    *[{**ROW, "label": value} for value in ([0], {}, 2, "maybe", None, 1.5, "", [[]], -1)],
    *[{**ROW, "prompt": value} for value in (None, 1, "", " ", [], {}, ["w10"])],
    *[{**ROW, "response": value} for value in (None, 1, "", "\n", [], {}, ["w10"])],
    *[{**ROW, "weight": value} for value in (-1, 0, "x", [], {}, "nan", "inf")],
    *[{**ROW, "unsafe_from": value} for value in (-1, "x", [], {}, "nan")],
    *[
        {"messages": value, "response": "w11", "label": 1}
        for value in ("hello", "", [], {}, 1, [1], [[]], ["w10"], [{"role": "user"}], [{"content": "w10"}], '{"a": 1}')
    ],
    *[{"messages": [{"role": role, "content": "w10"}], "response": "w11", "label": 1} for role in (None, 1, [], "")],
    *[1, None, "text", [], [1], True],
]
BAD_FILES = [
    b"",
    b"\n \n",
    b"{",
    b'{"prompt": "w10"',
    b"not json",
    b"\xff\xfe\xfd\xfc" * 9,
    b"\x00" * 64,
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    b"PK\x03\x04" + b"\x00" * 30,
    b"PAR1 but no more",
    b"\x1f\x8b cut off",
    '{"prompt": "caf\u00e9"}'.encode("latin-1"),
    b"[" * 9_000,
    b'{"a": ' * 5_000,
    json.dumps(ROW).encode() + b"\n{",
]
BAD_JSON = [b"", b"{", b"[1]", b"null", b"1", b"\xff\xfe", b'"text"']


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files that are all right, by the names that the tables above give them."""
    root = tmp_path_factory.mktemp("world")
    model, tokenizer = tiny.build_model(), tiny.build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}pause"
    model.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    tiny.build_head(model, 0.5, tokenizer=tokenizer).save_pretrained(root / "head")
    rows = [json.loads(example.to_json()) for example in make_examples(24)]
    write_lines(root / "data.jsonl", rows)
    write_lines(root / "benign.jsonl", [{**row, "label": 0} for row in make_rows(60)])
    write_lines(root / "prompts.jsonl", [{"prompt": f"w{10 + index} think", "response": "w11"} for index in range(8)])
    write_lines(
        root / "many.jsonl", [{"prompt": f"w{10 + index % 25} {'no ' * (index // 25)}"} for index in range(170)]
    )
    write_lines(root / "answers.jsonl", [answer_row("target", "0", "w10")])
    (root / "empty").mkdir()
    (root / "blank").write_text("\n")
    files = {name: root / f"{name}.jsonl" for name in ("data", "benign", "prompts", "many", "answers")}
    return {**{name: root / name for name in ("target", "head", "empty", "blank", "new")}, **files}


def make_rows(num):
    return [json.loads(example.to_json()) for example in make_examples(num)]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No Hub, and a folder of its own to be in."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(loading, "_silent_until", {})
    monkeypatch.chdir(tmp_path)


def put(arguments, world):
    return [argument.format(**world) if argument[:1] == "{" else argument for argument in arguments]


def complain(arguments, world):
    """What is wrong with the answer to a command that can't work; nothing if it is as it should be."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = run(put(arguments, world))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever gets here would have been a traceback
        return f"{arguments}: {type(error).__name__}: {error}"
    lines = [line for line in err.getvalue().splitlines() if line.startswith("safespec: ")]
    if status == 0 or len(lines) != 1 or len(lines[0]) < 20 or "Traceback" in err.getvalue():
        return f"{arguments}: status {status}, {lines}"
    return None


def complaints(cases, world):
    return [complaint for case in cases if (complaint := complain(case, world))]


def with_option(verb, option, value):
    command = COMMANDS[verb].copy()
    if option in command and option != "--benign":
        command[command.index(option) + 1] = value
        return [verb, *command]
    return [verb, *command, option, value]


def with_argument(verb, place, value):
    command = COMMANDS[verb].copy()
    command[place] = value
    return [verb, *command]


def damaged_command_lines(verb):
    required = {"push": [0, 1], "report": [0, 1], "make-head": [], "evaluate": []}.get(verb, [0])
    yield from [[verb, *COMMANDS[verb][:place], *COMMANDS[verb][place + 1 :]] for place in required]
    yield from [
        [verb, *COMMANDS[verb], *extra] for extra in (["--nothing"], ["--out"], ["-x"], ["--alpha=", "--target"])
    ]
    yield [verb.upper(), *COMMANDS[verb]]


CASES = {
    **{
        f"{verb} {option}": [with_option(verb, option, value) for value in values]
        for verb, options in OPTIONS.items()
        for option, values in options.items()
    },
    **{
        f"{verb} argument {place}": [with_argument(verb, place, value) for value in values]
        for verb, places in ARGUMENTS.items()
        for place, values in enumerate(places)
    },
    **{f"{verb} command line": list(damaged_command_lines(verb)) for verb in COMMANDS},
}


def test_there_are_three_hundred_cases_and_more():
    assert sum(map(len, CASES.values())) >= 300


@pytest.mark.parametrize("name", CASES)
def test_wrong_values_are_told_in_one_line(name, world):
    assert complaints(CASES[name], world) == []


@pytest.mark.parametrize(
    "verb",
    [
        "collect",
        "features",
        "train",
        "calibrate",
        "report",
        "distill-draft",
        "evaluate",
        "report-evaluation",
    ],
)
def test_wrong_data_is_told_in_one_line(verb, world, tmp_path):
    place = {"calibrate": 2, "report": 1, "evaluate": 1}.get(verb, 0)
    contents = [*(json.dumps(row).encode() for row in BAD_ROWS), *BAD_FILES]
    if verb != "train":  # which stands for all that read labelled answers by the same function
        contents = [json.dumps(row).encode() for row in BAD_ROWS if not isinstance(row, dict)] + BAD_FILES[:9]
    cases = []
    for index, content in enumerate(contents):
        (tmp_path / f"{index}.jsonl").write_bytes(content)
        cases.append(with_argument(verb, place, str(tmp_path / f"{index}.jsonl")))
    assert complaints(cases, world) == []


@pytest.mark.parametrize("verb", ["calibrate", "report", "push", "show"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "report.json", "training.json"])
def test_a_damaged_head_is_told_in_one_line(verb, file, world, tmp_path):
    cases = []
    for index, content in enumerate(BAD_JSON):
        head = shutil.copytree(world["head"], tmp_path / f"head{index}")
        (head / file).write_bytes(content)
        cases.append(with_argument(verb, 0, str(head)))
    is_read = verb in ("push", "show") or file != "report.json"
    assert complaints(cases if is_read else [], world) == []


def rewrite_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


TARGET_DAMAGES = {
    "no config": lambda f: (f / "config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no tokenizer": lambda f: [file.unlink() for file in f.glob("token*")],
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "config is a list": lambda f: (f / "config.json").write_text("[1]"),
    "config without a type": lambda f: (f / "config.json").write_text("{}"),
    "unknown type": lambda f: rewrite_config(f, model_type="nothing"),
    "not a generator": lambda f: BertConfig().save_pretrained(f),
    "size is a word": lambda f: rewrite_config(f, hidden_size="many"),
    "other sizes": lambda f: rewrite_config(f, hidden_size=64),
    "more layers": lambda f: rewrite_config(f, num_hidden_layers=3),
    "cut weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "a weight less": drop_weight,
    "tokenizer is no JSON": lambda f: (f / "tokenizer.json").write_text("{"),
    "tokenizer is empty": lambda f: (f / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("verb", ["collect"])  # all load it by the same function
def test_a_damaged_target_is_told_in_one_line(verb, world, tmp_path):
    cases = []
    for name, damage in TARGET_DAMAGES.items():
        folder = shutil.copytree(world["target"], tmp_path / name)
        damage(folder)
        cases.append(with_option(verb, "--target", str(folder)))
    assert complaints(cases, world) == []


@pytest.mark.parametrize("verb", ["calibrate", "report"])
def test_a_head_for_another_target_is_told_in_one_line(verb, world, tmp_path):
    tiny.build_model(num_hidden_layers=3).save_pretrained(tmp_path / "other")
    shutil.copytree(
        world["target"], tmp_path / "other", dirs_exist_ok=True, ignore=lambda *_: ["config.json", "model.safetensors"]
    )
    assert complaints([with_option(verb, "--target", str(tmp_path / "other"))], world) == []
    assert torch.is_grad_enabled()


def test_the_commands_that_cases_are_made_of_work(world):
    for verb in ("features", "push", "show"):
        assert run([verb, *put(COMMANDS[verb], world)]) == 0
