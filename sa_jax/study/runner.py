"""Runs a study: its runs in order, each from its parent; finished ones are skipped."""

import runpy
from collections.abc import Iterable
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from sa_jax.data.sources import load_rows
from sa_jax.data.toy.study import write_toy_study
from sa_jax.errors import UsageError
from sa_jax.training.config import check_config
from sa_jax.training.loop import train


def run_study(study: ConfigDict, workdir: str | Path) -> None:
    """Runs what is not finished yet; run the same command again to go on.

    Args:
      study: `runs`, a tuple of {name, task, config, parent, overrides}: `config` is a config file
        ("file.py:argument"), `parent` the name of a run before it ('' for none), `overrides` maps
        dotted keys to values, in which '{study}' stands for `workdir` and '{key}' for the study's
        own setting of that name. Optionally `toy_language`, the sizes of a generated data set that
        is written to `workdir`/data first.
      workdir: each run gets the folder of its name below it.

    Raises:
      UserError, UsageError: before the first run, for what can be seen then in the configs and data
        of all; later as `sa_jax.training.loop.train`.
    """
    if "runs" not in study:
        raise UsageError("--config is not a study: it has no `runs` (see configs/toy_study.py)")
    workdir = Path(workdir)
    if "toy_language" in study:
        write_toy_study(workdir / "data", **study.toy_language)
    configs = run_configs(study, workdir)
    check_data(configs.values())  # hours before the run that would stumble over them
    for run in study.runs:
        logging.info("---- %s", run["name"])
        train(configs[run["name"]], workdir / run["name"], run["task"])


def run_configs(study: ConfigDict, workdir: Path) -> dict[str, ConfigDict]:
    """The config of each run, by name.

    Raises:
      UsageError: a parent that is not among the runs before it, a config file or an override that
        does not work.
    """
    names = {"study": workdir, **{k: v for k, v in study.items() if isinstance(v, str)}}
    configs: dict[str, ConfigDict] = {}
    for run in study.runs:
        name, parent = run["name"], run["parent"]
        if parent and parent not in configs:
            raise UsageError(f"run {name!r} of the study: its parent {parent!r} must come first")
        config = load_config(run["config"])
        config.model = str(workdir / parent) if parent else config.model
        for key, value in run["overrides"].items():
            try:
                value = value.format(**names) if isinstance(value, str) else value
                config.update_from_flattened_dict({key: value})
            except (KeyError, TypeError, ValueError, IndexError) as error:
                reason = " ".join(str(error).split())
                raise UsageError(f"run {name!r} of the study: override {key}: {reason}") from None
        check_config(config)
        configs[name] = config
    return configs


def check_data(configs: Iterable[ConfigDict]) -> None:
    """Reads each data file once; raises what `load_rows` does for one that cannot be used."""
    used = {(c.data, tuple(sorted(c.columns.items()))) for c in configs if c.data}
    for path, columns in sorted(used):
        load_rows(path, {name: column for name, column in columns if column})


def load_config(path: str) -> ConfigDict:
    """`get_config()` of a config file, or `get_config(argument)` for "file.py:argument"."""
    path, _, argument = path.partition(":")
    if not Path(path).exists():
        raise UsageError(f"{path}: no such config file (run from the project's root)")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UsageError(f"{path} defines no get_config()")
    return get_config(argument) if argument else get_config()
