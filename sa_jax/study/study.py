"""The actions of scripts/run_study.py: run a study, list it, forecast it, or write files for a
cluster."""

import contextlib
import dataclasses
import fnmatch
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from sa_jax.buckets import check_places
from sa_jax.errors import UsageError
from sa_jax.files import explained
from sa_jax.study import commands, folder
from sa_jax.study.claims import TAKEOVER_S, Claims
from sa_jax.study.devices import divide
from sa_jax.study.emit import emit
from sa_jax.study.forecast import Forecaster, format_forecast, format_list, local_devices
from sa_jax.study.grid import Cell, expand
from sa_jax.study.processes import Server
from sa_jax.study.progress import DONE
from sa_jax.study.runner import Stop, Worker, states_of
from sa_jax.text import first_few


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of scripts/run_study.py, by the same names; their help explains them."""

    only: str = ""
    shard: str = ""
    workers: int = 1
    launch: Sequence[str] = ()
    takeover_s: float = TAKEOVER_S
    list: bool = False
    dry_run: bool = False
    emit: str = ""


def run_study(study: ConfigDict, workdir: str | Path, options: Options = Options()) -> None:
    """Runs the cells that are not done yet, and goes on after a failure. The same command resumes.

    Args:
      study: see `sa_jax.study.grid`.
      workdir: the study's folder; each cell has the folder of its name in it.
      options: which cells, and how; or `list`, `dry_run` or `emit`, which run none.

    Raises:
      UsageError, UserError: before the first cell, for errors that can be found then; at the end,
        if cells failed, after a line for each.
      Preempted: stopped by a signal, after the cells have stopped.
    """
    check_places("--workdir", workdir)
    workdir = Path(workdir).absolute()
    cells = expand(study)
    folder.check_folder(workdir, cells)
    records = {cell.name: commands.record(cell) for cell in cells}
    claims = Claims(workdir / folder.CLAIMS_FOLDER, options.takeover_s)
    with explained(workdir, "reading the claims of its cells"):
        latest = {cell.name: claims.latest(cell.name) for cell in cells}
        removed = folder.removed_outputs(workdir, cells, latest)
        folder.check_unchanged(workdir, cells, records, latest, removed)
    names = choose(cells, options.only, options.shard)
    chosen = [cell for cell in cells if cell.name in names]
    forecaster = Forecaster(cells, None if options.launch else local_devices(options.workers))
    for cell in chosen:
        forecaster.check_fits(cell)

    if options.list or options.dry_run:
        states = states_of(cells, latest, removed)
        if options.list:
            print(format_list(chosen, states, latest))
        else:
            forecasts = {cell.name: forecaster.forecast(cell) for cell in chosen}
            print(format_forecast(chosen, forecasts, states))
    elif options.emit:
        files, submit = emit(options.emit, chosen, workdir, list(config_flags(sys.argv[1:])))
        print(*files, f"submit: {submit}", sep="\n")
    else:
        states = states_of(cells, latest, removed)
        commands.check_models(cell for cell in chosen if states[cell.name] not in DONE)
        _run(cells, records, names, workdir, claims, removed, options)


def _run(
    cells: Sequence[Cell],
    records: Mapping[str, Mapping[str, Any]],
    chosen: set[str],
    workdir: Path,
    claims: Claims,
    removed: Mapping[str, int],
    options: Options,
) -> None:
    slots = divide(options.workers)
    for cell in cells:
        for missing in commands.missing_files(cell) if cell.name in chosen else ():
            logging.warning("%s will fail: %s: no such file", cell.name, missing)
    folder.open_folder(workdir)
    with Stop() as stop, contextlib.closing(Server()) as server:
        worker = Worker(
            cells, records, chosen, workdir, claims, server, slots, options.launch, removed
        )
        worker.run(stop)


def config_flags(arguments: Sequence[str]) -> Iterator[str]:
    """The --config flags of a command line, each as one word: absl also reads `--config FILE`."""
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, has_value, value = flag.lstrip("-").partition("=")
        if not flag.startswith("-") or name.partition(".")[0] != "config":
            continue
        if not has_value and following and not following.startswith("-"):
            has_value, value = "=", following
        yield f"--{name}{has_value}{value}"


def choose(cells: Sequence[Cell], only: str, shard: str) -> set[str]:
    """Names of the cells that a worker may run: those that match a pattern of `only` ('a/*,b'), and
    of these every n-th (`shard` 'i/n', i from 1), with the cells that they need.

    Raises:
      UsageError: a pattern that matches no cell; a wrong shard.
    """
    names = [cell.name for cell in cells]
    if only:
        patterns = only.split(",")
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                known = first_few(names, 6)
                raise UsageError(f"--only={pattern} matches no cell; there are {known} (--list)")
        names = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not shard:
        return set(names)
    try:
        index, parts = map(int, shard.split("/"))
    except ValueError:
        index, parts = 0, 0
    if not 1 <= index <= parts:
        raise UsageError(f"--shard={shard}: write i/n, with i from 1 to n, such as 2/4")
    parents = {cell.name: cell.parents for cell in cells}
    chosen: set[str] = set()
    pending = names[index - 1 :: parts]
    while pending:
        name = pending.pop()
        if name not in chosen:
            chosen.add(name)
            pending += [] if only else parents[name]
    return chosen
