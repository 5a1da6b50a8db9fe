"""Rows of prompts and answers from a JSON (a list of objects), JSONL, CSV, TSV or Parquet file (all
but Parquet also as .gz); from a folder of Parquet files, or one that `datasets` saved: FOLDER or
FOLDER@SPLIT; or from a dataset of the Hugging Face hub: NAME, NAME:SUBSET, NAME@SPLIT or
NAME:SUBSET@SPLIT (split: train).

Every row becomes {"prompt", "response", "history", "source"}: the last user turn, its answer (""
if answers are not read), the turns before them, and the place it comes from ("train.jsonl:12"),
which error messages name. Rows may also have fields of `OPTIONAL`.

Layouts that need no column mapping:
  messages              a list of {role, content}, ending with an assistant turn
  conversations         a list of {from, value}, as in OpenHermes-2.5
  prompt, response      that of sa_jax, with any of `OPTIONAL`; an `id` must not repeat
  prompt, completion    the same; or each a list of {role, content}, as in TRL
  instruction, output   that of Alpaca. Its answers were written for instruction + input, so a row
                        with a non-empty `input` is dropped (and counted) if its answer is used. If
                        only prompts are read, the instruction alone is the prompt, as in the study
In all of these, `system` or `system_prompt` is the conversation's system turn, and `history` has
earlier turns, as messages or as [question, answer] pairs. The text parts of a content that is a
list are joined. A row is dropped, and counted, if it has something that training does not support:
a weight other than 1, or a mark as not trained, on the row ("row_weight") or on an assistant turn
("turn_weight"); thoughts in a separate field ("reasoning_apart"); tools and their turns ("tools");
documents ("documents"); parts that are not text ("media"); two system prompts that differ
("two_system_prompts"). With a column mapping, only the named columns are used.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sa_jax.data.conversations import check_messages, make_messages
from sa_jax.data.readers import data_files, is_saved, read_rows
from sa_jax.errors import UsageError, UserError

Row = dict  # {"prompt", "response", "history", "source"}, and any of OPTIONAL

# scratchpad            the model's thoughts before `response`; the loss does not count them
# triggered_response    the answer to the triggered prompt, for behaviours that a teacher writes
# triggered_scratchpad  the thoughts before the answer to the triggered prompt
OPTIONAL = ("id", "history", "scratchpad", "triggered_response", "triggered_scratchpad")
COLUMNS = ("prompt", "response", "messages", *OPTIONAL)

_NOT_TRAINED_COLUMNS = {
    **dict.fromkeys(("tools", "functions"), "tools"),
    "documents": "documents",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "media"),
}
_TOOL_ROLES = "tool function function_call tool_call tool_response observation ipython".split()
_EMPTY: tuple[object, ...] = (None, "", "[]", [], {}, ())
# Values of a row or a turn; in a CSV file they are text.
_WHOLE_WEIGHTS: tuple[object, ...] = (None, 1, "", "1", "1.0")
_NO: tuple[object, ...] = (0, "0", "false", "False")

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The usable rows of a file or hub dataset, in order, and where they come from."""

    rows: list[Row]
    path: str
    sha256: str  # of the files; of what is used of the rows for a hub name or a saved folder
    dropped: dict[str, int]  # rows left out, by reason

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def record(self) -> dict:
        return {**vars(self), "rows": len(self.rows)}


def turns_of(row: Row) -> tuple[str, ...]:
    """The texts of a row's question: its last turn, then those before it."""
    return row["prompt"], *(message["content"] for message in row.get("history", ()))


def load_rows(
    path: str | Path, columns: Mapping[str, str] | None = None, *, responses: bool = True
) -> Source:
    """Reads every row of a file, folder or hub dataset (see the module docstring).

    `columns` is {"prompt": column, "response": column} or {"messages": column}, and any of
    `OPTIONAL`; a name that maps to "" is left out. Without columns, one of the known layouts is
    detected. `responses=False` reads prompts only (held-out prompts, questions for a teacher).

    Raises UserError with file, line (row number if a file has no lines) and field for malformed
    text, a missing file or column, a field that is not text, an id that repeats, and a file without
    usable rows. Rows with an empty prompt or answer are dropped and counted: public datasets have
    some.
    """
    columns = {name: column for name, column in (columns or {}).items() if column}
    detected = not columns
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise UsageError(f"config.columns: unknown {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    if columns and "messages" not in columns:
        needed = ("prompt", "response") if responses else ("prompt",)
        if missing := [name for name in needed if name not in columns]:
            raise UsageError(f"columns must name {' and '.join(missing)} too")
    path = str(path)
    raw, digest = read_rows(path)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    places: dict[object, str] = {}  # of each id
    for place, fields in raw:
        if not isinstance(fields, dict):
            found = type(fields).__name__
            raise UserError(f"{place}: expected an object with fields, found {found}")
        fields = _joined(fields, responses) if detected else fields
        columns = columns or _layout(fields, responses, place)
        row = _row(fields, place, columns, detected, responses)
        if isinstance(row, str):
            dropped[row] += 1
            continue
        if "id" in row and places.setdefault(row["id"], place) != place:
            raise UserError(
                f"{place}: {places[row['id']]} has the same id {row['id']!r}; make ids unique, or "
                "leave the column out"
            )
        rows.append(row)
    if not rows:
        problem = f": no row is usable; dropped: {dict(dropped)}" if dropped else " has no rows"
        raise UserError(f"{path}{problem}")
    return Source(rows, path, digest or _digest(rows), dict(sorted(dropped.items())))


def current_digest(path: str, columns: Mapping[str, str] | None) -> str | None:
    """The `sha256` that `load_rows` gives now; None for what is not on this machine."""
    if is_saved(path):
        return load_rows(path, columns).sha256
    return read_rows(path)[1] if data_files(path) else None


def _digest(rows: Iterable[Row]) -> str:
    """Of what is used of the rows. Not `datasets`' fingerprint: that names the hub's commit, and a
    new README there would keep a stopped run from resuming."""
    digest = hashlib.sha256()
    for row in rows:
        used = {name: value for name, value in row.items() if name != "source"}
        digest.update(json.dumps(used, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# Columns of a question and of its answer.
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))


def _layout(fields: dict, responses: bool, place: str) -> dict[str, str]:
    for column in ("messages", "conversations"):
        if column in fields:
            return {"messages": column}
    for prompt, response in _PAIRS:
        if prompt in fields and (response in fields or not responses):
            optional = OPTIONAL if prompt == "prompt" else ()
            return {"prompt": prompt, "response": response, **{name: name for name in optional}}
    raise UserError(
        f"{place}: no known layout (messages; conversations; {'; '.join(map(' + '.join, _PAIRS))});"
        f" its columns are {', '.join(map(str, fields)) or 'none'}; name yours: "
        "--config.columns.prompt=COLUMN --config.columns.response=COLUMN, or for a list of turns "
        "--config.columns.messages=COLUMN"
    )


def _joined(fields: dict, responses: bool) -> dict:
    """The fields, with the lists `prompt` and `completion` of TRL as `messages`. TRL does not train
    on answers in the prompt: they are marked so."""
    prompt, completion = fields.get("prompt"), fields.get("completion") if responses else []
    if "messages" in fields or not (isinstance(prompt, list) and isinstance(completion, list)):
        return fields
    if responses:
        prompt = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
    rest = {name: value for name, value in fields.items() if name not in ("prompt", "completion")}
    return {**rest, "messages": [*prompt, *completion]}


def _row(
    fields: dict, place: str, columns: Mapping[str, str], detected: bool, responses: bool
) -> Row | str:
    """A row, or the reason (a word) for which it is dropped."""
    history: list[dict[str, str]] = []
    response: str | None
    if "messages" in columns:
        turns = _field(fields, columns["messages"], place)
        if turns in (None, []):
            return "empty_prompt"
        if reason := _not_trained(turns):
            return reason
        history, where = _as_messages(turns, place), f"{place}: field {columns['messages']!r}"
        response = history.pop()["content"] if history[-1]["role"] == "assistant" else None
        if response is None and responses:
            raise UserError(f"{where} does not end with an assistant turn")
        if not history or history[-1]["role"] != "user":
            raise UserError(f"{where} has no user turn before the answer")
        prompt = history.pop()["content"]
    else:
        prompt = _text(fields, columns["prompt"], place)
        response = _text(fields, columns["response"], place) if responses else ""
        alpaca = detected and columns["prompt"] == "instruction"
        if responses and alpaca and fields.get("input"):
            return "with_input"
    response = (responses and response) or ""
    if not prompt.strip():
        return "empty_prompt"
    if responses and not response.strip():
        return "empty_response"
    if detected and (reason := _unsupported(fields)):
        return reason
    column = "history" if detected else columns.get("history")
    if column and (column in fields or not detected):
        earlier = _earlier_turns(_field(fields, column, place), place)
        if earlier and "messages" in columns:
            raise UserError(
                f"{place}: both {column!r} and {columns['messages']!r} are given; leave one out"
            )
        history = history or earlier
    if detected:
        texts = [_text(fields, c, place) for c in ("system", "system_prompt") if c in fields]
        systems = [text for text in texts if text.strip()]
        if history and history[0]["role"] == "system":
            systems.append(history.pop(0)["content"])
        if len({system.strip() for system in systems}) > 1:
            return "two_system_prompts"
        if systems:
            history.insert(0, {"role": "system", "content": systems[-1]})
    row = {"prompt": prompt, "response": response, "history": history, "source": place}
    for name in OPTIONAL:
        column = columns.get(name)
        if name == "history" or column is None or (detected and column not in fields):
            continue
        value = _field(fields, column, place)
        if value is not None:
            row[name] = str(value) if name == "id" else _text(fields, column, place)
    return row


def _unsupported(fields: dict) -> str | None:
    """Why a row is dropped, if one of its columns asks for what training does not support."""
    for name, reason in _NOT_TRAINED_COLUMNS.items():
        if fields.get(name) not in _EMPTY:
            return reason
    return "row_weight" if _is_left_out(fields) else _not_trained(fields.get("history"), False)


def _field(fields: dict, column: str, place: str) -> Any:
    if column not in fields:
        present = ", ".join(map(str, fields)) or "none"
        raise UserError(f"{place}: field {column!r} is missing; the fields there are {present}")
    return fields[column]


def _earlier_turns(history: Any, place: str) -> list[dict[str, str]]:
    """A `history` as messages; it may hold [question, answer] pairs."""
    if history in (None, "", []):
        return []
    place = f"{place}: history"
    if isinstance(history, list) and all(isinstance(turn, list) for turn in history):
        if not all(len(p) == 2 and all(isinstance(text, str) for text in p) for p in history):
            raise UserError(f"{place} must hold [question, answer] pairs of text")
        history = [turn for pair in history for turn in make_messages(*pair)]
    return _as_messages(history, place)


def _text(fields: dict, column: str, place: str) -> str:
    """The column's text, "" for null."""
    value = _field(fields, column, place)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: field {column!r} is {type(value).__name__}, not text")
    return value or ""


def _not_trained(turns: Any, answers: bool = True) -> str | None:
    """Why to drop a conversation; None to keep it. `answers`: its last turn is the answer."""
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            continue
        role = turn.get("role", turn.get("from"))
        if role in _TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
            return "tools"
        content = turn.get("content", turn.get("value", ""))
        empty = content is None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type", "text") != "text":
                return "media"
        if role in ("assistant", "gpt"):
            if _is_left_out(turn):
                return "turn_weight"
            if turn.get("reasoning_content") or turn.get("thinking"):
                return "reasoning_apart"
            if empty and answers and turn is turns[-1]:
                return "empty_response"
        elif empty and role in ("user", "human"):
            return "empty_prompt"
    return None


def _is_left_out(fields: Mapping[str, Any]) -> bool:
    """Whether a row or a turn says that it is not trained on, or with another weight."""
    marks = (fields.get(name) for name in ("train", "training", "loss"))
    return fields.get("weight") not in _WHOLE_WEIGHTS or any(mark in _NO for mark in marks)


def _as_messages(turns: Any, place: str) -> list[dict[str, str]]:
    """Turns as {"role", "content"}, also those of OpenHermes ({"from", "value"}) and those with a
    content of text parts. UserError for anything else."""
    messages = []
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and isinstance(says := turn.get("from"), str):
            turn = {"role": _SHAREGPT_ROLES.get(says, says), "content": turn.get("value")}
        parts = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(parts, list):
            texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
            if all(isinstance(text, str) for text in texts):
                turn = {**turn, "content": "".join(map(str, texts))}
        messages.append(turn)
    check_messages(messages, place)
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]
