import csv

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from samples import write_lines

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
    ],
)
def test_errors_name_file_line_and_field(tmp_path, change, field):
    path = write_lines(tmp_path / "x.jsonl", [ROW | {"id": "1"}, ROW | change])
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2, field `{field}`"):
        load_examples([path])


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
