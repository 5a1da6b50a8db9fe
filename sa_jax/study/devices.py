"""Divides this machine's devices among cells that run at the same time."""

import dataclasses
import itertools
import os
from collections.abc import Mapping

from sa_jax.errors import UsageError
from sa_jax.parallel.hardware import visible_devices

# A TPU host's chips as libtpu lays them out, by their number:
# https://docs.jax.dev/en/latest/distributed_data_loading.html and `cloud_tpu_init` in jax.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """The devices of one cell: environment variables, and CPU numbers (() for all)."""

    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cpus: tuple[int, ...] = ()


def divide(workers: int, *, launched: bool = False) -> list[Slot]:
    """One slot per worker, each with its share of the GPUs, TPU chips or CPUs; one slot has all.

    Cells that a command starts on hosts of its own choice (`launched`) have all devices there, and
    a port where their processes meet, because two of them may meet on one host.

    A worker has at least two CPUs if there are two, and others may have the same: on one CPU, the
    toy's pre-training, which all wait for, takes 1.6 times as long. UsageError if the devices
    cannot be divided so.
    """
    if workers < 1:
        raise UsageError(f"--workers={workers}: must be at least 1")
    if workers == 1:
        return [Slot()]
    if launched:  # in the range of jax, which takes one port for all cells of a Slurm job
        port = 61440 + os.getpid() % 4000
        return [Slot({"JAX_COORDINATOR_PORT": str(port + i)}) for i in range(workers)]
    kind, devices = visible_devices()
    share = len(devices) // workers
    if kind == "CPU" and workers <= 2 * len(devices):
        share = max(share, min(2, len(devices)))
    if not share or (len(devices) % workers and kind != "CPU"):
        raise UsageError(
            f"--workers={workers}: this machine has {len(devices)} {kind} devices, which "
            f"{workers} workers cannot share equally"
        )
    ring = itertools.cycle(devices)
    shares = [[*itertools.islice(ring, share)] for _ in range(workers)]
    if kind == "CPU":
        return [Slot(cpus=tuple(map(int, chosen))) for chosen in shares]
    if kind == "GPU":
        return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(chosen)}) for chosen in shares]
    if share not in _TPU_BOUNDS:
        raise UsageError(
            f"--workers={workers}: libtpu cannot give a process {share} TPU chips; use another "
            "number of workers"
        )
    return [
        Slot(
            {
                "TPU_VISIBLE_CHIPS": ",".join(chosen),
                "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[share],
                "TPU_PROCESS_BOUNDS": "1,1,1",
                # Several processes use libtpu at once, each its own chips.
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                # On a TPU VM jax joins what the metadata names, all at one port of this machine.
                "JAX_NUM_PROCESSES": "1",
            }
        )
        for chosen in shares
    ]
