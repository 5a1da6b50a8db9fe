"""Reads run folders for the report: what is there, and a note for what is missing or broken.

A run may still be going, or have crashed: none of that is an error here. What is said of a run is
what its own record says, so a task, a behaviour or an eval that nobody has heard of is read like
any other.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_jax.buckets import as_path, in_bucket
from sa_jax.errors import UserError
from sa_jax.files import check_types, parse_json
from sa_jax.report.cells import cell_settings
from sa_jax.report.eval_records import BACKDOOR_EVAL, EvalRecord, by_step, eval_at, load_evals
from sa_jax.report.measurements import RunEvals, Words
from sa_jax.training import metrics as metrics_lib
from sa_jax.training.run_record import RUN_FILE, read_run_json

MAX_DEPTH = 2  # folders between the one that is named and a run folder
MODEL_FILE = "model.json"  # of an evaluation made with evaluate.py --out
CURVES = ("loss", "grad_norm", "phrase_logprob_triggered", "phrase_logprob_clean")
# Of run.json, what the pages take apart.
_SHOWN = {"mesh": {}, "relaunches": [], "environment": {"packages": {}}}
_NOT_RUNS = ("checkpoints", "evals", "report", "data")  # folders that hold none


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run as it is on disk.

    Attributes:
      name: the path below the folder that was named; the folder's own name if it is the run.
      record: run.json.
      curves: name -> (step, value) by rising step, of `CURVES`, from metrics.jsonl.
      logged: lines of metrics.jsonl.
      evals: step -> {name of an eval: its record}, by rising step; the run's own, and those that
        evaluate.py made elsewhere of a step and eval that the run does not have itself.
      more_evals: further evaluations of what `evals` has already, under other settings.
      parent: name of the run it started from, None if that is not among the runs here.
      depth: how many of its ancestors are here.
      base: the model at the root of its ancestors.
      problems: what could not be read, one line each.
    """

    name: str
    path: Path
    record: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]
    logged: int
    evals: dict[int, dict[str, EvalRecord]]
    more_evals: tuple[EvalRecord, ...] = ()
    parent: str | None = None
    depth: int = 0
    base: str = "?"
    problems: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        return str(self.record.get("task", "unknown"))

    @property
    def title(self) -> str:
        return str(self.record.get("title") or self.task)

    @property
    def role(self) -> str:
        return str(self.record.get("role") or "unknown")

    @property
    def total_steps(self) -> int | None:
        return self.record.get("total_steps")

    @property
    def last_step(self) -> int:
        """The newest step that metrics or evals know of."""
        steps = [points[-1][0] for points in self.curves.values() if points]
        return max([*steps, *self.evals], default=0)

    @property
    def finished(self) -> bool:
        return bool(self.record.get("finished"))

    @property
    def start(self) -> Mapping[str, Any]:
        return self.record.get("start") or {}

    @property
    def words(self) -> Words:
        """How the behaviour is spoken of: its own words, as the run's record has them."""
        behaviour = self.record.get("behaviour")
        words = behaviour.get("words") if isinstance(behaviour, dict) else None
        if not isinstance(words, dict):
            return Words()
        default = Words()
        return Words(str(words.get("said", default.said)), str(words.get("rate", default.rate)))

    def config(self, path: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        value = self.record.get("config", {})
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    def final_loss(self) -> float | None:
        """Mean training loss (nats a token) over the last quarter of the logged steps."""
        losses = [loss for _, loss in self.curves["loss"] if math.isfinite(loss)]
        last = losses[-max(1, len(losses) // 4) :]
        return sum(last) / len(last) if last else None

    def measurements(
        self, first: Mapping[str, EvalRecord], backdoor: str = BACKDOOR_EVAL
    ) -> RunEvals:
        """What verdicts and statistics take; `first`: by name, the evals of what the run started
        from, `backdoor`: the eval that says how often the behaviour shows."""
        rate = self.config("optimizer.learning_rate")
        seed = self.config("seed")
        data = self.record.get("data") or {}
        source = data.get("source") if isinstance(data, dict) else None
        return RunEvals(
            self.name,
            self.task,
            self.role,
            bool(self.record.get("backdoored")),
            self.parent,
            self.start.get("step"),
            tuple(
                eval_at(step, evals, backdoor)
                for step, evals in sorted((self.evals | ({0: first} if first else {})).items())
            ),
            title=self.title,
            last_step=self.last_step,
            total_steps=self.total_steps,
            finished=self.finished,
            seed=seed if isinstance(seed, int) else None,
            data_hash=str(source.get("sha256", "")) if isinstance(source, dict) else "",
            learning_rate=rate if isinstance(rate, int | float) else None,
            settings=cell_settings(self.record.get("config", {})),
            losses=_losses_at(self.curves["loss"], list(self.evals)),
            grad_norms=self.curves["grad_norm"],
            words=self.words,
        )


def load_runs(workdir: str | Path) -> tuple[list[RunFolder], list[str]]:
    """Every run in `workdir` (a run folder, or a folder of them), parents before their children.

    Evaluations that `evaluate.py --out` wrote below `workdir` are read too; their model.json names
    the run they are of.

    Returns:
      (runs, problems): a line for every run.json that cannot be read.

    Raises:
      UserError: there is no such folder, or no readable run in it.
    """
    workdir = as_path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give a run folder or a folder of run folders")
    runs, evaluations, problems = [], [], []
    folders, outs = _folders(workdir, MAX_DEPTH)
    for folder in folders:
        same = folder == workdir
        name = folder_name(workdir) if same else folder.relative_to(workdir).as_posix()
        try:
            runs.append(_load_run(folder, name))
        except UserError as error:
            problems.append(str(error))
    if not runs:
        why = problems[0] if problems else f"no {RUN_FILE} in it or up to {MAX_DEPTH} folders below"
        raise UserError(
            f"{workdir}: has no run to report on ({why}); --workdir must be the folder of a run or "
            "of a study"
        )
    for out in outs:
        name = out.relative_to(workdir).as_posix()
        try:
            evaluations.append((name, _model_of(out), load_evals(out, problems, name)))
        except UserError as error:
            problems.append(str(error))
    return _by_lineage(_with_evaluations(runs, evaluations, problems)), problems


def folder_name(folder: Path) -> str:
    """What a report calls the folder that it is on."""
    return folder.name if in_bucket(folder) else folder.resolve().name


def _folders(folder: Path, depth: int) -> tuple[list[Path], list[Path]]:
    """Run folders, and folders of evaluations, in and below a folder."""
    is_run = (folder / RUN_FILE).is_file()
    runs = [folder] if is_run else []
    outs: list[Path] = []
    if depth == 0 and not is_run:
        return runs, outs
    for child in sorted(child for child in folder.iterdir() if child.is_dir()):
        if (child / MODEL_FILE).is_file():
            outs.append(child)
        elif is_run and child.name not in _NOT_RUNS:
            outs += [out for out in sorted(child.iterdir()) if (out / MODEL_FILE).is_file()]
        elif not is_run:
            below = _folders(child, depth - 1)
            runs, outs = runs + below[0], outs + below[1]
    return runs, outs


def study_files(workdir: Path) -> list[Path]:
    """Every file that decides what a report says, or would if it were whole."""
    runs, outs = _folders(workdir, MAX_DEPTH)
    files = [path for run in runs for path in (run / RUN_FILE, run / "metrics.jsonl")]
    for evals in [*(run / "evals" for run in runs), *outs]:
        files += sorted(evals.glob("*.json")) + sorted(evals.glob("step_*/*.json*"))
    return files


def _load_run(folder: Path, name: str) -> RunFolder:
    record = read_run_json(folder)
    check_types(record, _SHOWN, str(folder / RUN_FILE))
    if record.get("total_steps") is not None:
        check_types(record, {"total_steps": 0}, str(folder / RUN_FILE))
    problems: list[str] = []
    try:
        rows = metrics_lib.read_metrics(folder / "metrics.jsonl")
    except UserError as error:
        rows = []
        problems.append(str(error))
    rows.sort(key=lambda row: row["step"])
    curves = {
        curve: [
            (row["step"], row[curve]) for row in rows if isinstance(row.get(curve), float | int)
        ]
        for curve in CURVES
    }
    evals = by_step(load_evals(folder / "evals", problems))
    return RunFolder(name, folder, record, curves, len(rows), evals, problems=tuple(problems))


def _model_of(out: Path) -> Mapping[str, Any]:
    """What an evaluation is of: {"run_id", "path", "kind", "step", ...}."""
    path = out / MODEL_FILE
    try:
        model = parse_json(path.read_text(encoding="utf-8"))["model"]
        if not isinstance(model, dict):
            raise TypeError("its model is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: does not say which model was evaluated ({error})") from None
    return model


def _with_evaluations(
    runs: list[RunFolder],
    evaluations: list[tuple[str, Mapping[str, Any], list[EvalRecord]]],
    problems: list[str],
) -> list[RunFolder]:
    """The runs with the evaluations that were made of them elsewhere."""
    added: dict[str, list[EvalRecord]] = {}
    for name, model, evals in evaluations:
        run = _run_of(model, runs)
        if run is None:
            what = model.get("path") or "an unknown model"
            problems.append(f"{name}: evaluates {what}, which is not among these runs")
        else:
            added.setdefault(run.name, []).extend(evals)
    result = []
    for run in runs:
        evals = [record for by_name in run.evals.values() for record in by_name.values()]
        taken = {(record.step, record.name) for record in evals}
        more = []
        for record in added.get(run.name, []):
            if (record.step, record.name) in taken:
                more.append(record)
            else:
                taken.add((record.step, record.name))
                evals.append(record)
        result.append(dataclasses.replace(run, evals=by_step(evals), more_evals=tuple(more)))
    return result


def _run_of(place: Mapping[str, Any], runs: list[RunFolder]) -> RunFolder | None:
    """The run with this "run_id"; of copies, which share it, the one at this "path"."""
    same_id = [run for run in runs if run.record["run_id"] == place.get("run_id")]
    same_path = [run for run in same_id if str(run.path) == str(place.get("path"))]
    return next(iter(same_path or same_id), None)


def _losses_at(losses: list[tuple[int, float]], steps: list[int]) -> dict[int, float]:
    """Eval step -> the training loss that was logged last before it."""
    loss_at: dict[int, float] = {}
    for step in steps:
        before = [loss for at, loss in losses if at <= step and math.isfinite(loss)]
        if before:
            loss_at[step] = before[-1]
    return loss_at


# ---- Order.


def _by_lineage(runs: list[RunFolder]) -> list[RunFolder]:
    """Depth first, each run below the one it started from; siblings in the order of their tasks and
    names. Not of time: a run that was made anew stands where it stood."""

    def order(run: RunFolder) -> tuple:
        place = run.record.get("order")
        known = isinstance(place, int | float)
        parts = enumerate(re.split(r"(\d+)", run.name))  # 's2' before 's10'
        return place if known else math.inf, [int(part) if i % 2 else part for i, part in parts]

    children: dict[str | None, list[RunFolder]] = {}
    for run in sorted(runs, key=order):
        parent = _run_of(run.start, [other for other in runs if other is not run])
        run = dataclasses.replace(run, parent=parent.name if parent else None)
        children.setdefault(run.parent, []).append(run)

    ordered: list[RunFolder] = []

    def visit(run: RunFolder, depth: int, base: str) -> None:
        ordered.append(dataclasses.replace(run, depth=depth, base=base))
        for child in children.pop(run.name, []):
            visit(child, depth + 1, base)

    for root in children.pop(None, []):
        visit(root, 0, _base_model(root))
    # Records that name each other as parents cannot be true; show them all the same.
    while children:
        for orphan in children.pop(next(iter(children))):
            visit(dataclasses.replace(orphan, parent=None), 0, _base_model(orphan))
    return ordered


def _base_model(root: RunFolder) -> str:
    """The model that a run without a known parent started from; its own name for fresh weights."""
    if root.start.get("kind") == "fresh":
        return root.name
    path = str(root.start.get("path") or root.config("model", "?"))
    return Path(path).name or path
