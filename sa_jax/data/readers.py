"""Rows of files, folders and hub datasets as they are: fields of any names, and their places."""

import contextlib
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow.parquet

from sa_jax.buckets import as_path, in_bucket
from sa_jax.errors import UserError
from sa_jax.files import parse_json
from sa_jax.text import first_line

Places = Iterator[tuple[str, object]]  # (place, fields) of every row

_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w.\[\]:%+-]+))?")
_JSON_REMEDY = "for one object a line, name the file .jsonl"


def read_rows(path: str) -> tuple[Places, str | None]:
    """The rows, and the digest of a file."""
    file = as_path(path)
    suffix = file.suffix.lower()
    hub_name = _HUB_NAME.fullmatch(path)
    if not file.exists() and suffix not in _SUFFIXES and hub_name:
        return _read_hub(*hub_name.groups()), None
    marks = (file / name for name in ("state.json", "dataset_dict.json"))
    if not in_bucket(path) and any(mark.is_file() for mark in marks):
        return _read_saved(path), None
    if suffix == ".arrow":
        raise UserError(f"{path} is a part of a `save_to_disk` folder; name the folder")
    if file.is_dir():
        raise UserError(f"{path} is a folder; name a file in it ({', '.join(_SUFFIXES)})")
    if not file.is_file():
        raise UserError(f"no such file: {path}; give {', '.join(_SUFFIXES)} or a `datasets` name")
    if suffix not in _SUFFIXES:
        raise UserError(
            f"{path}: cannot read {suffix or 'a file without suffix'}; use {', '.join(_SUFFIXES)}"
        )
    with _explained(f"cannot read {path}"):
        content = file.read_bytes()
    if not content.strip():
        raise UserError(f"{path} is empty")
    readers = {".jsonl": read_jsonl, ".json": _read_json, ".csv": _read_csv}
    rows = readers.get(suffix, _read_parquet)(path, content)
    return rows, hashlib.sha256(content).hexdigest()


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}); save the "
            "file as UTF-8"
        ) from error


def parse_texts(content: bytes, place: str) -> Any:
    """Parses a JSON value. ValueError if it is not valid, or has half a surrogate pair: JSON can
    spell it, but no file and no tokenizer takes it."""
    value = parse_json(_decode(content, place))
    if b"\\u" in content:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"a text holds half a surrogate pair, {half!r}") from None
    return value


def read_jsonl(path: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """(place, value) of every line of the file that is not blank."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, parse_texts(line, place)
        except ValueError as error:
            is_list = line.lstrip().startswith(b"[")
            remedy = "; for one list of objects, name the file .json" if is_list else ""
            raise UserError(f"{place}: not valid JSON: {error}{remedy}") from error


def _read_json(path: str, content: bytes) -> Places:
    try:
        rows = parse_texts(content.removeprefix(b"\xef\xbb\xbf"), path)
    except ValueError as error:
        remedy = f"; {_JSON_REMEDY}" if getattr(error, "msg", "") == "Extra data" else ""
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: not valid JSON: {error}{remedy}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects; {_JSON_REMEDY}")
    return _numbered(path, rows)


def _read_csv(path: str, content: bytes) -> Places:
    """Reads with the csv module, which has line numbers and keeps "None" or "4" as text."""
    csv.field_size_limit(2**31 - 1)
    text = _decode(content.removeprefix(b"\xef\xbb\xbf"), path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = reader.fieldnames or ()
        for name, count in Counter(header).items():
            if name and count > 1:  # a spreadsheet may leave several without a name
                raise UserError(f"{path}: {count} columns are named {name!r}; keep one")
        for fields in reader:
            line, place = reader.line_num, f"{path}:{reader.line_num}"
            if None in fields or None in fields.values():
                raise UserError(
                    f"{place}: this row does not have the {len(header)} fields of the header "
                    f"({', '.join(header)})"
                )
            yield place, fields
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV after line {line}: {error}") from error


def _read_parquet(path: str, content: bytes) -> Places:
    """Reads with pyarrow, as `datasets` does, but without an Arrow copy in a cache."""
    with _explained(f"{path} is not a readable parquet file"):
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        return _numbered(path, table.to_pylist())


def _read_saved(path: str) -> Places:
    """Reads a folder that save_to_disk of `datasets` wrote; if it has splits, the split train."""
    import datasets

    with _explained(f"{path} is no readable save_to_disk folder"):
        table = datasets.load_from_disk(path)
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            splits = ", ".join(f"{path}/{split}" for split in table)
            raise UserError(f"{path} has no split 'train'; name the folder of a split: {splits}")
        table = table["train"]
    return _numbered(path, table)


def _read_hub(name: str, subset: str | None, split: str | None) -> Places:
    import datasets

    split = split or "train"
    which = f"(split {split!r}{f', subset {subset!r}' if subset else ''})"
    with _explained(f"{name} is neither a local file nor a dataset that can be loaded {which}"):
        table = datasets.load_dataset(name, subset, split=split)
    return _numbered(f"{name}[{split}]", table)


@contextlib.contextmanager
def _explained(problem: str) -> Iterator[None]:
    """For what fails in many ways, each its own kind: network, wrong name, damaged file."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {first_line(error)}") from error


def _numbered(path: str, rows: Iterable[object]) -> Places:
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))
