"""A study as axes and stages, and its cells: the product of the axes along the graph of stages.

A study file's `get_config` returns a ConfigDict with `axes` (a tuple of `Axis`), `stages` (a tuple
of `Stage`, parents first), and settings of its own, strings that the stages may name.
"""

import dataclasses
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sa_jax.errors import UsageError
from sa_jax.text import scientific

STUDY = "{study}"  # stands in a cell for the study's folder, so that the folder may move
# What a stage runs besides the training tasks of `sa_jax.data.tasks` -> its script.
TOOLS = {
    "toy_data": "scripts/make_toy_data.py",
    "generate_data": "scripts/generate_data.py",
    "evaluate": "scripts/evaluate.py",
    "report": "scripts/report.py",
}
RESERVED = ("cells", "study.json", "status.json")  # of a study's folder (`sa_jax.study.folder`)
START_STEP = "start_step"  # the one override that is not a setting: a checkpoint of the start

Overrides = Mapping[str, Any]
Word = str | int | float
Condition = Mapping[str, Word | Sequence[Word]]


class _Checked:
    """A part of a study that checks the types of its fields."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                kind, name_of_part = type(self).__name__, getattr(self, "name", "")
                words = str(hint).replace("typing.", "").replace("collections.abc.", "")
                raise UsageError(
                    f"{kind} {name_of_part!r}: {name}={str(value)[:60]!r} must be "
                    f"{words if typing.get_args(hint) else hint.__name__}"
                )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a type; a text is not a sequence here, and True is not a number."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return True
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if kind is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if kind is Mapping:
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_fits(key, parts[0]) and _fits(item, parts[1]) for key, item in items)
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Axis(_Checked):
    """Something that varies in a study, and the settings of each of its values."""

    name: str  # in stages and their texts
    values: Mapping[str, Overrides]  # name, a part of folder names -> settings by dotted key


@dataclasses.dataclass(frozen=True)
class Stage(_Checked):
    """One kind of cell. It has a cell for every combination of its axes and those of the stages
    before it, except combinations that `when` does not name.

    In texts (`run`, `config` and the values of `set`), `{study}` is the study's folder, `{axis}`
    the name of the cell's value on an axis, `{stage}` the folder of the cell of an earlier stage,
    and `{setting}` a setting of the study.
    """

    name: str  # the folder of the stage's cells
    run: str  # a training task, or one of `TOOLS`
    config: str = ""  # for a training task, "file.py:argument"
    start: str = ""  # the stage whose run it trains from or evaluates; '' for none
    needs: Sequence[str] = ()  # other stages that must be done before
    axes: Sequence[str] = ()  # those whose values apply their settings in this stage
    when: Condition | Sequence[Condition] = ()  # {axis: value or values}; a tuple is a union
    set: Overrides = dataclasses.field(default_factory=dict)  # of the config, or flags of a tool
    start_rate_at_most: float | None = None  # of the start, triggered; else it is skipped
    topology: str = ""  # the machine of a cell, as `scripts/plan.py` names it; '' for this one
    tokens: float = 0.0  # token slots of a run, if neither its config nor `set` sets the steps


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run, evaluation or data set of a study. In its texts `STUDY` is the study's folder."""

    name: str  # its folder below the study's, and its name in lists
    stage: Stage
    run: str  # the training task or tool
    values: Mapping[str, str]  # axis -> name of its value
    config: str  # for a training task, its config file with argument
    settings: Overrides  # the changes of the config, or the flags of a tool
    start: str  # the folder of the cell that it trains from or evaluates; '' for none
    start_step: int | None  # the start's checkpoint; None for its newest
    parents: tuple[str, ...]  # names of the cells that must be done before

    @property
    def is_training(self) -> bool:
        return self.run not in TOOLS

    @property
    def start_cell(self) -> str:
        """The name of the cell that it starts from; '' for none."""
        return self.start.removeprefix(f"{STUDY}/")


def learning_rates(*rates: float) -> dict[str, Overrides]:
    """Values of an axis: {'lr1e-3': ...}."""
    return {f"lr{scientific(rate)}": {"optimizer.learning_rate": rate} for rate in rates}


def seeds(count: int) -> dict[str, Overrides]:
    """Values of an axis: the seed of the run, and of the sampling noise of its evals."""
    return {f"s{i}": {"seed": i, "eval.seed": i} for i in range(count)}


def lora_ranks(*ranks: int) -> dict[str, Overrides]:
    """Values of an axis: LoRA of these ranks, with alpha twice the rank, so that the scale does not
    change; rank 0 is 'full', all weights."""
    return {
        f"r{rank}" if rank else "full": {"lora.rank": rank, "lora.alpha": 2.0 * (rank or 64)}
        for rank in ranks
    }


def expand(study: ConfigDict) -> list[Cell]:
    """All cells, parents before their children.

    Raises:
      UsageError: not a study, or one without cells; an unknown axis, value, stage or name in a
        text; a stage that comes before one that it needs; two cells that share a folder.
    """
    if "stages" not in study:
        raise UsageError("--config is not a study: it has no `stages` (see configs/toy_study.py)")
    for name, kind in (("axes", Axis), ("stages", Stage)):
        if not _fits(study.get(name, ()), Sequence[kind]):  # type: ignore[valid-type]
            raise UsageError(f"the study's `{name}` must be a tuple of {kind.__name__}")
    axes = {axis.name: axis for axis in study.get("axes", ())}
    settings = {k: str(v) for k, v in study.items() if isinstance(v, str | int | float)}
    _check_names(study, axes, settings)
    cells: dict[str, Cell] = {}
    axes_of: dict[str, dict[str, Axis]] = {}  # of a stage's cells, in the study's order
    # Of a cell: the folders of all its ancestors, by their stage, so that a text may name the data
    # of the data's base model.
    folders: dict[str, dict[str, str]] = {}
    for stage in study.stages:
        before = [name for name in (stage.start, *stage.needs) if name]
        for name in before:
            if name not in axes_of:
                raise UsageError(f"stage {stage.name!r}: the stage {name!r} must come before it")
        for name in stage.axes:
            if name not in axes:
                raise UsageError(f"stage {stage.name!r}: unknown axis {name!r}; {_known(axes)}")
        used = {*stage.axes, *(axis for name in before for axis in axes_of[name])}
        axes_of[stage.name] = {name: axis for name, axis in axes.items() if name in used}
        for values in _assignments(stage, axes_of[stage.name]):
            parents = {
                name: _name(name, {axis: values[axis] for axis in axes_of[name]}) for name in before
            }
            if not cells.keys() >= {*parents.values()}:
                continue  # a stage before it has no cell with these values
            earlier: dict[str, str] = {}
            for name, parent in parents.items():
                earlier |= folders[parent] | {name: f"{STUDY}/{parent}"}
            words = {**settings, **values, **earlier, "study": STUDY}
            cell = _cell(stage, axes, values, parents, words)
            if cell.name in cells:
                other = cells[cell.name]
                raise UsageError(
                    f"two cells would share the folder {cell.name}: {_described(other)}, and "
                    f"{_described(cell)}; give their axis values or stages other names"
                )
            cells[cell.name] = cell
            folders[cell.name] = earlier
    if not cells:
        raise UsageError("the study has no cells: give it stages, and every axis a value")
    return list(cells.values())


def by_stage(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each stage; `expand` has them stage by stage."""
    return {name: [*of] for name, of in itertools.groupby(cells, lambda cell: cell.stage.name)}


def _check_names(study: ConfigDict, axes: Mapping[str, Axis], settings: Mapping[str, str]) -> None:
    stages = [stage.name for stage in study.stages]
    names = [*(axis.name for axis in study.get("axes", ())), *stages, *settings, "study"]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"{name!r} names two things in this study (axes, stages and settings must have "
                "different names, and none may be 'study'); rename one"
            )
    values = [value for axis in axes.values() for value in axis.values]
    for name in (*stages, *axes, *values):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise UsageError(
                f"{name!r} becomes part of a folder's name: use letters, digits and . _ + - only"
            )
    for name in stages:
        if name in RESERVED:
            raise UsageError(
                f"stage {name!r}: a study uses that name for its own records; use another"
            )


def _assignments(stage: Stage, axes: Mapping[str, Axis]) -> Iterator[dict[str, str]]:
    """Every combination of values that `stage.when` names."""
    alternatives = [stage.when] if isinstance(stage.when, Mapping) else stage.when
    conditions = [
        {
            axis: wanted if isinstance(wanted, list | tuple) else (wanted,)
            for axis, wanted in condition.items()
        }
        for condition in alternatives
    ]
    for name, wanted in (item for condition in conditions for item in condition.items()):
        if name not in axes:
            raise UsageError(f"stage {stage.name!r}: `when` names {name!r}; {_known(axes)}")
        for value in wanted:
            if value not in axes[name].values:
                raise UsageError(
                    f"stage {stage.name!r}: `when` names the value {value!r} of the axis "
                    f"{name!r}; {_known(axes[name].values)}"
                )
    for combination in itertools.product(*(axis.values for axis in axes.values())):
        values = dict(zip(axes, combination, strict=True))
        if not conditions or any(
            all(values[name] in wanted for name, wanted in condition.items())
            for condition in conditions
        ):
            yield values


def _cell(
    stage: Stage,
    axes: Mapping[str, Axis],
    values: Mapping[str, str],
    parents: Mapping[str, str],
    words: Mapping[str, str],
) -> Cell:
    """The stage's cell with these values. `parents`: the names of the cells that it needs, by
    stage. `words`: what its texts may name, and the value for each name."""

    def written(value: Any, key: str) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return value.format(**words)
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise UsageError(
                f"stage {stage.name!r}: {key}={value!r} names {error}; {_known(words)}"
            ) from None

    settings: dict[str, Any] = dict(stage.set)
    for name, axis in axes.items():
        if name in stage.axes:
            settings |= axis.values[values[name]]
    start_step = settings.pop(START_STEP, None)
    return Cell(
        name=_name(stage.name, values),
        stage=stage,
        run=written(stage.run, "run"),
        values=values,
        config=written(stage.config, "config"),
        settings={key: written(value, key) for key, value in settings.items()},
        start=f"{STUDY}/{parents[stage.start]}" if stage.start else "",
        start_step=start_step,
        parents=tuple(dict.fromkeys(parents.values())),
    )


def _name(stage: str, values: Mapping[str, str]) -> str:
    return f"{stage}/{'_'.join(values.values())}" if values else stage


def _known(names: Any) -> str:
    return f"known: {', '.join(names) or 'none'}"


def _described(cell: Cell) -> str:
    values = ", ".join(f"{axis}={value}" for axis, value in cell.values.items())
    return f"{cell.stage.name} with {values}" if values else cell.stage.name
