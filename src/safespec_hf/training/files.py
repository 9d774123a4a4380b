"""Files in and out: rows of data whatever wrote them, and output paths that are tried before the work."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants

from ..errors import SafeSpecError
from ..heads.loading import is_hub_reachable

# UTF-32 before UTF-16: one's mark begins like the other's.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}
SUFFIXES = (".gz", ".jsonl", ".ndjson", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>.+))?")
MAX_FIELD_CHARS = 2**31 - 1  # csv's own limit, 131,072, is less than a long answer


class DataError(SafeSpecError):
    """A row that can't be used; names the file, the line (or row) and the field."""

    def __init__(self, path: str, line: int, field: str, problem: str, unit: str = "line"):
        super().__init__(f"{path}, {unit} {line}, field `{field}`: {problem}")


class DataFileError(SafeSpecError):
    """A file that can't be read as data; names the file and what to do."""

    def __init__(self, path: str, problem: str):
        super().__init__(f"{path}: {problem}")


class RawRow(NamedTuple):
    """A row as it is in a file, without its empty fields.

    Attributes:
        values (`Mapping[str, Any]`): By field.
        path (`str`), number (`int`), unit (`str`): Where it is: the file, and a `"line"` or a `"row"` from 1 on.
    """

    values: Mapping[str, Any]
    path: str
    number: int
    unit: str = "line"

    def error(self, field: str, problem: str) -> DataError:
        """What to raise about a field of this row."""
        return DataError(self.path, self.number, field, problem, self.unit)


def read_rows(path: str) -> Iterator[RawRow]:
    """The rows of JSON lines, a JSON array, CSV or Parquet, gzipped or not, of a `datasets` folder, or from the Hub.

    Raises:
        DataError: If a row can't be told; names its place.
        DataFileError: If it is none of these, or damaged.
        FileNotFoundError: If a path is neither a file, nor a folder, nor looks like a Hub id.
    """
    if os.path.isdir(path):
        yield from _read_folder(path)
    elif os.path.exists(path):
        yield from _read_file(path)
    elif HUB_ID.fullmatch(path) and not path.lower().endswith(SUFFIXES):
        yield from _read_from_hub(path)
    else:
        raise FileNotFoundError(f"{path} is not a file, nor a folder, nor a data set's id on the Hub (`owner/name`).")


def read_own_rows(path: str | os.PathLike[str]) -> Iterator[RawRow]:
    """The rows of JSON lines that are appended to, with their empty fields. Blank lines, and a last one that a kill
    left incomplete, are passed over.

    Raises:
        DataError: If a line is no JSON object; names its place.
    """
    content = Path(path).read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        if line.strip():
            row = _check_object(_load_json(line, str(path), number), str(path), number)
            yield RawRow(row, str(path), number)


def decode_text(content: bytes, path: str) -> str:
    """The text of a file: UTF-8, or what its byte order mark says. Nothing is guessed.

    Args:
        content (`bytes`): The file's; compressed by gzip or not.
        path (`str`): Its name, for errors.

    Raises:
        DataFileError: If it is no text; names the first bad byte and how to convert the file.

    Example:

        >>> decode_text("a rose".encode("utf-16"), "garden.jsonl")
        'a rose'
    """
    if content.startswith(GZIP):
        content = _unzip(content, path)
    archive = next((name for magic, name in ARCHIVES.items() if content.startswith(magic)), None)
    if archive:
        raise DataFileError(
            path, f"a {archive} file, which isn't read; unpack it first. Of packed files gzip is read."
        )
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise DataFileError(path, f"line {line} has a NUL byte: this is no text, or UTF-16 without a byte order mark.")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataFileError(
            path,
            f"line {line}, byte {error.start}: 0x{content[error.start]:02x} is not {encoding.upper()} text. If it "
            f"is in another encoding, convert the file: `iconv -f latin1 -t utf-8 {Path(path).name} > utf8.txt`.",
        ) from error


def hash_file(path: str | os.PathLike[str]) -> str:
    """16 hex digits of a file's content, for provenance."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def distinct_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The end of each path, no longer than it takes to tell it from the others.

    Example:

        >>> distinct_names(["a/train.csv", "b/train.csv", "b/test.csv"])
        ['a/train.csv', 'b/train.csv', 'test.csv']
    """
    parts = {str(path): Path(os.path.abspath(path)).parts for path in paths}

    def name(path: str) -> str:
        own, others = parts[path], {other for other in parts.values() if other != parts[path]}
        lengths = range(1, len(own))
        length = next((n for n in lengths if own[-n:] not in {other[-n:] for other in others}), len(own))
        return "/".join(own[-length:])

    return [name(str(path)) for path in paths]


def check_writable_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder, unless it is there, and tries to write into it.

    Raises:
        SafeSpecError: If that fails; to be called before the work whose results go there.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SafeSpecError(
            f"{path} is no folder that can be written to ({error.strerror}). Give another one."
        ) from error


def check_writable_file(path: str | os.PathLike[str]) -> None:
    """Makes a file's folder, unless it is there, and tries to write there. A file that is there stays as it is.

    Raises:
        SafeSpecError: If that fails; to be called before the work whose results go there.
    """
    check_writable_folder(Path(path).parent)
    if not os.path.exists(path):
        return
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise SafeSpecError(
            f"{path} is no file that can be written to ({error.strerror}). Give another one."
        ) from error


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file that is there as a whole or not at all, whatever is killed when.

    Example:

        >>> import os, tempfile
        >>> from safespec_hf.training.files import write_whole
        >>> folder = tempfile.mkdtemp()
        >>> write_whole(f"{folder}/garden.txt", "roses")
        >>> os.listdir(folder)
        ['garden.txt']
    """
    file = Path(path)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _read_file(path: str) -> Iterator[RawRow]:
    content = Path(path).read_bytes()
    if content.startswith(PARQUET) or path.lower().endswith(".parquet"):
        yield from _read_parquet(path)
        return
    text = decode_text(content, path)
    if path.lower().removesuffix(".gz").endswith(".csv"):
        yield from _read_csv(text, path)
    elif text.lstrip().startswith("["):
        rows = _load_json(text, path, 1)
        yield from (_to_row(row, path, number, "row") for number, row in enumerate(rows, start=1))
    else:
        for number, line in enumerate(io.StringIO(text, newline=None), start=1):
            if line.strip():
                yield _to_row(_load_json(line, path, number), path, number)


def _load_json(text: str | bytes, path: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError
        raise DataError(path, number, "*", f"not JSON: {error}. A row is one object on one line.") from error


def _check_object(row: Any, path: str, number: int, unit: str = "line") -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(path, number, "*", f"expected an object, got {type(row).__name__}", unit)
    return row


def _to_row(row: Any, path: str, number: int, unit: str = "line") -> RawRow:
    row = _check_object(row, path, number, unit)
    return RawRow({name: value for name, value in row.items() if value is not None}, path, number, unit)


def _read_csv(text: str, path: str) -> Iterator[RawRow]:
    limit = csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next((cells for cells in reader if cells), [])
        # without a name may be one column, as of row numbers
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(path, 1, twice[0], f"{header.count(twice[0])} columns have this name")
        for cells in reader:
            if cells and len(cells) != len(header):
                problem = f"{len(cells)} cells, but the header has {len(header)}; quote cells that have commas in them"
                raise DataError(path, reader.line_num, "*", problem)
            if cells:
                values = {name: cell for name, cell in zip(header, cells, strict=True) if cell != ""}
                yield RawRow(values, path, reader.line_num)
    except csv.Error as error:
        raise DataError(path, reader.line_num, "*", f"not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: str) -> Iterator[RawRow]:
    parquet, arrow = _import("pyarrow.parquet"), _import("pyarrow")
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataFileError(path, f"not a whole Parquet file ({error})") from error
    yield from (_to_row(row, path, number, "row") for number, row in enumerate(rows, start=1))


def _read_folder(path: str) -> Iterator[RawRow]:
    datasets = _import("datasets")
    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, _import("pyarrow").ArrowException) as error:
        raise DataFileError(
            path, "a folder, but no whole one that `datasets.save_to_disk` wrote; give the files in it."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        splits = ", ".join(os.path.join(path, name) for name in data)
        raise DataFileError(path, f"has several splits; give those that you mean: {splits}.")
    yield from (_to_row(row, path, number, "row") for number, row in enumerate(data, start=1))


def _read_from_hub(path: str) -> Iterator[RawRow]:
    datasets = _import("datasets")
    address = HUB_ID.fullmatch(path)
    assert address is not None  # the caller has looked
    name, config, split = address["name"], address["config"], address["split"]
    if not (constants.HF_HUB_OFFLINE or is_hub_reachable()):
        # asked first: without a network, `datasets` would try for half a minute
        raise DataFileError(
            path,
            f"no such file or folder. It looks like the id of a data set, but {constants.ENDPOINT} can't be reached; "
            "what was loaded before is found with HF_HUB_OFFLINE=1.",
        )
    try:
        data = datasets.load_dataset(name, config, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataFileError(
            path, f"no such file or folder, and no data set that could be loaded ({type(error).__name__}: {error})"
        ) from error
    yield from (_to_row(row, path, number, "row") for number, row in enumerate(data, start=1))


def _unzip(content: bytes, path: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(path, f"a gzip file that is damaged or cut off ({error})") from error


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SafeSpecError(
            f'This kind of data needs {error.name}, which is not installed: pip install "safespec-hf[data]"'
        ) from error
