import codecs
import gzip
import io
import json
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from samples import write_lines

from safespec_hf import SafeSpecError
from safespec_hf.training import files
from safespec_hf.training.data import DataError, load_examples
from safespec_hf.training.files import check_writable_file, check_writable_folder, decode_text, distinct_names

ROW = {"prompt": "Wann schneidet man Röschen?", "response": "Im späten Winter 🌹.", "label": 0}
JSON_LINE = json.dumps(ROW, ensure_ascii=False) + "\n"
CSV = "prompt,response,label\n" + ",".join(str(value) for value in ROW.values()) + "\n"


def read_one(path):
    (example,) = load_examples([path])
    return {"prompt": example.messages[0]["content"], "response": example.response, "label": example.label}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(("name", "text"), [("x.jsonl", JSON_LINE), ("x.csv", CSV), ("x.jsonl.gz", JSON_LINE)])
def test_text_is_read_whatever_wrote_it(tmp_path, encoding, pack, name, text):
    (tmp_path / name).write_bytes(pack(text.encode(encoding)))
    assert read_one(tmp_path / name) == ROW


@pytest.mark.parametrize("name", ["x.csv.gz", "x.CSV"])
def test_the_ending_tells_csv_with_and_without_gzip(tmp_path, name):
    (tmp_path / name).write_bytes(CSV.encode())
    assert read_one(tmp_path / name) == ROW


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_both_byte_orders_are_read(mark):
    encoding = "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"
    assert decode_text(mark + "Röschen".encode(encoding), "x") == "Röschen"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ((JSON_LINE + JSON_LINE).replace("🌹", "").encode("latin-1"), "line 1, byte 32: 0xf6 is not UTF-8.*iconv"),
        (JSON_LINE.encode("utf-16-le"), "NUL byte: this is no text, or UTF-16 without"),
        (JSON_LINE.encode()[:10] + b"\0", "line 1 has a NUL byte"),
        (gzip.compress(JSON_LINE.encode(), mtime=0)[:-9], "gzip file that is damaged or cut off"),
        (b"PK\x03\x04 and more", "a zip file"),
        (b"BZh91AY", "a bzip2 file"),
        (codecs.BOM_UTF16_LE + b"a", "UTF-16"),
        (b"", "No rows"),
        (b"\n\n", "No rows"),
        (b"\x89PNG\r\n\x1a\n", "byte 0: 0x89 is not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "y"])
def test_what_is_no_text_is_refused_with_the_file_and_the_remedy(tmp_path, content, said, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SafeSpecError, match=said) as caught:
        load_examples([tmp_path / name])
    assert name in str(caught.value)


def test_a_zip_file_is_refused_under_any_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.jsonl", "w") as archive:
        archive.writestr("x.jsonl", JSON_LINE)
    with pytest.raises(SafeSpecError, match="zip"):
        load_examples([tmp_path / "x.jsonl"])


def test_long_fields_are_read_and_the_limit_of_csv_is_as_before(tmp_path):
    limit, long = files.csv.field_size_limit(), "rose " * 40_000
    (tmp_path / "x.csv").write_text(f"prompt,response,label\nWhich?,{long},0\n")
    assert read_one(tmp_path / "x.csv")["response"] == long
    assert files.csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,prompt,label\na,b,0\n", "line 1, field `prompt`: 2 columns"),
        ("prompt,response,label\na,b,0\na,b,c,0\n", "line 3, field `\\*`: 4 cells, but the header has 3"),
        ("prompt,response,label\na,b\n", "line 2, field `\\*`: 2 cells"),
        ("question,response,label\na,b,0\n", "line 2, field `prompt`"),
        ('prompt,response,label\na,"b,0\n', "not CSV"),
        ("prompt;response;label\na;b;0\n", "field `prompt`"),
        ("prompt,response,label\n", "No rows"),
    ],
)
def test_a_broken_table_is_refused_with_the_line(tmp_path, text, said):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(SafeSpecError, match=said):
        load_examples([tmp_path / "x.csv"])


def test_a_json_array_is_read_like_lines(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([ROW, ROW | {"prompt": "Wo?"}], indent=2))
    assert [example.id for example in load_examples([tmp_path / "x.json"])] == ["x:1", "x:2"]
    (tmp_path / "x.json").write_text(json.dumps([ROW, 3], indent=2))
    with pytest.raises(DataError, match="row 2"):
        load_examples([tmp_path / "x.json"])


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5_000, '{"a": 1}{}', "{\n", "nul", '"text"'])
def test_lines_that_are_no_objects_are_named(tmp_path, line):
    with pytest.raises(DataError, match=r"x\.jsonl, (line|row) 1"):
        load_examples([write_lines(tmp_path / "x.jsonl", [line])])


def test_parquet_is_told_by_its_content_and_refused_if_damaged(tmp_path):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), buffer)
    (tmp_path / "x.data").write_bytes(buffer.getvalue())
    assert read_one(tmp_path / "x.data") == ROW
    for content in (buffer.getvalue()[:-20], b"PAR1", b"no"):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(SafeSpecError, match=r"x\.parquet: not a whole Parquet file"):
            load_examples([tmp_path / "x.parquet"])


@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], b"raw", 3.5])
def test_nested_columns_of_parquet_are_refused_with_row_and_field(tmp_path, value):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW | {"response": value}]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 1, field `response`"):
        load_examples([tmp_path / "x.parquet"])


def test_a_folder_that_is_no_data_set_says_what_to_give(tmp_path):
    with pytest.raises(SafeSpecError, match="give the files in it"):
        load_examples([tmp_path])
    split = datasets.Dataset.from_list([ROW])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(SafeSpecError, match=r"several splits.*both/train"):
        load_examples([tmp_path / "both"])
    assert read_one(tmp_path / "both" / "test") == ROW


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    monkeypatch.setattr(files.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SafeSpecError, match=r"garden/roses-v1\.5:test: no such file.*can't be reached"):
        load_examples(["garden/roses-v1.5:test"])


def test_files_of_one_name_in_two_folders_have_rows_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "x.jsonl", [ROW])
    (tmp_path / "b" / "x.csv").write_text(CSV)
    found = load_examples([tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"])
    assert [(example.id, example.source) for example in found] == [("a/x:1", "a/x"), ("b/x:1", "b/x")]
    assert len({e.id for e in load_examples([tmp_path / "b" / "x.jsonl", tmp_path / "b" / "x.csv"])}) == 2
    with pytest.raises(DataError, match="occurs twice"):
        load_examples([tmp_path / "b" / "x.csv", tmp_path / "b" / "x.csv"])


def test_names_are_as_short_as_they_can_be():
    assert distinct_names(["/a/b/x", "/c/b/x", "/c/y", "/c/y"]) == ["a/b/x", "c/b/x", "y", "y"]


@pytest.mark.parametrize("check", [check_writable_folder, check_writable_file])
def test_an_output_path_is_made_or_refused(tmp_path, check):
    check(tmp_path / "new" / "out")
    (tmp_path / "file").write_text("as before")
    with pytest.raises(SafeSpecError, match="can be written to"):
        check(tmp_path / "file" / "below" / "out")
    with pytest.raises(SafeSpecError, match="can be written to"):
        check({check_writable_folder: tmp_path / "file", check_writable_file: tmp_path}[check])
    check_writable_file(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "as before"
    assert sorted(path.name for path in tmp_path.rglob("*")) in (["file", "new"], ["file", "new", "out"])
