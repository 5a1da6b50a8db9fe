"""From a cell to the command that runs it, and to the record that determines its result."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sa_jax.config_files import load_config, plain, unknown_setting
from sa_jax.data.behaviours import BEHAVIOURS
from sa_jax.data.readers import is_missing
from sa_jax.data.tasks import TASKS
from sa_jax.errors import UsageError, UserError
from sa_jax.evals.catalogue import check_eval
from sa_jax.evals.protocol import EVALS
from sa_jax.optim.build import OPTIMIZERS, make_optimizer
from sa_jax.registry import code_digest, extension_digests
from sa_jax.study.grid import STUDY, TOOLS, Cell
from sa_jax.text import first_few
from sa_jax.training import start as start_lib
from sa_jax.training.config import check_config, override
from sa_jax.training.losses import LOSSES
from sa_jax.training.run_record import FREE_KEYS, flat_config

_TRAINING_SCRIPTS = {"base": "scripts/pretrain.py", "insertion": "scripts/insert_backdoor.py"}

# Name of a cell -> its config from `resolved`; None for a cell that does not train.
Configs = Mapping[str, ConfigDict | None]


def command(cell: Cell, workdir: str | Path) -> tuple[str, ...]:
    """The command of a cell: a script of this project and its flags, without the interpreter."""
    folder = f"{STUDY}/{cell.name}"
    settings = dict(cell.settings)
    flags: dict[str, Any]
    if cell.is_training:
        script = _TRAINING_SCRIPTS.get(TASKS[cell.run].role, "scripts/remove_backdoor.py")
        start = _start(cell) or settings.pop("model", "")
        flags = {"config": cell.config, "workdir": folder}
        if script == "scripts/remove_backdoor.py":
            flags |= {"method": cell.run, "init_from": start}
        else:
            flags["task"] = cell.run
            if start:
                flags["config.model"] = start
        flags |= {f"config.{key}": value for key, value in settings.items()}
    else:
        script = TOOLS[cell.run]
        if cell.run == "report":
            flags = {"workdir": STUDY}
        elif cell.run == "evaluate":
            flags = {"model": cell.start, "step": cell.start_step} if cell.start else {}
        else:
            flags = {"out": folder}
        flags = {name: value for name, value in (flags | settings).items() if value is not None}
    words = (f"--{k}={v if isinstance(v, str) else repr(v)}" for k, v in flags.items())
    return tuple(word.replace(STUDY, str(workdir)) for word in (script, *words))


def _start(cell: Cell) -> str:
    return f"{cell.start}@{cell.start_step}" if cell.start_step is not None else cell.start


def record(cell: Cell, config: ConfigDict | None) -> dict[str, Any]:
    """Everything that determines the cell's result, flat and JSON-able; cells with equal records
    are the same.

    For a training cell it is the whole config, without the settings that a resume may change, and
    the digests (see `Registry.extension`) of the files that registered what the cell uses. For any
    other cell it is the settings, and such a digest of its config file if that registers something.
    """
    start = {"start": _start(cell)} if cell.start else {}
    if config is None:
        file = str(cell.settings.get("config", "")).partition(":")[0]
        registers = file in extension_digests()
        extension = {"extension.config": code_digest(file)} if registers else {}
        return {"run": cell.run, **start, **cell.settings, **extension}
    flat = flat_config(config, FREE_KEYS)
    return {
        "run": cell.run,
        **start,
        **{key: value for key, value in flat.items() if value != {}},
        **TASKS.extension(cell.run),
        **LOSSES.extension(config.loss or TASKS[cell.run].loss),
        **BEHAVIOURS.extension(config.backdoor.behaviour or ""),
        **OPTIMIZERS.extension(config.optimizer.name),
        **{k: v for name in config.eval.names for k, v in EVALS.extension(name).items()},
    }


def resolved(cell: Cell) -> ConfigDict | None:
    """The checked config of a training cell. Of any other cell it checks the config file and the
    evals, and returns None.

    Raises:
      UsageError: a task, config file, setting or name that does not exist, or an impossible value;
        the message names the cell.
    """
    try:
        if cell.is_training:
            return _training_config(cell)
        if path := str(cell.settings.get("config", "")):
            load_config(path)
        for name in filter(None, str(cell.settings.get("evals", "")).split(",")):
            check_eval(name, str(cell.settings.get("config.eval.tasks", "")))
        return None
    except UsageError as error:
        raise UsageError(f"cell {cell.name}: {error}") from None


def _training_config(cell: Cell) -> ConfigDict:
    # Read first: it may register the task.
    config = override(load_config(cell.config)) if cell.config else None
    if cell.run not in TASKS:
        known = ", ".join((*TASKS.names(), *TOOLS))
        raise UsageError(f"unknown run {cell.run!r}; known: {known}")
    if config is None:
        raise UsageError(f"its stage has no `config` for the task {cell.run}")
    config.model = cell.start or config.model
    for key, value in cell.settings.items():
        try:
            # A flag sets no key that the config lacks, where an unlocked part of it would take it.
            functools.reduce(lambda part, name: part[name], key.split("."), config)
            config.update_from_flattened_dict({key: value})
        except KeyError:
            raise UsageError(unknown_setting(config, key, prefix="")) from None
        except (TypeError, ValueError) as error:
            raise UsageError(f"the setting {key}: {plain(error)}") from None
    check_config(config)
    make_optimizer(config.optimizer, 1)  # these refuse a name that nobody registers
    if config.loss:
        LOSSES[config.loss]
    if config.backdoor.behaviour:
        BEHAVIOURS[config.backdoor.behaviour]
    for name in config.eval.names:
        check_eval(name, config.eval.tasks)
    return config


def check_files(left: Iterable[Cell], cells: Iterable[Cell], configs: Configs) -> None:
    """UsageError for data files that the training cells in `left` name, that none of `cells` makes,
    and that do not exist: found before the first cell, and not by the first that needs them."""
    made = [str(cell.settings["out"]) for cell in cells if "out" in cell.settings]
    missing: dict[str, str] = {}
    for cell in left:
        if (config := configs[cell.name]) is None:
            continue
        for name in (config.data, config.facts, config.eval.prompts, config.eval.qa):
            elsewhere = name.startswith(STUDY) or "://" in name
            elsewhere = elsewhere or any(Path(name).is_relative_to(folder) for folder in made)
            if name and not elsewhere and is_missing(name):
                missing.setdefault(name, cell.name)
    if missing:
        lines = [f"{name} (of cell {cell})" for name, cell in missing.items()]
        raise UsageError(f"no such file: {first_few(lines, 4)}")


def check_models(cells: Iterable[Cell], configs: Configs) -> None:
    """UsageError for a model that a cell trains from or evaluates, that no cell makes, and that is
    no model: found before the first cell, and not by the first that needs it."""
    of_model: dict[str, str] = {}
    for cell in cells:
        model = str(cell.start or cell.settings.get("model", "")) if cell.run == "evaluate" else ""
        if (config := configs[cell.name]) is not None:
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
