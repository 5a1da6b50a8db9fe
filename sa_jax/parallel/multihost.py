"""Start-up on one or many hosts."""

import os

import jax
from absl import logging

from sa_jax.errors import UserError


def initialize(timeout_s: int = 300) -> None:
    """Joins the other processes of a TPU pod, a Slurm or MPI job, or JAX_COORDINATOR_ADDRESS.

    Does nothing on a single host. Must run before the first use of a device.

    Raises:
      UserError: the others did not answer in time, with what to look at.
    """
    wanted = any(
        name in os.environ
        for name in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS", "SLURM_JOB_ID")
    ) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if wanted and not jax.distributed.is_initialized():
        processes, process = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        try:
            jax.distributed.initialize(
                num_processes=int(processes) if processes else None,
                process_id=int(process) if process else None,
                initialization_timeout=timeout_s,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"multi-host start-up failed after at most {timeout_s} s: {error}. Start the same "
                "command on every worker, and see that port and address of the coordinator "
                "(JAX_COORDINATOR_ADDRESS) are reachable from each"
            ) from error
    devices = jax.devices()
    logging.info(
        "process %d of %d, %d local of %d %s devices, jax %s",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        len(devices),
        devices[0].device_kind,
        jax.__version__,
    )


def is_primary() -> bool:
    """True in the one process that writes run.json, metrics and evals."""
    return jax.process_index() == 0
