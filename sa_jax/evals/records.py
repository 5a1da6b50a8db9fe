"""How an eval is put on disk: `<name>.jsonl`, one object an item, then `<name>.json`, the summary.

Both files are written beside their place and renamed, the summary last: where it stands the eval is
whole, and where it does not (the run was killed) the eval is done again.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sa_jax.files import atomic_write, explained


def write_eval(folder: str | Path, name: str, items: Iterable[dict], summary: dict) -> None:
    """Writes `folder/name.jsonl` and `folder/name.json`, each whole or not at all."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    summary_text = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
    folder = Path(folder)
    with explained(folder, "writing the evals"):
        folder.mkdir(parents=True, exist_ok=True)
    # An old summary must not stand beside new items, not even for a moment.
    (folder / f"{name}.json").unlink(missing_ok=True)
    atomic_write(folder / f"{name}.jsonl", "".join(lines))
    atomic_write(folder / f"{name}.json", summary_text)


def read_summary(folder: str | Path, name: str) -> dict[str, Any] | None:
    """The summary of a finished eval, None where there is none (or only a part of one)."""
    path = Path(folder) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_items(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """The items of a finished eval, in the order they were written."""
    with open(Path(folder) / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
