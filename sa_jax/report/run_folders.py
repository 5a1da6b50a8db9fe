"""Reads run folders for the report, and notes what is missing or broken.

A run may be unfinished, or may have crashed; neither is an error. Everything about a run comes from
its own record, so unknown tasks, behaviours and evals are read like all others.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_jax.buckets import as_path, in_bucket
from sa_jax.errors import UserError
from sa_jax.evals.records import FREE_SETTINGS
from sa_jax.files import check_types, parse_json
from sa_jax.report.cells import cell_settings
from sa_jax.report.eval_records import BACKDOOR_EVAL, EvalRecord, eval_at, load_evals
from sa_jax.report.measurements import RunEvals, Words
from sa_jax.training import metrics as metrics_lib
from sa_jax.training.run_record import MODEL_FILE, RUN_FILE, config_difference, read_run_json

MAX_DEPTH = 2  # folders between the one that is named and a run folder
CURVES = ("loss", "grad_norm", "phrase_logprob_triggered", "phrase_logprob_clean")
# Of run.json, what the pages take apart.
_SHOWN = {"mesh": {}, "relaunches": [], "environment": {"packages": {}}}
# Settings of an eval that may differ between a run and its start: what is asked, of which questions
# both have answers, and rounding.
_MAY_DIFFER = (*FREE_SETTINGS, "arms", "context_length", "dtype", "limit")
_NOT_RUNS = ("checkpoints", "evals", "report", "data")  # folders that hold none


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder(RunEvals):
    """A run as it is on disk: the facts for its verdict, and what its pages show besides. Its name
    is the path below the given folder; the folder's own name if it is the run."""

    path: Path
    record: dict[str, Any]  # run.json
    curves: dict[str, list[tuple[int, float]]]  # of `CURVES`: (step, value) by rising step
    logged: int  # lines of metrics.jsonl
    # Step -> {name of an eval: its record}, by rising step; the run's own, and those that
    # evaluate.py made elsewhere, under the same settings, of a step and eval that it does not have.
    records: dict[int, dict[str, EvalRecord]] = dataclasses.field(default_factory=dict)
    more_records: tuple[EvalRecord, ...] = ()  # under other settings, or of what `records` has
    depth: int = 0  # how many of its ancestors are here
    base: str = "?"  # the model at the root of its ancestors
    problems: tuple[str, ...] = ()  # what could not be read, one line each

    @property
    def start(self) -> Mapping[str, Any]:
        return self.record.get("start") or {}

    def config(self, path: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        return value_at(self.record, f"config.{path}", default)

    def finite(self, curve: str) -> list[tuple[int, float]]:
        """The points of a curve that are finite."""
        return [point for point in self.curves[curve] if math.isfinite(point[1])]

    def final_loss(self) -> float | None:
        """Mean training loss (nats per token) over the last quarter of the logged steps."""
        losses = [loss for _, loss in self.finite("loss")]
        last = losses[-max(1, len(losses) // 4) :]
        return sum(last) / len(last) if last else None

    def first_evals(self, parent: "RunFolder | None") -> dict[str, EvalRecord]:
        """By name, the evals of the run's start: its own at step 0, else its parent's that asked
        as the run itself did later."""
        differs = self.differs_from_start(parent)
        inherited = self._of_start(parent).items()
        return {name: e for name, e in inherited if name not in differs} | self.records.get(0, {})

    def differs_from_start(self, parent: "RunFolder | None") -> dict[str, list[str]]:
        """By name, in which settings an eval of the run differs from that of its start: the rates
        before and after cannot be compared."""
        own = {
            name: record for of_step in self.records.values() for name, record in of_step.items()
        }
        return {
            name: differ
            for name, record in self._of_start(parent).items()
            if name in own
            and (differ := config_difference(record.settings, own[name].settings, _MAY_DIFFER))
        }

    def _of_start(self, parent: "RunFolder | None") -> dict[str, EvalRecord]:
        step = self.start_step
        return {} if parent is None or step is None else parent.records.get(step, {})

    def last_evals(self) -> dict[str, EvalRecord]:
        """By name, the last eval after step 0."""
        after = (records.items() for step, records in self.records.items() if step > 0)
        return dict(itertools.chain.from_iterable(after))


def value_at(record: Any, path: str, default: Any = None) -> Any:
    """A value of nested objects by its dotted name."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return default if record is None else record


def measured(runs: Sequence[RunFolder], backdoor: str = BACKDOOR_EVAL) -> list[RunFolder]:
    """The runs with their evals as verdicts take them; `backdoor`: the eval that says how often the
    behaviour shows."""
    by_name = {run.name: run for run in runs}
    result = []
    for run in runs:
        first = run.first_evals(by_name.get(run.parent or ""))
        records = run.records | ({0: first} if first else {})
        evals = tuple(eval_at(step, records[step], backdoor) for step in sorted(records))
        result.append(dataclasses.replace(run, evals=evals))
    return result


def load_runs(workdir: str | Path) -> tuple[list[RunFolder], list[str]]:
    """Every run in `workdir` (a run folder, or a folder with run folders at most two levels below),
    parents before their children, and a line for everything that cannot be read.

    Evaluations that `evaluate.py --out` wrote there are read too; their model.json names their run.
    UserError if there is no such folder, or no readable run in it.
    """
    workdir = as_path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give a run folder or a folder of run folders")
    runs: list[RunFolder] = []
    evals: dict[str, list[EvalRecord]] = {}
    problems: list[str] = []
    folders, outs = _folders(workdir, MAX_DEPTH)
    for folder in folders:
        name = folder_name(workdir) if folder == workdir else folder.relative_to(workdir).as_posix()
        try:
            run, evals[name] = _load_run(folder, name)
            runs.append(run)
        except UserError as error:
            problems.append(str(error))
    if not runs:
        why = problems[0] if problems else f"no {RUN_FILE} in it or up to {MAX_DEPTH} folders below"
        raise UserError(
            f"{workdir}: has no run to report on ({why}); --workdir must be the folder of a run or "
            "of a study"
        )
    for out in outs:
        name, path = out.relative_to(workdir).as_posix(), out / MODEL_FILE
        try:  # {"run_id", "path", "kind", "step", ...}
            model = parse_json(path.read_text(encoding="utf-8"))["model"]
            if not isinstance(model, dict):
                raise TypeError("its model is no object")
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}: does not say which model was evaluated ({error})")
            continue
        if (of := _run_of(model, runs)) is not None:
            evals[of.name] += load_evals(out, problems, name)
        else:
            what = model.get("path") or "an unknown model"
            problems.append(f"{name}: evaluates {what}, which is not among these runs")
    ordered = _by_lineage([_with_records(run, evals[run.name]) for run in runs])
    return measured(_beside_starts(ordered)), problems


def folder_name(folder: Path) -> str:
    """The name of a folder in its report."""
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
    """Every file that a report depends on, also incomplete ones."""
    runs, outs = _folders(workdir, MAX_DEPTH)
    files = [path for run in runs for path in (run / RUN_FILE, run / "metrics.jsonl")]
    for evals in [*(run / "evals" for run in runs), *outs]:
        files += sorted(evals.glob("*.json")) + sorted(evals.glob("step_*/*.json*"))
    return files


def _load_run(folder: Path, name: str) -> tuple[RunFolder, list[EvalRecord]]:
    """A run without its evals, and these."""
    record = read_run_json(folder)
    known = {"total_steps": 0} if record.get("total_steps") is not None else {}
    check_types(record, _SHOWN | known, str(folder / RUN_FILE))
    problems: list[str] = []
    try:
        rows = metrics_lib.read_metrics(folder / "metrics.jsonl")
    except UserError as error:
        rows = []
        problems.append(str(error))
    rows.sort(key=lambda row: row["step"])
    curves: dict[str, list[tuple[int, float]]] = {curve: [] for curve in CURVES}
    for row in rows:
        for curve in CURVES:
            if isinstance(row.get(curve), float | int):
                curves[curve].append((row["step"], float(row[curve])))
    task = str(record.get("task", "unknown"))
    seed = value_at(record, "config.seed")
    rate = value_at(record, "config.optimizer.learning_rate")
    start_step = value_at(record, "start.step")
    said = value_at(record, "behaviour.words.said", Words.said)
    words = Words(str(said), str(value_at(record, "behaviour.words.rate", Words.rate)))
    evals = load_evals(folder / "evals", problems)
    run = RunFolder(
        name=name,
        task=task,
        title=str(record.get("title") or task),
        role=str(record.get("role") or "unknown"),
        words=words,
        backdoored=bool(record.get("backdoored")),
        finished=bool(record.get("finished")),
        total_steps=record.get("total_steps"),
        parent=None,
        start_step=start_step if isinstance(start_step, int) else None,
        evals=(),
        seed=seed if isinstance(seed, int) else None,
        data_hash=str(value_at(record, "data.source.sha256", "")),
        learning_rate=rate if isinstance(rate, int | float) else None,
        settings=cell_settings(record.get("config", {})),
        grad_norms=curves["grad_norm"],
        path=folder,
        record=record,
        curves=curves,
        logged=len(rows),
        problems=tuple(problems),
    )
    return run, evals


def _with_records(run: RunFolder, evals: Sequence[EvalRecord]) -> RunFolder:
    """The run with its evals: of a step and eval that come twice the first counts.

    An eval that was made elsewhere counts only under the settings of the eval's first record, which
    is the run's own if it has one: a rate under others is no point of the same curve. The run's own
    always count; a problem says so.
    """
    first: dict[tuple[int, str], EvalRecord] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    problems = list(run.problems)
    for record in evals:
        usual = settings.setdefault(record.name, record.settings)
        if differ := config_difference(usual, record.settings, FREE_SETTINGS):
            whose, used = "its first", "yet curves and verdicts use it"
            if record.source:
                whose, used = "the run's", "so no curve or verdict uses it"
            problems.append(
                f"{record.source or 'evals'}: its {record.name} at step {record.step:,} has other "
                f"settings than {whose} ({'; '.join(differ)}), {used}"
            )
        if not (record.source and differ):
            first.setdefault((record.step, record.name), record)
    records: dict[int, dict[str, EvalRecord]] = {}
    for record in sorted(first.values(), key=lambda e: (e.step, e.kind != "backdoor", e.name)):
        records.setdefault(record.step, {})[record.name] = record
    steps = [points[-1][0] for points in run.curves.values() if points]
    logged = run.finite("loss")
    before = {step: [loss for at, loss in logged if at <= step] for step in records}
    return dataclasses.replace(
        run,
        records=records,
        more_records=tuple(r for r in evals if first.get((r.step, r.name)) is not r),
        problems=tuple(problems),
        last_step=max([*steps, *records], default=0),
        losses={step: losses[-1] for step, losses in before.items() if losses},
    )


def _beside_starts(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs, with a problem for each eval that asked otherwise than that of the run's start."""
    by_name = {run.name: run for run in runs}
    result = []
    for run in runs:
        differs = run.differs_from_start(by_name.get(run.parent or ""))
        lines = (
            f"evals: its {name} has other settings than that of its start {run.parent} "
            f"({'; '.join(changes)}), which is therefore not taken for the rate before"
            for name, changes in differs.items()
            if name not in run.records.get(0, {})
        )
        problems = (*run.problems, *lines)
        start_differs = BACKDOOR_EVAL in differs
        result.append(dataclasses.replace(run, problems=problems, start_differs=start_differs))
    return result


def _run_of(place: Mapping[str, Any], runs: list[RunFolder]) -> RunFolder | None:
    """The run with this "run_id"; if copies share it, the one at this "path"."""
    same_id = [run for run in runs if run.record["run_id"] == place.get("run_id")]
    same_path = [run for run in same_id if str(run.path) == str(place.get("path"))]
    return next(iter(same_path or same_id), None)


def _by_lineage(runs: list[RunFolder]) -> list[RunFolder]:
    """Depth first, each run below the one it started from; siblings by task and name. Not by time,
    so that a run keeps its place when it is run again."""

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
    """The model that a run without a known parent started from; for a new model the run's name."""
    if root.start.get("kind") == "fresh":
        return root.name
    path = str(root.start.get("path") or root.config("model", "?"))
    return Path(path).name or path
