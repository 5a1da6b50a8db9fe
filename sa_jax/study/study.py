"""The actions of scripts/run_study.py: run a study, list it, forecast it, or write files for a
cluster."""

import contextlib
import fnmatch
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from sa_jax.buckets import check_places
from sa_jax.errors import UsageError
from sa_jax.files import explained
from sa_jax.study import commands, folder
from sa_jax.study.claims import Claims
from sa_jax.study.devices import divide
from sa_jax.study.emit import emit as write_files
from sa_jax.study.forecast import Forecaster, format_forecast, format_list, local_devices
from sa_jax.study.grid import Cell, expand
from sa_jax.study.processes import Server
from sa_jax.study.progress import DONE
from sa_jax.study.runner import Worker, states_of
from sa_jax.text import first_few
from sa_jax.training.preemption import StopSignals


def run_study(
    study: ConfigDict,
    workdir: str | Path,
    *,
    only: str,
    shard: str,
    workers: int,
    launch: Sequence[str],
    takeover_s: float,
    list_cells: bool,
    dry_run: bool,
    emit: str,
    config_flags: Sequence[str],
) -> None:
    """Runs the cells that are not done yet, and goes on after a failure. The same command resumes.

    The arguments are those of scripts/run_study.py. `study`: see `sa_jax.study.grid`;
    `config_flags`: the --config flags that make it, for `emit`.

    Raises:
      UsageError, UserError: before the first cell, for errors that can be found then; at the end,
        if cells failed, after a line for each.
      Preempted: stopped by a signal, after the cells have stopped.
    """
    check_places("--workdir", workdir)
    if not takeover_s > 0:  # nor NaN
        raise UsageError(f"--takeover_s={takeover_s}: must be above 0")
    workdir = Path(workdir).absolute()
    cells = expand(study)
    folder.check_folder(workdir, cells)
    configs = {cell.name: commands.resolved(cell) for cell in cells}
    records = {cell.name: commands.record(cell, configs[cell.name]) for cell in cells}
    claims = Claims(workdir / folder.CLAIMS_FOLDER, takeover_s)
    with explained(workdir, "reading the claims of its cells"):
        latest = {cell.name: claims.latest(cell.name) for cell in cells}
        removed = folder.removed_outputs(workdir, cells, latest)
        folder.check_unchanged(workdir, cells, records, latest, removed)
    names = choose(cells, only, shard)
    chosen = [cell for cell in cells if cell.name in names]
    states = states_of(cells, latest, removed)
    forecaster = Forecaster(cells, configs)
    here = None if launch or list_cells or emit else local_devices(workers)
    for cell in chosen:
        is_elsewhere = states[cell.name] in DONE or (dry_run and cell.stage.topology)
        forecaster.check_fits(cell, None if is_elsewhere else here)

    if list_cells:
        print(format_list(chosen, states, latest))
    elif dry_run:
        forecasts = {cell.name: forecaster.forecast(cell) for cell in chosen}
        print(format_forecast(chosen, forecasts, states))
    elif emit:
        files, submit = write_files(emit, chosen, workdir, config_flags)
        print(*files, f"submit: {submit}", sep="\n")
    else:
        folder.check_data(workdir, [cell for cell in cells if states[cell.name] == "done"])
        left = [cell for cell in chosen if states[cell.name] not in DONE]
        commands.check_models(left, configs)
        commands.check_files(left, cells, configs)
        slots = divide(workers, launched=bool(launch))
        folder.open_folder(workdir)
        with StopSignals() as stop, contextlib.closing(Server()) as server:
            Worker(cells, records, names, workdir, claims, server, slots, launch, removed).run(stop)


def choose(cells: Sequence[Cell], only: str, shard: str) -> set[str]:
    """Names of the cells that a worker may run: those that match a pattern of `only` ('a/*,b'), and
    of these every n-th (`shard` 'i/n', i from 1), with the cells that they need. UsageError for a
    pattern that matches no cell, or a wrong shard."""
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
