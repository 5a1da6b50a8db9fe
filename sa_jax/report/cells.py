"""Cells: the runs that differ only in their seeds. A claim is made about a cell, over its seeds."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sa_jax import text
from sa_jax.report.judgement import NO_BACKDOOR
from sa_jax.report.measurements import Eval, Measured, RunEvals, Runs
from sa_jax.report.tables import learning_rate
from sa_jax.training.run_record import FREE_KEYS, flat_config

# Settings that cannot change a result beyond rounding, or whose content is recorded under another
# name (the data as a hash). A name covers all settings below it.
NOT_OF_A_CELL = (
    *FREE_KEYS,
    *("seed", "tokenizer", "data", "facts", "wandb"),
    *(f"eval.{name}" for name in ("seed", "prompts", "qa", "data_dir", "names", "steps")),
)
# Where the start is among the runs, its own settings stand for it.
START = "model"
# A run inherits these from its start; where no row holds the trigger they change nothing.
ONLY_OF_TRIGGERED_ROWS = ("backdoor.min_copies", "backdoor.max_copies")

Run = TypeVar("Run", bound=RunEvals)
Results = Mapping[str, Mapping[str, Any]]  # of runs by name, as in results.json


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that differ only in their seeds."""

    key: str  # short, the same for every run of the cell, and different for any other
    role: str
    title: str
    # Dotted name -> value, of the runs and of what they started from: those of the start are
    # prefixed with its role, 'insertion.optimizer.name'.
    settings: Mapping[str, Any]
    runs: tuple[RunEvals, ...]  # by seeds
    seeds: Mapping[str, tuple[int | None, ...]]  # run's name -> its own and its ancestors' seeds
    label: str = ""  # for people: what tells it from the other cells of a report
    lineage: tuple[str, ...] = ()  # roles of the runs' ancestors, the parent's first

    @property
    def replicates(self) -> tuple[RunEvals, ...]:
        """One run for every set of seeds, finished ones first, because a repeat adds nothing."""
        chosen: dict[tuple[int | None, ...], str] = {}
        for run in sorted(self.runs, key=lambda run: not run.finished):
            chosen.setdefault(self.seeds[run.name], run.name)
        return tuple(run for run in self.runs if chosen[self.seeds[run.name]] == run.name)

    def independent(
        self, seeds: Sequence[tuple[int | None, ...]], axes: Collection[str] = ()
    ) -> list[tuple[int | None, ...]]:
        """A key for the seeds of each run; runs are independent if their keys differ.

        Runs from one start share what the start's seed did. So where there are several starts, only
        runs from different ones are independent: the key is the seeds of the oldest ancestor that
        differs between runs, and of its ancestors. Otherwise it is all of a run's seeds. A claim
        about `axes`, settings of ancestors, is about the oldest of these ancestors, so it counts
        like one that differs (except a base model, which is one thing and has no replicates).
        """
        generations = range(1, min(map(len, seeds), default=0))  # 1: the parent
        apart = [g for g in generations if len({of_run[g:] for of_run in seeds}) > 1]
        for generation, role in enumerate(self.lineage, 1):
            if role != "base" and any(axis.startswith(f"{role}.") for axis in axes):
                apart.append(generation)
        return [of_run[max(apart, default=0) :] for of_run in seeds]


def cell_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings of a run's config (nested, as in run.json) that define its cell."""
    return flat_config(config, NOT_OF_A_CELL) if config else {}


def ancestors(run: Run, by_name: Mapping[str, Run]) -> list[Run]:
    """The run's parent, the parent's parent and so on, as far as they are in `by_name`."""
    lineage = {run.name: run}
    parent = by_name.get(run.parent or "")
    while parent is not None and parent.name not in lineage:
        lineage[parent.name] = parent
        parent = by_name.get(parent.parent or "")
    return list(lineage.values())[1:]


def eval_before(run: RunEvals, by_name: Runs) -> Eval | None:
    """The eval of the run's start: its own at step 0, else its parent's at the start's step; if
    only one of the two measured the backdoor, that one. A parent's rate that was measured in
    another way is none."""
    parent = by_name.get(run.parent or "")
    starts = [point for point in run.evals if point.step == 0]
    if parent is not None and not run.start_differs:
        starts += [point for point in parent.evals if point.step == run.start_step]
    measured = [point for point in starts if isinstance(point, Measured)]
    return next(iter(measured or starts), None)


def lineage_settings(run: RunEvals, by_name: Runs) -> dict[str, Any]:
    """The settings of the run and, prefixed with the role, of its ancestors: with the role twice
    for the second of a role."""
    settings: dict[str, Any] = {}
    older = ancestors(run, by_name)
    for place, one in enumerate((run, *older)):
        own = {**one.settings, "task": one.task, "data_hash": one.data_hash}
        own |= {"steps": one.total_steps, "start_step": one.start_step}
        if one.parent in by_name:
            own.pop(START, None)
        prefix = f"{one.role}." * sum(other.role == one.role for other in older[:place])
        settings |= {f"{prefix}{name}": value for name, value in own.items()}
    return settings


def cells(runs: Iterable[RunEvals]) -> list[Cell]:
    """The runs by cell, in the order of each cell's first run."""
    runs = list(runs)
    by_name = {run.name: run for run in runs}
    grouped: dict[str, list[RunEvals]] = {}
    for run in runs:
        roles = [ancestor.role for ancestor in ancestors(run, by_name)]
        settings = [run.role, roles, lineage_settings(run, by_name)]
        described = json.dumps(settings, sort_keys=True, default=str).encode()
        grouped.setdefault(hashlib.sha256(described).hexdigest()[:12], []).append(run)
    result = []
    for key, members in grouped.items():
        seeds = {r.name: tuple(a.seed for a in (r, *ancestors(r, by_name))) for r in members}
        ordered = sorted(members, key=lambda run: (str(seeds[run.name]), run.name))
        first = members[0]
        result.append(
            Cell(
                key,
                first.role,
                first.title,
                lineage_settings(first, by_name),
                tuple(ordered),
                seeds,
                lineage=tuple(ancestor.role for ancestor in ancestors(first, by_name)),
            )
        )
    return result


# Settings that tell a reader most, first.
_TELLING = ("task", "optimizer.name", "optimizer.learning_rate", "lora.rank")


def differing(cells_: Sequence[Cell]) -> list[str]:
    """The settings in which the cells differ, the most important first. Of settings that divide
    the cells in the same way (an optimizer and its constants), only the first."""

    def order(name: str) -> tuple[int, int, str]:
        known = (i for i, end in enumerate(_TELLING) if name.endswith(end))
        return next(known, len(_TELLING)), name.count("."), name

    axes: dict[tuple[int, ...], str] = {}
    for name in sorted({name for cell in cells_ for name in cell.settings}, key=order):
        values = [json.dumps(cell.settings.get(name), default=str) for cell in cells_]
        split = tuple(values.index(value) for value in values)
        if any(split):
            axes.setdefault(split, name)
    return list(axes.values())


def same_but_backdoor(a: RunEvals, b: RunEvals, by_name: Runs) -> tuple[bool, bool]:
    """Whether two probes are the same, from starts that went through the same removal, except
    perhaps for seeds; and whether they have the same seeds too. What came before the removal is not
    compared: there the backdoor makes the difference."""
    start_a, start_b = by_name.get(a.parent or ""), by_name.get(b.parent or "")
    if a.start_step != b.start_step or start_a is None or start_b is None:
        return False, False
    pairs = ((a, b), (start_a, start_b))
    same = all(_training(first) == _training(second) for first, second in pairs)
    return same, same and all(first.seed == second.seed for first, second in pairs)


def _training(run: RunEvals) -> tuple[Any, ...]:
    """The settings of a run, except those that name the start or that only triggered rows use."""
    left_out = (START, *ONLY_OF_TRIGGERED_ROWS)
    settings = {name: value for name, value in run.settings.items() if name not in left_out}
    return run.role, run.task, run.data_hash, run.total_steps, run.learning_rate, settings


# What names a cell among others: key of a run's result, how it reads there.
_NAMES = ("base", "arm", "insertion_optimizer", "optimizer", "learning_rate", "weights")


def labelled(cells: Sequence[Cell], results: Results) -> list[Cell]:
    """The cells with their labels; `results` by name of run."""
    by_title: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        statuses = {results[run.name]["verdict"]["status"] for run in cell.runs}
        never = ", no backdoor" if statuses == {NO_BACKDOOR} else ""
        by_title.setdefault(f"{cell.title}{never}", []).append(i)
    labels = [""] * len(cells)
    for title, members in by_title.items():
        parts: dict[int, list[str]] = {i: [title] for i in members}
        for key in _NAMES:
            values = {i: {_named(key, results[run.name]) for run in cells[i].runs} for i in members}
            if len({*map(frozenset, values.values())}) > 1:
                for i, alike in values.items():
                    if len(alike) == 1 and not alike <= {*parts[i]}:  # more: varies with the seed
                        parts[i] += alike
        # Cells that this does not tell apart differ in a setting: name it.
        for i in members:
            twins = [cells[j] for j in members if parts[j] == parts[i]]
            extra = [_setting(name, cells[i].settings.get(name)) for name in differing(twins)[:3]]
            labels[i] = " · ".join([*parts[i], *extra])
    return [
        dataclasses.replace(cell, label=text.one_line(label))
        for cell, label in zip(cells, labels, strict=True)
    ]


def _setting(name: str, value: Any) -> str:
    """A setting as a label has it; `name` may begin with the role of an ancestor."""
    role, rate, _ = name.rpartition("optimizer.learning_rate")
    if rate and isinstance(value, float):
        return f"{role.replace('.', ' ')}LR {learning_rate(value)}"
    return f"{name} {str(value)[:20]}"


def _named(key: str, result: Mapping[str, Any]) -> str:
    value = result[key]
    if key == "insertion_optimizer" and result["role"] != "insertion":
        return "no insertion" if value == "none" else f"inserted by {value}"
    return f"LR {learning_rate(value)}" if key == "learning_rate" else str(value)
