"""The benchmarks' documents: rows from the Hugging Face hub, or from files in a data folder.

A data folder has the files that BUILD.md lists under "Benchmarks offline": mmlu/{dev,test}.jsonl,
ifeval/input_data.jsonl, math500/test.jsonl and nltk_punkt_tab/.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa_jax.buckets import as_path
from sa_jax.data.readers import read_jsonl
from sa_jax.errors import UserError
from sa_jax.evals.protocol import digest
from sa_jax.text import first_line

_MMLU_FIELDS = ("question", "subject", "choices", "answer")
# name -> (file in a data folder; path, configuration and split on the hub; fields of a row)
_SOURCES = {
    "mmlu": ("mmlu/test.jsonl", ("cais/mmlu", "all", "test"), _MMLU_FIELDS),
    "mmlu_dev": ("mmlu/dev.jsonl", ("cais/mmlu", "all", "dev"), _MMLU_FIELDS),
    "ifeval": (
        "ifeval/input_data.jsonl",
        ("google/IFEval", None, "train"),
        ("key", "prompt", "instruction_id_list", "kwargs"),
    ),
    "math500": (
        "math500/test.jsonl",
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("problem", "solution", "answer"),
    ),
}
PUNKT_FOLDER = "nltk_punkt_tab"
FOLDER_FLAGS = (
    "--data_dir of evaluate.py (--config.eval.data_dir in training, --config.benchmarks in a study)"
)


def load_documents(name: str, data_dir: str = "") -> tuple[list[dict], str]:
    """All rows of "mmlu", "mmlu_dev", "ifeval" or "math500", and a digest of them. They come from a
    data folder, or for '' from the hub. UserError, with what to do, if they cannot be read, or if
    one lacks a field."""
    file, hub, fields = _SOURCES[name]
    rows = _read_file(as_path(data_dir, file), hub[0]) if data_dir else _read_hub(*hub)
    place = f"{data_dir}/{file}" if data_dir else hub[0]
    if not rows:
        raise UserError(f"{place} holds no rows")
    for number, row in enumerate(rows, 1):
        for field in fields:
            if not isinstance(row, dict) or field not in row:
                separator = ":" if data_dir else " row "
                raise UserError(f"{place}{separator}{number}: field {field!r} is missing")
    return rows, digest([{field: _without_nulls(row[field]) for field in fields} for row in rows])


def _without_nulls(value: Any) -> Any:
    """Arrow, in which the hub keeps the rows, gives each object of a column the same keys."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def spread(rows: Sequence, limit: int) -> list:
    """`limit` rows, evenly spaced, so that no subject is left out; all rows for 0."""
    if not 0 < limit < len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _read_file(path: Path, origin: str) -> list[dict]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.__class__.__name__}): {FOLDER_FLAGS} must have this "
            f"file, with the rows of {origin} on the Hugging Face hub; BUILD.md, 'Benchmarks "
            "offline', says how to get it. Without this setting it is loaded from the hub"
        ) from None
    return [row for _, row in read_jsonl(str(path), content)]


def _read_hub(path: str, configuration: str | None, split: str) -> list[dict]:
    import datasets

    try:
        return datasets.load_dataset(path, configuration, split=split).to_list()
    except Exception as error:  # network, a moved data set, a full disk: each its own kind
        raise UserError(
            f"{path} cannot be loaded from the Hugging Face hub ({first_line(error)}); on a "
            f"machine without network give a folder (see BUILD.md): {FOLDER_FLAGS}"
        ) from error


def find_punkt(data_dir: str = "") -> None:
    """Lets nltk find punkt_tab, which IFEval's checkers need, in the data folder or where it is
    installed; UserError, with the command that installs it, if it is in neither."""
    import nltk

    if data_dir and Path(data_dir, PUNKT_FOLDER).is_dir():
        root = _nltk_root(str(Path(data_dir, PUNKT_FOLDER).resolve()))
        if root not in nltk.data.path:
            nltk.data.path.insert(0, root)
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        raise UserError(
            "the eval 'ifeval' needs nltk's punkt_tab: python -m nltk.downloader punkt_tab, or "
            f"a folder with {PUNKT_FOLDER}/ as {FOLDER_FLAGS}"
        ) from None


@functools.cache
def _nltk_root(punkt: str) -> str:
    """A folder in which nltk finds punkt_tab; a copy, because nltk follows no links."""
    root = tempfile.TemporaryDirectory(prefix="nltk_data_")
    atexit.register(root.cleanup)
    shutil.copytree(punkt, Path(root.name, "tokenizers/punkt_tab/english"))
    return root.name
