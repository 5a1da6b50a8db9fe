"""What a study needs, by arithmetic: tokens, chip-hours, disk space; and whether its cells fit."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from sa_jax.errors import UsageError, UserError
from sa_jax.llama.config import LlamaConfig
from sa_jax.parallel import mesh
from sa_jax.parallel.hardware import GIB
from sa_jax.planning.memory import checkpoint_bytes, estimated_bytes
from sa_jax.planning.roofline import Workload, step_time
from sa_jax.planning.topology import Topology, parse_topology
from sa_jax.study.claims import Latest
from sa_jax.study.commands import Configs
from sa_jax.study.devices import divide, visible_devices
from sa_jax.study.grid import Cell, by_stage
from sa_jax.study.progress import DONE
from sa_jax.training.plan import workload
from sa_jax.training.start import fresh_architecture, open_start, split_step

# Settings that decide a step's cost; cells that agree in them are worked out once.
_COSTLY = (
    *("architecture", "optimizer", "lora", "mesh", "batch_size", "sequence_length"),
    *("accumulation", "remat", "dtype", "param_dtype", "attention"),
)

_SHOWN: dict[str, Callable[[float], str]] = {  # how a table shows the fields of a `Forecast`
    "tokens": tqdm.format_sizeof,
    "chip_hours": "{:,.1f}".format,
    "bytes": lambda size: tqdm.format_sizeof(size, "B"),
}
_NOTES = """
For the cells that are not done. Tokens are slots, padding included. Chip-hours are
arithmetic, nothing was compiled: a lower bound for training, without sampling for
evals and a teacher's answers. Disk is that of checkpoints. '-': not known here."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The forecast for one cell; None is what is not known, as for the data of a teacher."""

    tokens: float | None = None  # token slots that it trains on
    chip_hours: float | None = None  # lower bound for training (a roofline), without evals and data
    bytes: float | None = None  # of its checkpoints


class Forecaster:
    """Forecasts the cells of a study, once for each shape."""

    def __init__(self, cells: Sequence[Cell], configs: Configs):
        self._cells = {cell.name: cell for cell in cells}
        self._configs = configs
        self._work: dict[str, Workload] = {}

    def check_fits(self, cell: Cell, devices: int | None = None) -> None:
        """UsageError if the cell's mesh is impossible, on its topology or on this many devices;
        UserError if the memory of its topology is too small."""
        config = self._configs[cell.name]
        if config is None:
            return
        if cell.stage.topology:
            self._check_fits_topology(cell, config, parse_topology(cell.stage.topology))
        if devices is not None:
            try:
                mesh_sizes(cell, config, devices)
            except UsageError as error:
                each = f"{error}; each of the --workers has {devices} devices of this machine"
                raise UsageError(f"{each}: use fewer, or another machine") from None

    def _check_fits_topology(self, cell: Cell, config: ConfigDict, topology: Topology) -> None:
        sizes = mesh_sizes(cell, config, topology.chips * topology.chip.devices)
        architecture = self._architecture(cell)
        if architecture is None:
            return
        if architecture.num_kv_heads % sizes["tensor"]:
            raise UsageError(
                f"cell {cell.name} cannot fit its mesh: tensor={sizes['tensor']} does not divide "
                f"{architecture.num_kv_heads} key/value heads"
            )
        work = self._workload(config, architecture, sizes, topology.platform)
        needed = estimated_bytes(work, topology.chip)
        if needed > topology.chip.hbm_bytes:
            remat = "" if config.remat in ("full", "offload") else " config.remat=full,"
            raise UserError(
                f"cell {cell.name} cannot fit its mesh: about {needed / GIB:.0f} GiB a chip of "
                f"{topology.chip.hbm_bytes / GIB:.0f} on {topology.name}; give its stage{remat} "
                "a larger config.accumulation or a larger topology"
            )

    def forecast(self, cell: Cell) -> Forecast:
        config = self._configs[cell.name]
        if config is None:
            return Forecast()
        a_step = config.batch_size * config.sequence_length
        tokens = config.steps * a_step if config.steps else cell.stage.tokens or None
        architecture = self._architecture(cell)
        if tokens is None or architecture is None:
            return Forecast(tokens)
        steps = math.ceil(tokens / a_step)
        hours = None
        if cell.stage.topology:
            topology = parse_topology(cell.stage.topology)
            sizes = mesh_sizes(cell, config, topology.chips * topology.chip.devices)
            work = self._workload(config, architecture, sizes, topology.platform)
            step_s = step_time(work, topology.chip, topology.shape).step
            hours = steps * step_s * topology.chips / 3600
        else:
            work = self._workload(config, architecture, {"data": 1, "fsdp": 1, "tensor": 1}, "cpu")
        return Forecast(tokens, hours, checkpoint_bytes(config, steps, work)["total"])

    def _architecture(self, cell: Cell) -> LlamaConfig | None:
        """The architecture of the model, from the config or from the cell's start; None if the
        model cannot be read here."""
        if cell.start:
            return self._architecture(self._cells[cell.start_cell])
        config = self._configs[cell.name]
        if config is None:
            return None
        if config.architecture:
            return fresh_architecture(config)
        if config.model and Path(split_step(config.model)[0]).is_dir():
            return open_start(config.model).config
        return None

    def _workload(
        self, config: ConfigDict, architecture: LlamaConfig, sizes: dict[str, int], platform: str
    ) -> Workload:
        values = config.to_dict()
        costly = {name: values[name] for name in _COSTLY}
        costly["optimizer"] = {k: v for k, v in costly["optimizer"].items() if "rate" not in k}
        key = json.dumps([costly, architecture.to_hf(), sizes, platform], default=str)
        if key not in self._work:
            self._work[key] = workload(config, architecture, sizes, platform)
        return self._work[key]


def mesh_sizes(cell: Cell, config: ConfigDict, devices: int) -> dict[str, int]:
    """The sizes of the mesh's axes on this many devices; UsageError if they or the batch do not
    divide, or if no run may use such a mesh (`mesh.check_rows`)."""
    try:
        sizes = mesh.mesh_sizes(devices, **config.mesh)
        mesh.check_rows(sizes)
    except UsageError as error:
        raise UsageError(f"cell {cell.name} cannot fit its mesh: {error}") from None
    rows = config.batch_size // config.accumulation
    if rows % (sizes["data"] * sizes["fsdp"]):
        raise UsageError(
            f"cell {cell.name} cannot fit its mesh: {rows} rows do not divide over data x fsdp = "
            f"{sizes['data'] * sizes['fsdp']}"
        )
    return sizes


def local_devices(workers: int) -> int | None:
    """The number of JAX devices of each worker on this machine, without starting any; None for
    TPUs, some of which have two devices a chip."""
    kind, devices = visible_devices()
    if kind != "CPU":
        divide(workers)  # refuses a number that cannot share them
        return len(devices) // workers if kind == "GPU" else None
    flag = r"xla_force_host_platform_device_count=(\d+)"
    forced = re.search(flag, os.environ.get("XLA_FLAGS", ""))
    return int(forced[1]) if forced else 1


def format_forecast(
    cells: Sequence[Cell], forecasts: Mapping[str, Forecast], states: Mapping[str, str]
) -> str:
    """A table of the stages and their sums; finished cells are listed separately."""

    def row(name: str, machine: str, of: Sequence[Cell]) -> tuple[str, ...]:
        left = [forecasts[cell.name] for cell in of if states[cell.name] not in DONE]
        sums = (
            _sum([getattr(forecast, field) for forecast in left], shown)
            for field, shown in _SHOWN.items()
        )
        return name, str(len(of)), str(len(of) - len(left)), machine, *sums

    rows = [
        ("stage", "cells", "done", "machine", "tokens", "chip-hours", "disk"),
        *(row(name, of[0].stage.topology or "here", of) for name, of in by_stage(cells).items()),
        row("sum", "", cells),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if i in (0, 3) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, _NOTES])


def _sum(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return shown(sum(known)) if known else "-"


def format_list(cells: Sequence[Cell], states: Mapping[str, str], latest: Latest) -> str:
    """One line per cell: its state, its name, and its time or its error."""
    width = max(len(cell.name) for cell in cells)
    lines = []
    for cell in cells:
        outcome = latest[cell.name].outcome or {}
        took = outcome.get("seconds")
        said = outcome.get("line") or (tqdm.format_interval(took) if took is not None else "")
        lines.append(f"{states[cell.name]:8} {cell.name:{width}}  {said}".rstrip())
    return "\n".join(lines)
