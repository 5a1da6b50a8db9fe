"""Start-up on one or many hosts."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sa_jax.errors import UserError
from sa_jax.parallel import compilation_cache
from sa_jax.parallel.hardware import visible_devices
from sa_jax.parallel.peers import end_together, start_within
from sa_jax.parallel.xla_flags import missing_kernel
from sa_jax.text import first_line


@contextlib.contextmanager
def joined(
    start_timeout_s: float = 300,
    peer_timeout_s: float = 30,
    resumable: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """A context that begins when all processes of the launch have started; if one ends, all end.

    On a TPU VM jax always looks for other workers, because the list of workers is in the cloud's
    metadata; a single VM is a cluster of one. Elsewhere `several_processes` says whether there are
    others. The compilation cache is turned on. Must be entered before the first use of a device.

    Args:
      start_timeout_s: seconds to wait for the others to start; then the process ends with exit 1
        and a line that says what to check.
      peer_timeout_s, resumable: see `peers.end_together`.

    Raises:
      UserError: the address of the others is wrong; or this TPU is part of a pod, and the process
        was started without that address; or what ran inside needs more memory than a device has,
        or a kernel that XLA_FLAGS forbid.
    """
    _join(start_timeout_s, peer_timeout_s)
    # Watched already while devices are opened, because those of the others are waited for.
    with end_together(peer_timeout_s, resumable, _open_devices):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB" in str(error):
                raise UserError(
                    "JAX may use 64 GB of the host's memory per GPU for checkpoints and offloaded "
                    "arrays; set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB to more"
                ) from error
            # Of a message that is too large, too, the status is RESOURCE_EXHAUSTED.
            if known := missing_kernel(error):
                raise known from error
            if not re.search("RESOURCE_EXHAUSTED(?s:.*)(memory|allocat)", str(error)):
                raise
            raise UserError(
                f"a device has not enough memory: {first_line(error).rstrip('.')}; training needs "
                "less with config.remat='full', a larger config.accumulation or config.mesh.fsdp, "
                "and evals need less with a smaller config.eval.batch_size; scripts/plan.py "
                "--search finds settings that fit (on a GPU, XLA_CLIENT_MEM_FRACTION, 0.92 unless "
                "set, is the share that JAX takes)"
            ) from error


def _join(start_timeout_s: float, peer_timeout_s: float) -> None:
    processes = _count(os.environ, "JAX_NUM_PROCESSES")
    on_tpu = processes not in (0, 1) and visible_devices()[0] == "TPU"
    wanted = several_processes(os.environ) or on_tpu
    if not wanted or jax.distributed.is_initialized():
        return
    process = _count(os.environ, "JAX_PROCESS_ID")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if address and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(
            f"the environment variable JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT"
        )
    try:
        with start_within(start_timeout_s):
            # After its own timeouts jax aborts; they are longer, so that we say first why.
            jax.distributed.initialize(
                num_processes=processes,
                process_id=process,
                local_device_ids=_local_devices(os.environ),
                initialization_timeout=round(2 * start_timeout_s) + 60,
                heartbeat_timeout_seconds=max(100, round(2 * peer_timeout_s)),
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"multi-host start-up failed: {error}. Check the coordinator's address and port "
            "(JAX_COORDINATOR_ADDRESS), and the number of processes"
        ) from error


def _open_devices() -> None:
    devices = jax.devices()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"these devices belong to {jax.process_count()} processes, which are not connected: "
            "on every worker, set JAX_COORDINATOR_ADDRESS to ADDRESS:PORT of the first one"
        )
    compilation_cache.enable()
    mine = f"{jax.local_device_count()} local of {len(devices)} {devices[0].device_kind} devices"
    process = f"process {jax.process_index()} of {jax.process_count()}"
    logging.info("%s, %s, jax %s", process, mine, jax.__version__)


def several_processes(env: Mapping[str, str]) -> bool:
    """Whether a process with these environment variables was launched as one of several.

    True for JAX_COORDINATOR_ADDRESS, for a Slurm step (srun) of several tasks, for Open MPI with
    several ranks, and for a TPU pod that names its workers or slices. JAX_NUM_PROCESSES=1 always
    means a single process. So does a Slurm allocation (salloc, sbatch) without srun. jax itself
    finds the other processes and the index of this one
    (https://docs.jax.dev/en/latest/multi_process.html). UserError for a variable that should be a
    number and is not.
    """
    if _count(env, "JAX_NUM_PROCESSES") in (0, 1):
        return False
    # The shell of an salloc may itself be a step: of one task, in an allocation of several.
    slurm_tasks = min(_count(env, "SLURM_NTASKS") or 1, _count(env, "SLURM_STEP_NUM_TASKS") or 2)
    return (
        bool(env.get("JAX_COORDINATOR_ADDRESS"))
        or (slurm_tasks > 1 and bool(env.get("SLURM_STEP_NODELIST")))
        or (_count(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or bool(env.get("MEGASCALE_COORDINATOR_ADDRESS"))
    )


def _local_devices(env: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this process sees are its own, by their place; [] is all of them.

    Without an answer (None) jax takes one GPU, that of the process's number on its node: of a task
    that has a whole node it would waste the others, and of tasks that Slurm gives their own GPUs
    each (--gpus-per-task, --gpu-bind) the number is beyond those that they see.
    """
    if env.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # jax reads it
    # As in jax, Open MPI first: mpirun may start its daemons by srun, whose variables they inherit.
    rank = _count(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    tasks = _count(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if tasks is None and env.get("SLURM_STEP_NODELIST"):
        rank, tasks = _count(env, "SLURM_LOCALID"), _tasks_of_node(env)
    if rank is None or tasks is None:
        return []
    kind, seen = visible_devices()
    on_node = _count(env, "SLURM_GPUS_ON_NODE") or 0
    own = tasks == 1 or len(seen) < max(tasks, on_node) or env.get("SLURM_GPUS_PER_TASK")
    if kind != "GPU" or own:
        return []
    share = len(seen) // tasks
    return list(range(rank * share, (rank + 1) * share))


def _tasks_of_node(env: Mapping[str, str]) -> int | None:
    """Slurm's "2(x3),1", tasks of the step on each node, for this node; None if it does not say."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]
    node = _count(env, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else None


def _count(env: Mapping[str, str], name: str) -> int | None:
    """The variable as a number; None where it is unset or empty."""
    text = env.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"the environment variable {name}={text!r} must be a number")
    return int(text) if text else None


def is_primary() -> bool:
    """Whether this is the one process that writes run.json, metrics and evals."""
    return jax.process_index() == 0


def agree(value: bool) -> bool:
    """The primary's value, in every process; also waits for all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def exchange(text: str) -> list[str]:
    """Every process's text, in the order of the processes; all must call it."""
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(mine))).reshape(-1)
    padded = np.zeros(max(*lengths, 1), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
