"""Rows of files, folders and hub datasets as they are: fields of any names, and their places."""

import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from sa_jax.buckets import as_path, in_bucket
from sa_jax.errors import UserError
from sa_jax.files import parse_json
from sa_jax.text import first_few, first_line

Places = Iterator[tuple[str, object]]  # (place, fields) of every row

_KINDS = ".json, .jsonl, .csv, .tsv, the same with .gz, .parquet"
_SUFFIX = re.compile(r"\.(?:(json|jsonl|csv|tsv)(\.gz)?|parquet)$", re.IGNORECASE)
# What follows the split in the name of a Parquet file: -00000-of-00003, -7; also with a digest.
_NUMBER = re.compile(r"(?:^|[-_.])\d+(?:-of-(\d+))?(?:-[0-9a-f-]{16,}.*)?$")
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w.\[\]:%+-]+))?")
_JSON_REMEDY = "for one object a line, name the file .jsonl"


def read_rows(path: str) -> tuple[Places, str | None]:
    """The rows, which are parsed when they are asked for, and the digest of the files; None for a
    saved folder and a hub dataset."""
    folder, split = _folder(path)
    if is_saved(path):
        return _read_saved(folder, split), None
    files = data_files(path)
    if folder and not files:
        raise UserError(f"{folder} is a folder; name a file in it ({_KINDS})")
    if not files and (hub_name := _hub_name(path)):
        return _read_hub(*hub_name.groups()), None
    if not files:
        raise UserError(f"no such file: {path}; give {_KINDS} or a `datasets` name")
    if path.endswith(".arrow"):
        raise UserError(f"{path} is a part of a `save_to_disk` folder; name the folder")
    if not (match := _SUFFIX.search(files[0])):
        suffix = "".join(Path(path).suffixes[-2:])
        raise UserError(f"{path}: cannot read {suffix or 'a file without suffix'}; use {_KINDS}")
    kind, zipped = (part and part.lower() for part in match.groups())
    usual = "\t" if kind == "tsv" else ","
    readers = {"jsonl": read_jsonl, "json": _read_json, None: _read_parquet}
    reader = readers.get(kind, functools.partial(_read_csv, usual=usual))
    digest = hashlib.sha256()
    parts = []
    for file in files:
        with _explained(f"cannot read {file}"):
            content = as_path(file).read_bytes()
        digest.update(content)
        if zipped:
            with _explained(f"{file} is damaged or not gzip; copy it again"):
                content = gzip.decompress(content)
        if not content.strip():
            raise UserError(f"{file} is empty")
        parts.append(reader(file, content))
    return itertools.chain.from_iterable(parts), digest.hexdigest()


def data_files(path: str) -> list[str]:
    """The file of that name, or the Parquet files of FOLDER or FOLDER@SPLIT in order; none for any
    other name. UserError if it is not clear which are meant, or one is not there."""
    if as_path(path).is_file():
        return [path]
    folder, split = _folder(path)
    place = as_path(folder)
    found = folder and (sorted(place.glob("*.parquet")) or sorted(place.glob("*/*.parquet")))
    if not found:
        return []
    splits: dict[str, list[str]] = {}
    for file in found:
        splits.setdefault(_NUMBER.sub("", file.stem) or "unnamed", []).append(os.fspath(file))
    if len(folders := dict.fromkeys(os.fspath(file.parent) for file in found)) > 1:
        raise UserError(f"{folder}: name one of its folders: {first_few([*folders], 8)}")
    if not split and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        names = [f"{folder}@{name}" for name in splits]
        raise UserError(f"{folder}: name one of its splits: {first_few(names, 8)}")
    files = splits[split]
    counts = {m[1] for file in files if (m := _NUMBER.search(Path(file).stem)) and m[1]}
    if counts and {int(count) for count in counts} != {len(files)}:
        raise UserError(
            f"{folder} has {len(files)} files of the split {split!r}, but {files[0]} is one of "
            f"{int(min(counts))}; download them again"
        )
    return files


def is_saved(path: str) -> bool:
    """Whether it is a folder that `save_to_disk` of `datasets` wrote, or a split of one."""
    folder = _folder(path)[0]
    marks = (Path(folder, name) for name in ("state.json", "dataset_dict.json"))
    return bool(folder) and not in_bucket(folder) and any(mark.is_file() for mark in marks)


def is_missing(path: str) -> bool:
    """Whether there is no file or folder of that name, and it cannot be one of the hub."""
    return not (as_path(path).exists() or _folder(path)[0] or _hub_name(path))


def _folder(path: str) -> tuple[str, str]:
    """The folder and split of FOLDER and FOLDER@SPLIT; ('', '') if the folder is not there."""
    for folder, _, split in ((path, "", ""), path.rpartition("@")):
        if folder and as_path(folder).is_dir():
            return folder, split
    return "", ""


def _hub_name(path: str) -> re.Match | None:
    return None if _SUFFIX.search(path) else _HUB_NAME.fullmatch(path)


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
    yield from _numbered(path, rows)


def _read_csv(path: str, content: bytes, usual: str) -> Places:
    """Reads with the csv module, which has line numbers and keeps "None" or "4" as text. A header
    without the usual delimiter may have another: spreadsheets write `;` where `,` is for decimals.
    A wrong guess gives no wrong rows, because each must have as many fields as the header."""
    csv.field_size_limit(2**31 - 1)
    text = _decode(content.removeprefix(b"\xef\xbb\xbf"), path)
    unquoted = re.sub('"[^"]*"', "", text.partition("\n")[0])
    delimiter = next((mark for mark in f"{usual};\t," if mark in unquoted), usual)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    yield from _numbered(path, rows)


def _read_saved(folder: str, split: str) -> Places:
    """Reads a folder that save_to_disk of `datasets` wrote; if it has splits, train by default."""
    import datasets

    with _explained(f"{folder} is no readable save_to_disk folder"):
        table = datasets.load_from_disk(folder)
    if isinstance(table, datasets.DatasetDict):
        if (split or "train") not in table:
            splits = ", ".join(f"{folder}/{name}" for name in table)
            raise UserError(
                f"{folder} has no split {split or 'train'!r}; name the folder of a split: {splits}"
            )
        table = table[split or "train"]
    elif split:
        raise UserError(f"{folder} has no splits; leave out @{split}")
    return _numbered(f"{folder}@{split}" if split else folder, table)


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
