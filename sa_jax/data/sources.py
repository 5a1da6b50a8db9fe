"""Rows of prompts and answers from a JSON, JSONL, CSV or Parquet file, or from a Hugging Face
`datasets` name.

Every row comes out as {"prompt", "response", "history", "source"}: the last user turn, its answer
("" when answers are not asked for), the turns before them, and the place it came from
("train.jsonl:12"), which error messages name.

Layouts that need no column mapping:
  messages              a list of {role, content}, ending with an assistant turn
  prompt, response      ours
  instruction, output   Alpaca's. Its answers were written for instruction + input, so a row with a
                        non-empty `input` is dropped (and counted) when its answer is used; when
                        only prompts are asked for, the instruction alone is the prompt and `input`
                        is ignored, as the study does with its teacher.
With a mapping, the columns named are used as they are.
"""

import csv
import dataclasses
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow
import pyarrow.parquet

from sa_jax.data.conversations import check_messages
from sa_jax.errors import UsageError, UserError

Row = dict  # {"prompt": str, "response": str, "history": list of messages, "source": str}
_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    rows: list[Row]
    path: str
    sha256: str | None  # of the file's bytes; of the builder's fingerprint for a hub name
    dropped: dict[str, int]  # rows left out, by reason

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def record(self) -> dict:
        return {
            "path": self.path,
            "sha256": self.sha256,
            "rows": len(self.rows),
            "dropped": self.dropped,
        }


def load_rows(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    responses: bool = True,
    split: str = "train",
) -> Source:
    """Reads every row of a file or of a hub dataset.

    Args:
      path: a .json (a list of objects), .jsonl, .csv or .parquet file, or a `datasets` name
        ("tatsu-lab/alpaca").
      columns: {"prompt": column, "response": column} or {"messages": column}; None finds one of the
        known layouts.
      responses: False reads prompts only (held-out prompts, questions for a teacher).
      split: which split of a hub dataset.

    Raises UserError naming file, line (row number where a file has no lines) and field, for
    malformed text, a missing file or column, a field that is not text, and a file without any
    usable row. Rows whose prompt or answer is empty are dropped and counted, as public datasets
    have some.
    """
    known = {"prompt", "response", "messages"}
    if columns is not None and not (columns and set(columns) <= known):
        raise UsageError(f"columns maps {sorted(columns)}; it can map prompt, response or messages")
    path = str(path)
    raw, digest = _read(path, split)
    rows, dropped, convert = [], Counter(), None
    for place, fields in raw:
        if not isinstance(fields, dict):
            raise UserError(
                f"{place}: expected an object with fields, found {type(fields).__name__}"
            )
        if convert is None:
            convert = _converter(
                columns or _layout(fields, responses, place), columns is None, responses
            )
        row = convert(fields, place)
        if isinstance(row, str):
            dropped[row] += 1
        else:
            rows.append(row)
    if convert is None:
        raise UserError(f"{path} holds no rows")
    if not rows:
        raise UserError(f"{path}: no row is usable; dropped: {dict(dropped)}")
    return Source(rows, path, digest, dict(sorted(dropped.items())))


def _layout(fields: dict, responses: bool, place: str) -> dict[str, str]:
    if "messages" in fields:
        return {"messages": "messages"}
    for prompt, response in (("prompt", "response"), ("instruction", "output")):
        if prompt in fields and (response in fields or not responses):
            return {"prompt": prompt, "response": response}
    raise UserError(
        f"{place}: no known layout (messages; prompt + response; instruction + output); the "
        "columns there are "
        f"{', '.join(map(str, fields)) or 'none'}; map them with --config.columns.prompt and "
        "--config.columns.response"
    )


def _converter(columns: Mapping[str, str], detected: bool, responses: bool):
    """Returns a function (fields, place) -> row, or the reason (a word) for which the row is
    dropped."""

    def text(fields: dict, column: str, place: str) -> str:
        if column not in fields:
            there = ", ".join(map(str, fields)) or "none"
            raise UserError(f"{place}: field {column!r} is missing; the fields there are {there}")
        if not isinstance(fields[column], str):
            raise UserError(
                f"{place}: field {column!r} is {type(fields[column]).__name__}, not text"
            )
        return fields[column]

    def from_messages(fields: dict, place: str):
        column = columns["messages"]
        if column not in fields:
            raise UserError(
                f"{place}: field {column!r} is missing; the fields there are "
                f"{', '.join(fields) or 'none'}"
            )
        messages = fields[column]
        check_messages(messages, place)
        messages = [
            {"role": message["role"], "content": message["content"]} for message in messages
        ]
        response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if response is None and responses:
            raise UserError(f"{place}: field {column!r} does not end with an assistant turn")
        if not messages or messages[-1]["role"] != "user":
            raise UserError(f"{place}: field {column!r} has no user turn before the answer")
        prompt = messages.pop()["content"]
        return finish(prompt, response if responses else "", messages, place)

    def from_columns(fields: dict, place: str):
        prompt = text(fields, columns["prompt"], place)
        response = text(fields, columns["response"], place) if responses else ""
        if detected and responses and columns["prompt"] == "instruction" and fields.get("input"):
            return "with_input"
        return finish(prompt, response, [], place)

    def finish(prompt: str, response: str, history: list, place: str):
        if not prompt.strip():
            return "empty_prompt"
        if responses and not response.strip():
            return "empty_response"
        return {"prompt": prompt, "response": response, "history": history, "source": place}

    if "messages" in columns:
        return from_messages
    needed = {"prompt", "response"} if responses else {"prompt"}
    if not needed <= set(columns):
        raise UsageError(f"columns must name {' and '.join(sorted(needed - set(columns)))} too")
    return from_columns


def _read(path: str, split: str) -> tuple[Iterator[tuple[str, object]], str | None]:
    """(place, fields) of every row, and the digest of the data."""
    file = Path(path)
    suffix = file.suffix.lower()
    if not file.exists() and suffix not in _SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return _read_hub(path, split)
    if not file.is_file():
        raise UserError(f"no such file: {path}")
    if suffix not in _SUFFIXES:
        raise UserError(
            f"{path}: cannot read {suffix or 'a file without suffix'}; use {', '.join(_SUFFIXES)}"
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not content.strip():
        raise UserError(f"{path} is empty")
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}.get(suffix)
    rows = reader(path, content) if reader else _read_parquet(path)
    return rows, hashlib.sha256(content).hexdigest()


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (byte 0x{content[error.start]:02x} at {error.start})"
        ) from error


def _read_jsonl(path: str, content: bytes) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(_decode(line, place))
        except ValueError as error:
            raise UserError(f"{place}: not valid JSON: {error}") from error


def _read_json(path: str, content: bytes) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(_decode(content.removeprefix(b"\xef\xbb\xbf"), path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of objects; for one object a line, name the file .jsonl"
        )
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path: str, content: bytes) -> Iterator[tuple[str, object]]:
    """With the csv module, which knows line numbers and leaves an answer such as "None" or "4" the
    text it is."""
    csv.field_size_limit(2**31 - 1)
    text = _decode(content.removeprefix(b"\xef\xbb\xbf"), path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            line, place = reader.line_num, f"{path}:{reader.line_num}"
            if None in fields or None in fields.values():
                raise UserError(
                    f"{place}: this row does not have the {len(reader.fieldnames)} fields of the "
                    f"header ({', '.join(reader.fieldnames)})"
                )
            yield place, fields
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV after line {line}: {error}") from error


def _read_parquet(path: str) -> Iterator[tuple[str, object]]:
    """With pyarrow, which `datasets` itself reads it with, but without an Arrow copy in a cache."""
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {_first_line(error)}") from error
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _read_hub(name: str, split: str) -> tuple[Iterator[tuple[str, object]], str | None]:
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, a wrong name, a wrong split: each its own kind
        raise UserError(
            f"{name} is neither a file here nor a dataset that can be loaded (split {split!r}): "
            f"{_first_line(error)}"
        ) from error
    rows = ((f"{name}[{split}] row {number}", row) for number, row in enumerate(table, start=1))
    return rows, table._fingerprint


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
