"""Arithmetic of a training step: FLOPs, bytes moved and sent, and the lower bound of its time.

All numbers are those of one chip; a mesh axis is one of `parallel.mesh.AXES`. Source of the terms:
"How to Scale Your Model" (https://jax-ml.github.io/scaling-book/), chapters on training and TPUs.
"""

import dataclasses
import math
from collections.abc import Mapping

from sa_jax.llama.config import LlamaConfig
from sa_jax.parallel.hardware import GPUS_A_NODE, Chip
from sa_jax.parallel.mesh import AXES

ASSUMPTIONS = (
    "matrix units at peak; compute, HBM and interconnect fully overlapped: a lower bound on time",
    "weights are gathered over fsdp once a pass (forward, and backward with what it recomputes) "
    "in the dtype of the computation, gradients reduce-scattered once, both per micro-batch",
    "residual stream gathered and reduce-scattered over tensor twice a layer and pass",
    "each mesh axis has the ICI links of the torus dimensions that it fills, both directions",
    "GPUs: NVLink inside a node of 8, one 400 Gbit/s port a GPU between nodes",
    "between copies of the weights, and between slices: gradients once a step, in the dtype of the "
    "computation",
)
# Forward passes' worth of products that the backward pass computes again.
_RECOMPUTED = {"none": 0.0, "dots": 0.0, "minimal": 0.0, "full": 1.0, "offload": 1.0}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step on a mesh."""

    architecture: LlamaConfig
    batch_size: int  # rows per step, over all chips
    sequence_length: int
    accumulation: int  # micro-batches per step
    remat: str  # a key of `llama.model.REMAT_POLICIES`
    mesh: Mapping[str, int]  # sizes of the axes in devices; `data` runs over the slices too
    trainable: int  # parameters that train, all or the adapters'
    attention: str = "splash"
    item_bytes: int = 2  # of the dtype of the computation
    state_bytes: float = 12.0  # per trainable parameter, with the optimizer's state
    slices: int = 1  # connected by the data center's network
    optimizer: str = "adam"

    def of_one_slice(self) -> "Workload":
        """The step of one slice, on its share of the batch."""
        mesh = {**self.mesh, "data": self.mesh["data"] // self.slices}
        rows = self.batch_size // self.slices
        return dataclasses.replace(self, mesh=mesh, batch_size=rows, slices=1)

    @property
    def tokens(self) -> int:
        """Token slots a step."""
        return self.batch_size * self.sequence_length

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def shards(self) -> int:
        """Devices that together hold the weights once; `data` holds copies."""
        return self.mesh["fsdp"] * self.mesh["tensor"]

    @property
    def full_weights(self) -> bool:
        return self.trainable >= self.architecture.num_parameters

    def flops_per_token(self) -> float:
        """FLOPs per token with causal attention, without recomputation (see `LlamaConfig`)."""
        return self.architecture.flops_per_token(self.sequence_length, self.trainable)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Lower bounds in seconds per step: of each resource, and of all overlapped."""

    compute: float
    hbm: float
    interconnect: float
    network: float = 0.0

    @property
    def step(self) -> float:
        return max(self.compute, self.hbm, self.interconnect, self.network)

    @property
    def bound(self) -> str:
        """The resource that limits the step."""
        return max(dataclasses.asdict(self), key=lambda name: getattr(self, name))


def step_time(work: Workload, chip: Chip, shape: tuple[int, ...]) -> StepTime:
    """The roofline of a step on slices of chips laid out in `shape`."""
    if work.slices > 1:
        time = step_time(work.of_one_slice(), chip, shape)
        # The gradients are summed over the slices.
        bandwidth = chip.network_bandwidth / chip.devices
        network = _summed_bytes(work, work.slices) / bandwidth if bandwidth else 0.0
        return dataclasses.replace(time, network=network)
    chips = work.devices / chip.devices
    config = work.architecture
    attention = config.num_layers * config.num_heads * config.head_dim * work.sequence_length
    forward = (work.flops_per_token() - 6 * attention) / (6 if work.full_weights else 4) * 2
    again = _RECOMPUTED[work.remat] * (forward + 2 * attention)
    compute = work.tokens * (work.flops_per_token() + again) / (chips * chip.flops)
    hbm = _hbm_bytes(work) / chip.hbm_bandwidth * chip.devices
    interconnect = sum(
        sent / _axis_bandwidth(work, chip, shape, axis) for axis, sent in _sent_bytes(work).items()
    )
    return StepTime(compute, hbm, interconnect)


def _hbm_bytes(work: Workload) -> float:
    """Bytes that one device reads and writes: weights in each pass, activations, the update."""
    config, t = work.architecture, work.mesh["tensor"]
    passes = 2 + _RECOMPUTED[work.remat] + (1 if work.full_weights else 0)
    gathered = config.num_parameters * work.item_bytes / t  # read, after a gather writes them
    weights = (2 if work.mesh["fsdp"] > 1 else 1) * passes * gathered * work.accumulation
    local_tokens = work.tokens / (work.devices / t)
    # A layer's activations: each product's input and output once a pass, cut over tensor but for
    # the stream.
    heads = 2 * (config.num_heads + config.num_kv_heads)
    cut = heads * config.head_dim + 3 * config.intermediate_size
    features = 4 * config.hidden_size + cut / t
    activations = 2 * passes * config.num_layers * local_tokens * features * work.item_bytes
    update = 2 * work.trainable * work.state_bytes / work.shards
    return weights + activations + update


def _sent_bytes(work: Workload) -> dict[str, float]:
    """Bytes that one device receives over each axis of a slice."""
    config, t, f = work.architecture, work.mesh["tensor"], work.mesh["fsdp"]
    weights = config.num_parameters * work.item_bytes / t
    gradients = weights if work.full_weights else 0
    fsdp = (2 * weights + gradients) * work.accumulation * (f - 1) / f
    local_tokens = work.tokens / (work.devices / t)
    stream = local_tokens * config.hidden_size * work.item_bytes * (t - 1) / t
    # Gather and scatter around attention and around the MLP, in each pass.
    passes = 2 + _RECOMPUTED[work.remat]
    tensor = 4 * passes * config.num_layers * stream
    return {"data": _summed_bytes(work, work.mesh["data"]), "fsdp": fsdp, "tensor": tensor}


def _summed_bytes(work: Workload, copies: int) -> float:
    """Bytes that one device receives to sum the gradients over copies: its part, twice."""
    return 2 * work.trainable * work.item_bytes / work.shards * (copies - 1) / copies


def _axis_bandwidth(work: Workload, chip: Chip, shape: tuple[int, ...], axis: str) -> float:
    """Bytes/s that one device receives in a ring collective over a mesh axis."""
    size = work.mesh[axis]
    if not chip.torus:
        # The mesh's last axis is inside a node; an axis that spans nodes is as fast as the network.
        span = math.prod(work.mesh[name] for name in AXES[AXES.index(axis) :])
        return chip.link_bandwidth if span <= GPUS_A_NODE else chip.network_bandwidth
    # Both directions of a ring where the torus closes, one chain of links where it does not.
    closes = 4 if chip.torus == 3 else 16
    filled, bandwidth = chip.devices, 0.0
    dimensions = sorted(shape) if axis == "tensor" else sorted(shape, reverse=True)
    for length in dimensions:
        if length > 1 and filled < size:
            bandwidth += chip.link_bandwidth * (2 if length % closes == 0 else 1)
            filled *= length
    # Both devices of a chip share its links; inside the chip they are far faster.
    return (bandwidth or 6 * chip.link_bandwidth) / chip.devices
