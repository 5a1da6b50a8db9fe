"""Which meshes, micro-batches and remat policies a step could use, and their estimated cost."""

import dataclasses
import itertools
from collections.abc import Iterator

from sa_jax.errors import UsageError
from sa_jax.llama.model import remat_policies
from sa_jax.parallel.mesh import mixes_rows
from sa_jax.planning.memory import RESERVED, estimated_bytes
from sa_jax.planning.roofline import StepTime, Workload, step_time
from sa_jax.planning.topology import Topology

_REMATS = ("minimal", "full", "offload")  # 'dots' and 'none' keep more than 'minimal', for nothing


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a step."""

    work: Workload
    time: StepTime  # its roofline
    bytes: float  # estimated, per chip

    def describe(self) -> str:
        mesh = " ".join(f"{axis}={size}" for axis, size in self.work.mesh.items())
        return f"{mesh} accumulation={self.work.accumulation} remat={self.work.remat}"


def candidates(work: Workload, topology: Topology) -> list[Candidate]:
    """All candidates whose estimate fits the chip's memory, the fastest first; if none fits, the
    one that needs the least memory. UsageError where no mesh divides the batch and the heads."""
    chip, shape = topology.chip, topology.shape
    options = [
        Candidate(option, step_time(option, chip, shape), estimated_bytes(option, chip))
        for option in _divisions(work, topology)
    ]
    if not options:
        heads = work.architecture.num_kv_heads
        raise UsageError(
            f"no mesh divides {work.batch_size} rows and {heads} key/value heads over "
            f"{work.devices} devices: rows x heads must be a multiple of the devices; use at most "
            f"{work.batch_size * heads} devices, or raise config.batch_size to "
            f"{-(-work.devices // heads)} or a multiple"
        )
    limit = chip.hbm_bytes * (1 - RESERVED)
    fitting = [candidate for candidate in options if candidate.bytes <= limit]

    def order(candidate: Candidate) -> tuple[float, float, float]:
        # Overlap is never complete: among equals, what moves and sends least.
        time = candidate.time
        return round(time.step, 3), round(time.hbm + time.interconnect, 3), candidate.bytes

    return sorted(fitting, key=order) or [min(options, key=lambda c: c.bytes)]


def _divisions(work: Workload, topology: Topology) -> Iterator[Workload]:
    config = work.architecture
    devices = topology.chips * topology.chip.devices // work.slices
    # Whole copies of frozen weights are never gathered; those that train would have copies of the
    # optimizer's state too.
    copies = [1] if work.full_weights else _divisors(devices)
    for tensor, data in itertools.product(_divisors(config.num_kv_heads), copies):
        if devices % (data * tensor) or config.vocab_size % tensor:
            continue
        fsdp = devices // (data * tensor)
        if config.intermediate_size % tensor or config.hidden_size % fsdp:
            continue
        mesh = {"data": data * work.slices, "fsdp": fsdp, "tensor": tensor}
        if not topology.holds((data, fsdp, tensor)) or mixes_rows(mesh):
            continue
        for accumulation in _divisors(work.batch_size):
            if work.batch_size // accumulation % (data * fsdp * work.slices):
                continue
            for remat in filter(remat_policies(topology.platform).__contains__, _REMATS):
                yield dataclasses.replace(work, mesh=mesh, accumulation=accumulation, remat=remat)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
