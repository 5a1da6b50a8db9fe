"""From a cell to the command that runs it, and to the record that determines its result."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sa_jax.config_files import load_config
from sa_jax.data.behaviours import BEHAVIOURS
from sa_jax.data.tasks import TASKS
from sa_jax.errors import UsageError, UserError
from sa_jax.evals.catalogue import check_eval
from sa_jax.evals.protocol import EVALS
from sa_jax.optim.build import OPTIMIZERS, make_optimizer
from sa_jax.registry import extension_digests
from sa_jax.study.grid import STUDY, TOOLS, Cell
from sa_jax.training import start as start_lib
from sa_jax.training.config import check_config, default_config, override
from sa_jax.training.losses import LOSSES
from sa_jax.training.run_record import FREE_KEYS, flat_config

_TRAINING_SCRIPTS = {"base": "scripts/pretrain.py", "insertion": "scripts/insert_backdoor.py"}
_DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")


def command(cell: Cell, workdir: str | Path) -> tuple[str, ...]:
    """The command of a cell: a script of this project and its flags, without the interpreter."""
    folder = f"{STUDY}/{cell.name}"
    if cell.is_training:
        script = _TRAINING_SCRIPTS.get(TASKS[cell.run].role, "scripts/remove_backdoor.py")
        settings = dict(cell.settings)
        arguments = [f"--config={cell.config}", f"--workdir={folder}"]
        start = _start(cell) or settings.pop("model", "")
        if script == "scripts/remove_backdoor.py":
            arguments += [f"--method={cell.run}", f"--init_from={start}"]
        else:
            arguments.append(f"--task={cell.run}")
            arguments += [f"--config.model={start}"] if start else []
        arguments += [f"--config.{key}={_text(value)}" for key, value in settings.items()]
    else:
        script, settings = TOOLS[cell.run], dict(cell.settings)
        if cell.run == "report":
            settings = {"workdir": STUDY, **settings}
        elif cell.run != "evaluate":
            settings = {"out": folder, **settings}
        elif cell.start:
            settings = {"model": cell.start, "step": cell.start_step, **settings}
        arguments = [f"--{k}={_text(v)}" for k, v in settings.items() if v is not None]
    return tuple(part.replace(STUDY, str(workdir)) for part in (script, *arguments))


def _start(cell: Cell) -> str:
    return f"{cell.start}@{cell.start_step}" if cell.start_step is not None else cell.start


def _text(value: Any) -> str:
    """A value as the text of a flag: texts unchanged, other values as Python writes them."""
    return value if isinstance(value, str) else repr(value)


def record(cell: Cell) -> dict[str, Any]:
    """Everything that determines the cell's result, flat and JSON-able; cells with equal records
    are the same.

    For a training cell it is the whole resolved config, without the settings that a resume may
    change, and the digests of the files that registered what the cell uses. UsageError for a task,
    config file or setting that does not exist, or an impossible value.
    """
    start = {"start": _start(cell)} if cell.start else {}
    if not cell.is_training:
        return {"run": cell.run, **start, **cell.settings, **_tool_extensions(cell)}
    config = resolved(cell)
    flat = flat_config(config, FREE_KEYS)
    kept = {key: value for key, value in flat.items() if value != {}}
    return {"run": cell.run, **start, **kept, **_extensions(cell.run, config)}


def _extensions(task: str, config: ConfigDict) -> dict[str, str]:
    """The digests (see `Registry.extension`) of everything that a training cell names."""
    return {
        **TASKS.extension(task),
        **LOSSES.extension(config.loss or TASKS[task].loss),
        **BEHAVIOURS.extension(config.backdoor.behaviour or ""),
        **OPTIMIZERS.extension(config.optimizer.name),
        **{k: v for name in config.eval.names for k, v in EVALS.extension(name).items()},
    }


def resolved(cell: Cell) -> ConfigDict:
    """The config of a training cell, checked: a UsageError names the cell and the setting."""
    config = default_config()
    if cell.config:  # read first: it may register the task
        try:
            config = override(load_config(cell.config))
        except UsageError as error:
            raise UsageError(f"cell {cell.name}: {error}") from None
    if cell.run not in TASKS:
        known = ", ".join((*TASKS.names(), *TOOLS))
        raise UsageError(f"cell {cell.name}: unknown run {cell.run!r}; known: {known}")
    if not cell.config:
        raise UsageError(f"cell {cell.name}: its stage has no `config` for the task {cell.run}")
    config.model = cell.start or config.model
    for key, value in cell.settings.items():
        try:
            # A flag sets no key that the config lacks, where an unlocked part of it would take it.
            functools.reduce(lambda part, name: part[name], key.split("."), config)
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"cell {cell.name}: the setting {key}: {reason}") from None
    try:
        check_config(config)
        make_optimizer(config.optimizer, 1)  # these refuse a name that nobody registers
        if config.loss:
            LOSSES[config.loss]
        if config.backdoor.behaviour:
            BEHAVIOURS[config.backdoor.behaviour]
        for name in config.eval.names:
            check_eval(name)
    except UsageError as error:
        raise UsageError(f"cell {cell.name}: {error}") from None
    return config


def _tool_extensions(cell: Cell) -> dict[str, str]:
    """The digest of a tool's own config file, if it registers something; UsageError if it cannot be
    read, or nobody registers an eval that the cell names."""
    path = str(cell.settings.get("config", ""))
    try:
        if path:
            load_config(path)
        for name in filter(None, str(cell.settings.get("evals", "")).split(",")):
            check_eval(name)
    except UsageError as error:
        raise UsageError(f"cell {cell.name}: {error}") from None
    digest = extension_digests().get(path.partition(":")[0])
    return {"extension.config": digest} if digest else {}


def missing_files(cell: Cell) -> list[str]:
    """Data files that the cell names, that no cell makes, and that do not exist."""
    if not cell.is_training:
        return []
    config = resolved(cell)
    named = {config.data, config.facts, config.eval.prompts, config.eval.qa}
    files = [name for name in named if name.endswith(_DATA_FILES) and not name.startswith(STUDY)]
    return sorted(name for name in files if "://" not in name and not Path(name).exists())


def check_models(cells: Iterable[Cell]) -> None:
    """UsageError for a model that a cell trains from or evaluates, that no cell makes, and that is
    no model: found before the first cell, and not by the first that needs it."""
    of_model: dict[str, str] = {}
    for cell in cells:
        model = str(cell.start or cell.settings.get("model", "")) if cell.run == "evaluate" else ""
        if cell.is_training:
            config = resolved(cell)
            model = config.model
            if not model:
                start_lib.fresh_start(config)
        if model and not model.startswith(STUDY) and not start_lib.on_hub(model):
            of_model.setdefault(model, cell.name)
    for model, name in of_model.items():
        try:
            start_lib.open_start(model)
        except UserError as error:
            raise UsageError(f"the model of cell {name}: {error}") from None
