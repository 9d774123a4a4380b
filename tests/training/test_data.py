import contextlib
import csv
import gzip
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from samples import write_lines

from safespec_hf import SafeSpecError
from safespec_hf.training.data import DataError, load_examples

ROW = {"prompt": "When to prune roses?", "response": "In late winter.", "label": 0}


def test_json_lines_are_read(tmp_path):
    (example,) = load_examples([write_lines(tmp_path / "garden.jsonl", [ROW])])
    assert (example.response, example.label, example.group) == ("In late winter.", 0, "When to prune roses?")


def test_parquet_csv_and_datasets_give_the_same_examples(tmp_path):
    expected = load_examples([write_lines(tmp_path / "garden.jsonl", [ROW])])[0]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "garden.parquet")
    with open(tmp_path / "garden.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerow(ROW)
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "garden")
    for name in ("garden.parquet", "garden.csv", "garden"):
        (found,) = load_examples([tmp_path / name])
        assert (found.messages, found.response, found.label) == (expected.messages, expected.response, expected.label)


def test_what_is_written_is_read_back(tmp_path, examples):
    assert load_examples([write_lines(tmp_path / "x.jsonl", [e.to_json() for e in examples])]) == examples


def test_rows_without_a_label_get_the_one_of_the_file(tmp_path):
    row = {name: value for name, value in ROW.items() if name != "label"}
    assert load_examples([write_lines(tmp_path / "x.jsonl", [row])], label=1)[0].label == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"label": 2}, "label"),
        ({"label": None}, "label"),
        ({"response": "  "}, "response"),
        ({"response": None}, "response"),
        ({"prompt": ""}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"weight": 0}, "weight"),
        ({"weight": "much"}, "weight"),
        ({"unsafe_from": -1}, "unsafe_from"),
        ({"unsafe_from": 1.5}, "unsafe_from"),
        ({"unsafe_from": float("nan")}, "unsafe_from"),
        ({"unsafe_from": 16}, "unsafe_from"),
        ({"unsafe_from": 15, "label": 1}, "unsafe_from"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"weight": -1}, "weight"),
        ({"weight": True}, "weight"),
        ({"weight": 10**400}, "weight"),
        ({"weight": [1]}, "weight"),
        ({"label": [0]}, "label"),
        ({"label": {"is": 0}}, "label"),
        ({"label": True}, "label"),
        ({"label": 0.5}, "label"),
        ({"label": float("nan")}, "label"),
        ({"label": "harmful"}, "label"),
        ({"response": ["In winter."]}, "response"),
        ({"response": "In \ud800 winter."}, "response"),
        ({"prompt": "When\udfff?"}, "prompt"),
        ({"prompt": [{"role": "user", "content": "When?"}]}, "prompt"),
        ({"id": ["a"]}, "id"),
        ({"group": {"a": 1}}, "group"),
        ({"source": "\ud800"}, "source"),
        ({"messages": "When to prune roses?"}, "messages"),
        ({"messages": "[" * 100_000}, "messages"),
        ({"messages": {"role": "user", "content": "When?"}}, "messages"),
        ({"messages": ["When?"]}, "messages"),
        ({"messages": [{"content": "When?"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": ["When?"]}]}, "messages"),
        ({"messages": [{"role": "gardener", "content": "When?"}]}, "messages"),
        ({"messages": [{"role": ["user"], "content": "When?"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}]}, "messages"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, field):
    path = write_lines(tmp_path / "x.jsonl", [ROW | {"id": "1"}, ROW | change])
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2, field `{field}`"):
        load_examples([path])


@pytest.mark.parametrize(
    ("label", "expected"),
    [(0, 0), (1, 1), ("0", 0), ("1 ", 1), (1.0, 1), ("1.0", 1), ("Safe", 0), (" UNSAFE", 1)],
)
def test_a_label_is_read_however_a_table_writes_it(tmp_path, label, expected):
    assert load_examples([write_lines(tmp_path / "x.jsonl", [ROW | {"label": label}])])[0].label == expected


def test_fields_without_a_value_are_as_if_they_were_not_there(tmp_path):
    empty = dict.fromkeys(["messages", "weight", "unsafe_from", "id", "group", "source", "category"])
    path = tmp_path / "x.jsonl"
    assert load_examples([write_lines(path, [ROW | empty])]) == load_examples([write_lines(path, [ROW])])


def test_a_name_that_is_a_number_is_kept_even_if_it_is_0(tmp_path):
    (example,) = load_examples([write_lines(tmp_path / "x.jsonl", [ROW | {"id": 0, "group": 0, "category": 3}])])
    assert (example.id, example.group, example.category) == ("0", "0", "3")


def test_messages_may_be_json_in_a_table(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When?"}]
    (example,) = load_examples([write_lines(tmp_path / "x.jsonl", [ROW | {"messages": json.dumps(messages)}])])
    assert example.messages == tuple(messages)


VALUES = [
    None,
    True,
    0,
    1,
    -1,
    0.5,
    10**400,
    float("nan"),
    "",
    "  ",
    "safe",
    "\ud800",
    [],
    [0],
    {},
    {"a": [1]},
    "[" * 9999,
]
VALUES += [[{"role": "user"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": "x"}], "[1]", "null"]


@pytest.mark.parametrize("seed", range(300))
def test_whatever_is_in_a_file_is_read_or_refused(tmp_path, seed):
    draw = random.Random(seed)
    rows = [ROW | {"prompt": f"When {n}?", "weight": 1, "unsafe_from": 0, "id": n} for n in range(4)]
    for _ in range(draw.randint(1, 3)):
        field = draw.choice(
            ["prompt", "messages", "response", "label", "weight", "unsafe_from", "id", "group", "source"]
        )
        draw.choice(rows)[field] = draw.choice(VALUES)
    content = bytearray("".join(json.dumps(row) + "\n" for row in rows).encode(draw.choice(["utf-8", "utf-16"])))
    for _ in range(draw.choice([0, 0, 1, 20])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path = tmp_path / draw.choice(["x.jsonl", "x.csv", "x.parquet", "x.json"])
    path.write_bytes(draw.choice([bytes, gzip.compress, lambda whole: whole[: len(whole) // 2]])(bytes(content)))
    with contextlib.suppress(SafeSpecError):
        examples = load_examples([path], needs_response=draw.random() < 0.7)
        assert all(example.to_json().encode() for example in examples)


def test_a_line_that_is_no_json_is_named(tmp_path):
    with pytest.raises(DataError, match="line 2"):
        load_examples([write_lines(tmp_path / "x.jsonl", [ROW, "{oops"])])


def test_ids_must_be_unique(tmp_path):
    with pytest.raises(DataError, match="occurs twice"):
        load_examples([write_lines(tmp_path / "x.jsonl", [ROW | {"id": "a"}, ROW | {"id": "a"}])])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_examples([tmp_path / "nowhere.jsonl"])


def test_prompts_need_no_answer(tmp_path):
    (example,) = load_examples([write_lines(tmp_path / "x.jsonl", [{"prompt": "Hello"}])], needs_response=False)
    assert example.response == ""
