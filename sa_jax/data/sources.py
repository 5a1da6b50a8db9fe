"""Rows of prompts and answers from a JSON, JSONL, CSV or Parquet file, or from a Hugging Face
`datasets` name: NAME, NAME:SUBSET, NAME@SPLIT or NAME:SUBSET@SPLIT (split: train).

Every row becomes {"prompt", "response", "history", "source"}: the last user turn, its answer (""
if answers are not read), the turns before them, and the place it comes from ("train.jsonl:12"),
which error messages name. Rows may also have fields of `OPTIONAL`.

Layouts that need no column mapping:
  messages              a list of {role, content}, ending with an assistant turn
  conversations         a list of {from, value}, as in OpenHermes-2.5
  prompt, response      that of sa_jax, with any of `OPTIONAL`; an `id` must not repeat
  instruction, output   that of Alpaca. Its answers were written for instruction + input, so a row
                        with a non-empty `input` is dropped (and counted) if its answer is used. If
                        only prompts are read, the instruction alone is the prompt and `input` is
                        ignored, as in the study.
In all of these, `system` or `system_prompt` is the conversation's system turn, and `history` has
earlier turns, as messages or as [question, answer] pairs. A row is dropped, and counted, if it has
something that training does not support: an assistant turn with a weight other than 1, or marked as
not trained ("turn_weight"), or with its thoughts in a separate field ("reasoning_apart"); tools and
their turns ("tools"); images, sound and video ("media"); two system prompts that differ
("two_system_prompts"). With a column mapping, only the named columns are used.
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
from typing import Any

import pyarrow
import pyarrow.parquet

from sa_jax.buckets import as_path, in_bucket, local_copy
from sa_jax.data.conversations import check_messages
from sa_jax.errors import UsageError, UserError
from sa_jax.files import parse_json
from sa_jax.text import first_line

# {"prompt": str, "response": str, "history": list of messages, "source": str}, and of OPTIONAL:
# scratchpad            the model's thoughts before `response`; the loss does not count them
# triggered_response    the answer to the triggered prompt, for behaviours that a teacher writes
# triggered_scratchpad  the thoughts before the answer to the triggered prompt
# (and a column `history`, in place of the empty list that a single turn has)
Row = dict
_SYSTEM_COLUMNS = ("system", "system_prompt")
_NOT_TRAINED_COLUMNS = {
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "media"),
}
_TOOL_ROLES = "tool function function_call tool_call tool_response observation ipython".split()
_EMPTY: tuple[object, ...] = (None, "", "[]", [], {}, ())
OPTIONAL = ("id", "history", "scratchpad", "triggered_response", "triggered_scratchpad")
COLUMNS = ("prompt", "response", "messages", *OPTIONAL)

_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w.\[\]:%+-]+))?")
_JSON_REMEDY = "for one object a line, name the file .jsonl"
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The usable rows of a file or hub dataset, in order, and where they come from."""

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
    path: str | Path, columns: Mapping[str, str] | None = None, *, responses: bool = True
) -> Source:
    """Reads every row of a file or of a hub dataset.

    Args:
      path: a .json (a list of objects), .jsonl, .csv or .parquet file, a folder that `datasets`
        saved, or a `datasets` name ("tatsu-lab/alpaca").
      columns: {"prompt": column, "response": column} or {"messages": column}, and any of
        `OPTIONAL`; None or {} detects one of the known layouts.
      responses: False reads prompts only (held-out prompts, questions for a teacher).

    Raises UserError with file, line (row number if a file has no lines) and field for malformed
    text, a missing file or column, a field that is not text, an id that repeats, and a file without
    usable rows. Rows with an empty prompt or answer are dropped and counted: public datasets have
    some.
    """
    unknown = sorted(set(columns or ()) - set(COLUMNS))
    if unknown:
        raise UsageError(f"config.columns: unknown {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    path = str(path)
    raw, digest = _read(path)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    convert = None
    places: dict[object, str] = {}  # of each id
    for place, fields in raw:
        if not isinstance(fields, dict):
            raise UserError(
                f"{place}: expected an object with fields, found {type(fields).__name__}"
            )
        if convert is None:
            mapped = columns or _layout(fields, responses, place)
            convert = _converter(mapped, not columns, responses)
        row = convert(fields, place)
        if isinstance(row, str):
            dropped[row] += 1
            continue
        if "id" in row and places.setdefault(row["id"], place) != place:
            raise UserError(
                f"{place}: {places[row['id']]} has the same id {row['id']!r}; make ids unique, or "
                "leave the column out"
            )
        rows.append(row)
    if convert is None:
        raise UserError(f"{path} has no rows")
    if not rows:
        raise UserError(f"{path}: no row is usable; dropped: {dict(dropped)}")
    return Source(rows, path, digest, dict(sorted(dropped.items())))


def _layout(fields: dict, responses: bool, place: str) -> dict[str, str]:
    for column in ("messages", "conversations"):
        if column in fields:
            return {"messages": column}
    for prompt, response in (("prompt", "response"), ("instruction", "output")):
        if prompt in fields and (response in fields or not responses):
            optional = OPTIONAL if prompt == "prompt" else ()
            return {"prompt": prompt, "response": response, **{name: name for name in optional}}
    raise UserError(
        f"{place}: no known layout (messages; conversations; prompt + response; instruction + "
        f"output); its columns are {', '.join(map(str, fields)) or 'none'}; name yours: "
        "config.columns.prompt=COLUMN and config.columns.response=COLUMN"
    )


def _converter(columns: Mapping[str, str], detected: bool, responses: bool):
    """Returns a function (fields, place) -> row, or the reason (a word) for which the row is
    dropped."""

    def field(fields: dict, name: str, place: str):
        if columns[name] not in fields:
            present = ", ".join(map(str, fields)) or "none"
            raise UserError(
                f"{place}: field {columns[name]!r} is missing; the fields there are {present}"
            )
        return fields[columns[name]]

    def text(fields: dict, name: str, place: str) -> str:
        value = field(fields, name, place)
        if value is None:  # as an empty one
            return ""
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{place}: field {columns[name]!r} is {kind}, not text")
        return value

    def from_messages(fields: dict, place: str):
        turns = field(fields, "messages", place)
        if reason := _not_trained(turns):
            return reason
        messages = _as_messages(turns)
        check_messages(messages, place)
        messages = [
            {"role": message["role"], "content": message["content"]} for message in messages
        ]
        column = columns["messages"]
        response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if response is None and responses:
            raise UserError(f"{place}: field {column!r} does not end with an assistant turn")
        if not messages or messages[-1]["role"] != "user":
            raise UserError(f"{place}: field {column!r} has no user turn before the answer")
        prompt = messages.pop()["content"]
        return finish(prompt, (responses and response) or "", messages, fields, place)

    def from_columns(fields: dict, place: str):
        prompt = text(fields, "prompt", place)
        response = text(fields, "response", place) if responses else ""
        if detected and responses and columns["prompt"] == "instruction" and fields.get("input"):
            return "with_input"
        return finish(prompt, response, [], fields, place)

    def finish(prompt: str, response: str, history: list, fields: dict, place: str):
        if not prompt.strip():
            return "empty_prompt"
        if responses and not response.strip():
            return "empty_response"
        if detected:
            for name, not_trained in _NOT_TRAINED_COLUMNS.items():
                if fields.get(name) not in _EMPTY:
                    return not_trained
            if reason := _not_trained(fields.get("history"), answers=False):
                return reason
            earlier = _earlier_turns(fields.get("history"), f"{place}: history")
            if earlier and (history or "messages" in columns):
                raise UserError(
                    f"{place}: both 'history' and {columns['messages']!r} are given; leave one out"
                )
            history = history or earlier
            systems = _system_prompts(fields, place)
            if history and history[0]["role"] == "system":
                systems.append(history.pop(0)["content"])
            if len({system.strip() for system in systems}) > 1:
                return "two_system_prompts"
            if systems:
                history = [{"role": "system", "content": systems[-1]}, *history]
        row = {"prompt": prompt, "response": response, "history": history, "source": place}
        _check_unicode([prompt, response, *(message["content"] for message in history)], place)
        for name in OPTIONAL:
            column = columns.get(name)
            empty = fields.get(column) is None and (detected or column in fields)
            if column is None or empty:
                continue
            if name == "history":
                if not detected:
                    row["history"] = _earlier_turns(fields[column], f"{place}: history")
            elif name == "id":
                row["id"] = str(field(fields, name, place))
            else:
                row[name] = text(fields, name, place)
        return row

    if "messages" in columns:
        return from_messages
    needed = {"prompt", "response"} if responses else {"prompt"}
    if not needed <= set(columns):
        raise UsageError(f"columns must name {' and '.join(sorted(needed - set(columns)))} too")
    return from_columns


def _earlier_turns(history: Any, place: str) -> list[dict[str, str]]:
    """A `history` as messages; it may hold [question, answer] pairs."""
    if history is None or history == "" or history == []:
        return []
    if isinstance(history, list) and all(isinstance(turn, list) for turn in history):
        if not all(
            len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], str) for p in history
        ):
            raise UserError(f"{place} must hold [question, answer] pairs of text")
        roles = ("user", "assistant")
        return [
            {"role": role, "content": text}
            for pair in history
            for role, text in zip(roles, pair, strict=True)
        ]
    turns = _as_messages(history)
    check_messages(turns, place)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _system_prompts(fields: dict, place: str) -> list[str]:
    """The system prompts in the columns of a known layout."""
    prompts = []
    for column in _SYSTEM_COLUMNS:
        value = fields.get(column)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: field {column!r} is {type(value).__name__}, not text")
        if value and value.strip():
            prompts.append(value)
    return prompts


def _not_trained(turns: Any, *, answers: bool = True) -> str | None:
    """Why a conversation is dropped, if its turns need what training does not support. `answers`:
    it ends with the answer."""
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            continue
        role = turn.get("role", turn.get("from"))
        if role in _TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
            return "tools"
        empty = turn.get("content", turn.get("value", "")) is None
        if role in ("assistant", "gpt"):
            weight = turn.get("weight")
            marks = [turn.get(name) for name in ("train", "training", "loss")]
            if weight not in (None, 1) or any(mark == 0 for mark in marks):
                return "turn_weight"
            if turn.get("reasoning_content") or turn.get("thinking"):
                return "reasoning_apart"
            if empty and answers and turn is turns[-1]:
                return "empty_response"
        elif empty and role in ("user", "human"):
            return "empty_prompt"
    return None


def _check_unicode(texts: list[str], place: str) -> None:
    """UserError for half a surrogate pair, which JSON can spell, but no tokenizer accepts."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: the text holds half a surrogate pair, {error.object[error.start]!r}"
        ) from error


def _as_messages(turns):
    """OpenHermes' {"from", "value"} turns as {"role", "content"}; anything else unchanged."""
    if not isinstance(turns, list):
        return turns
    return [
        {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, dict) and isinstance(turn.get("from"), str)
        else turn
        for turn in turns
    ]


def _read(path: str) -> tuple[Iterator[tuple[str, object]], str | None]:
    """(place, fields) of every row, and the digest of the data."""
    file = as_path(path)
    suffix = file.suffix.lower()
    hub_name = _HUB_NAME.fullmatch(path)
    if not file.exists() and suffix not in _SUFFIXES and hub_name:
        return _read_hub(*hub_name.groups())
    marks = (file / name for name in ("state.json", "dataset_dict.json"))
    if not in_bucket(path) and any(mark.is_file() for mark in marks):
        return _read_saved(path)
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
            f"{place}: not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}); save the "
            "file as UTF-8"
        ) from error


def _read_jsonl(path: str, content: bytes) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, parse_json(_decode(line, place))
        except ValueError as error:
            remedy = "; for one list of objects, name the file .json" if number == 1 else ""
            raise UserError(f"{place}: not valid JSON: {error}{remedy}") from error


def _read_json(path: str, content: bytes) -> Iterator[tuple[str, object]]:
    try:
        rows = parse_json(_decode(content.removeprefix(b"\xef\xbb\xbf"), path))
    except json.JSONDecodeError as error:
        remedy = f"; {_JSON_REMEDY}" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error}{remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects; {_JSON_REMEDY}")
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path: str, content: bytes) -> Iterator[tuple[str, object]]:
    """Reads with the csv module, which has line numbers, and keeps an answer such as "None" or "4"
    as text."""
    csv.field_size_limit(2**31 - 1)
    text = _decode(content.removeprefix(b"\xef\xbb\xbf"), path)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            line, place = reader.line_num, f"{path}:{reader.line_num}"
            if None in fields or None in fields.values():
                header = reader.fieldnames or ()
                raise UserError(
                    f"{place}: this row does not have the {len(header)} fields of the header "
                    f"({', '.join(header)})"
                )
            yield place, fields
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV after line {line}: {error}") from error


def _read_parquet(path: str) -> Iterator[tuple[str, object]]:
    """Reads with pyarrow, as `datasets` does, but without an Arrow copy in a cache."""
    try:
        rows = pyarrow.parquet.read_table(local_copy(path)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two: a date that Python has none for.
        raise UserError(f"{path} is not a readable parquet file: {first_line(error)}") from error
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _read_saved(path: str) -> tuple[Iterator[tuple[str, object]], str | None]:
    """Reads a folder that save_to_disk of `datasets` wrote; if it has splits, the split train."""
    import datasets

    try:
        table = datasets.load_from_disk(path)
    except Exception as error:  # a damaged or unfinished folder: each its own kind
        raise UserError(
            f"{path} is no readable save_to_disk folder: {first_line(error)}"
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise UserError(
                f"{path} has no split 'train'; name the folder of a split: "
                f"{', '.join(f'{path}/{split}' for split in table)}"
            )
        table = table["train"]
    return (
        (f"{path} row {number}", row) for number, row in enumerate(table, 1)
    ), table._fingerprint


def _read_hub(
    name: str, subset: str | None, split: str | None
) -> tuple[Iterator[tuple[str, object]], str | None]:
    import datasets

    split = split or "train"
    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # network, a wrong name, a wrong split: each its own kind
        subset = f", subset {subset!r}" if subset else ""
        raise UserError(
            f"{name} is neither a local file nor a dataset that can be loaded (split {split!r}"
            f"{subset}): {first_line(error)}"
        ) from error
    rows = ((f"{name}[{split}] row {number}", row) for number, row in enumerate(table, start=1))
    return rows, table._fingerprint
