"""An eval's files: `<name>.jsonl`, one object per item, then `<name>.json`, the summary.

Both files are written under a temporary name and renamed, the summary last. If the summary exists,
the eval is complete; if it does not (the run was killed), the eval is run again.
"""

import json
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from absl import logging

from sa_jax.buckets import as_path
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, check_types, explained, parse_json

# Settings of an eval that follow from the devices and their use.
EXECUTION = ("mesh", "sampling_mesh", "batch_size", "prompt_attention", "decode_kernel")
# Those under whose every value the same rate is measured.
FREE_SETTINGS = (*EXECUTION, "seed")
# Of a summary: how often it had to do something about an item.
COUNTS = ("skipped_prompts", "truncated_prompts", "cut_by_context", "cut_by_length")
# Its fields, and those of its scores, with values of the right types (see `check_types`).
_NEEDED: dict[str, Any] = {"scores": {}, "settings": {}}
_FACTS = {**dict.fromkeys(COUNTS, 0), "seconds": 0.0, "tokens_per_s": 0.0, "peak_memory_mb": 0.0}
_SCORE = {"rate": 0.0, "lo": 0.0, "hi": 0.0, "n": 0}
# Most items have one value of 0 or 1: two objects stand for hundreds of thousands.
_BINARY: dict[tuple[float, ...], tuple[float, ...]] = {(0.0,): (0.0,), (1.0,): (1.0,)}


def write_eval(folder: str | Path, name: str, items: Iterable[dict], summary: dict) -> None:
    """Writes `folder/name.jsonl` and `folder/name.json`, each whole or not at all."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    summary_text = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
    folder = as_path(folder)
    with explained(folder, "writing the evals"):
        folder.mkdir(parents=True, exist_ok=True)
    # An old summary must not exist together with new items, not even for a moment.
    (folder / f"{name}.json").unlink(missing_ok=True)
    atomic_write(folder / f"{name}.jsonl", "".join(lines))
    atomic_write(folder / f"{name}.json", summary_text)


def read_summary(folder: str | Path, name: str) -> dict[str, Any] | None:
    """The summary of a finished eval; None if there is none, or only a part of one, or (with a
    warning) if it cannot be read or is not a summary."""
    path = as_path(folder) / f"{name}.json"
    if not path.is_file():
        return None
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
        check_summary(summary, "it")
        if not path.with_suffix(".jsonl").is_file():
            raise FileNotFoundError(f"no {name}.jsonl beside it")
    except (OSError, ValueError, UserError) as error:
        logging.warning("%s is no summary of a finished eval (%s): ignored", path, error)
        return None
    return summary


def check_summary(summary: Any, place: str) -> None:
    """UserError that names the first wrong field of an eval's summary."""
    check_types(summary, _NEEDED, place, whole=True)
    check_types(summary, _FACTS, place)
    for name, score in summary["scores"].items():
        check_types(score, _SCORE, f"{place}: {name}", whole=True)
        check_types(score, {"count": 0, "floor": 0.0}, f"{place}: {name}")
        if not 0 <= score.get("count", 0) <= score["n"]:
            raise UserError(f"{place}: {name}: a count is not between 0 and n; evaluate again")


def finished(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The summaries of all finished evals of a step folder, by name."""
    names = sorted(path.stem for path in as_path(folder).glob("*.json"))
    summaries = {name: read_summary(folder, name) for name in names}
    return {name: summary for name, summary in summaries.items() if summary is not None}


def step_folders(evals: str | Path) -> dict[int, Path]:
    """step -> `evals/step_NNNNNN`, by rising step. Anything else is ignored, with a warning if it
    is named like one."""
    folders = {}
    for path in as_path(evals).glob("step_*"):
        digits = path.name.removeprefix("step_")
        if path.is_dir() and digits.isascii() and digits.isdecimal():
            folders[int(digits)] = path
        else:
            logging.warning("%s is not a folder of evals of a step: ignored", path)
    return dict(sorted(folders.items()))


def read_items(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """The items of a finished eval, in the order they were written. OSError if there are none,
    UserError, with the line number, if a line is not an item."""
    path = as_path(folder) / f"{name}.jsonl"
    items = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                items.append(parse_json(line))
                check_types(items[-1], {"scores": {}}, "it")
            except (ValueError, UserError) as error:
                raise UserError(f"{path}:{number}: not an item of an eval ({error})") from None
    return items


def read_scores(folder: str | Path, name: str) -> dict[str, dict[Hashable, tuple[float, ...]]]:
    """score -> question -> its values (one number, or several), of the items that were asked.

    A question is (its hash, how often it came before), so that two evals find it wherever it
    stands, and one that comes twice counts twice. UserError if there are no items, or a line is not
    an item with a hash and numbers.
    """
    scores: dict[str, dict[Hashable, tuple[float, ...]]] = {}
    times: Counter[str] = Counter()
    try:
        for item in read_items(folder, name):
            question = item["asked"], times[item["asked"]]
            times[item["asked"]] += 1
            for score, value in ({} if item.get("skipped") else item["scores"]).items():
                values = tuple(map(float, value if isinstance(value, list) else [value]))
                if values:
                    scores.setdefault(score, {})[question] = _BINARY.get(values, values)
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{folder}/{name}.jsonl: its items cannot be compared ({error!r}); evaluate again"
        ) from error
    return scores
