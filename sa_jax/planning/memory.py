"""Bytes of a training step on one chip: exact for its arguments, estimated or compiled for its
temporaries; and of a run's checkpoints on the disk."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sa_jax.llama.model import remat_policies
from sa_jax.parallel.hardware import GIB, Chip
from sa_jax.parallel.xla_flags import is_deterministic
from sa_jax.planning.roofline import Workload

# Bytes a trainable parameter that an optimizer's update takes at once, after the backward pass: of
# SOAP gradients, what goes to their owners, directions, and what comes back, all in bfloat16, and
# about 2 bytes for float32 numbers of the matrices at hand.
UPDATE_BYTES = {"soap": 10.0}

# What the runtime and the compiler's program take of a chip's memory, kept free by the search.
RESERVED = 0.05


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip."""

    # The step's arguments. Outputs reuse their memory, because the state is donated.
    parameters: float
    optimizer: float
    frozen: float
    batch: float
    # The temporaries that arithmetic expects; activations are kept for the backward pass.
    gradients: float
    activations: float
    temporaries: float  # all of them, from XLA's memory analysis
    # The most in use at one time, arguments and temporaries; 0 if not compiled. It can be below
    # their sum: not all temporaries exist at the same time, and some reuse donated arguments.
    peak: float
    host: float  # what a step keeps in the host's memory (remat 'offload')
    compiled_arguments: float  # as the compiler counts them; 0 if not compiled
    source: str  # of the temporaries, 'compiled' or 'estimated'
    # Of cuDNN's backward pass, estimated, because a compiler without a GPU does not know it.
    workspace: float = 0.0

    @property
    def arguments(self) -> float:
        return self.parameters + self.optimizer + self.frozen + self.batch

    @property
    def needed(self) -> float:
        """The memory that the chip must have."""
        return (self.peak or self.arguments + self.temporaries) + self.workspace

    def gib(self) -> dict[str, float | str]:
        """All fields and sums, in GiB."""
        fields = dataclasses.asdict(self)
        source = fields.pop("source")
        fields |= {"arguments": self.arguments, "needed": self.needed}
        return {**{name: round(value / GIB, 9) for name, value in fields.items()}, "source": source}


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStruct with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def step_memory(
    work: Workload, state: Any, frozen: Any, batch: Any, devices: int, compiled: Any = None
) -> Memory:
    """The memory of a step.

    Args:
      work: the step, for the estimates.
      state, frozen, batch: its arguments as ShapeDtypeStructs with shardings; `state` has fields
        params and opt_state.
      devices: JAX devices a chip.
      compiled: the executable; None: temporaries are estimated.
    """
    gradients, activations, working, host = estimate_temporaries(work)
    temporaries, peak, arguments = gradients + activations + working, 0, 0
    if compiled is not None:
        analysis = compiled.memory_analysis()
        temporaries, host = analysis.temp_size_in_bytes, analysis.host_temp_size_in_bytes
        peak, arguments = analysis.peak_memory_in_bytes, analysis.argument_size_in_bytes
        device = next(iter(jax.tree.leaves(state.params)[0].sharding.device_set))
        if device.platform == "cpu":
            peak = max(peak, arguments + temporaries)  # XLA's peak of a CPU lacks the temporaries
    return Memory(
        parameters=devices * device_bytes(state.params),
        optimizer=devices * device_bytes(state.opt_state),
        frozen=devices * device_bytes(frozen),
        batch=devices * device_bytes(batch),
        gradients=devices * gradients,
        activations=devices * activations,
        temporaries=devices * temporaries,
        peak=devices * peak,
        host=devices * host,
        compiled_arguments=devices * arguments,
        source="estimated" if compiled is None else "compiled",
    )


def estimate_temporaries(work: Workload) -> tuple[float, float, float, float]:
    """(gradients, activations, the rest, on the host) in bytes on one device, by arithmetic.

    Together with the arguments, they are within 15 % of the peak that XLA allocates for the steps
    in docs/scale.md. The peak is in the backward pass or, with SOAP on many chips, in the update.
    """
    config, size = work.architecture, work.item_bytes
    d, f = config.hidden_size, config.intermediate_size
    qo, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    t = work.mesh["tensor"]
    tokens = work.tokens / work.accumulation / (work.devices / t)  # of one device's rows

    gradients = work.trainable * size / work.shards
    if work.accumulation > 1:
        gradients += work.trainable * 4 / work.shards  # sums are float32
    stream = tokens * d * size / t
    # Of q, k, v, o, gate and up; down's is not asked for again. Kernels of ours keep their output,
    # which cuDNN's and tokamax's compute again.
    attended = 0 if work.attention in ("cudnn", "cudnn_packed", "tokamax") else qo
    products = tokens * (qo + 2 * kv + d + 2 * f + attended) / t * size
    kept = {
        "full": stream,
        "offload": 0.0,
        "minimal": stream + products,
        "dots": stream + products * (1 if work.full_weights else 2),  # an adapter's too
        "none": stream + 2 * products,
    }[work.remat]
    activations = config.num_layers * kept
    host = config.num_layers * stream if work.remat == "offload" else 0.0

    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * d
    layer = (config.num_parameters - embeddings) / config.num_layers
    gathered = 2 * layer * size / t  # this layer's weights and the next one's, or its gradients
    live = 2 * tokens * (2 * d + (2 * qo + 2 * kv + 3 * f) / t) * size
    if work.attention in ("reference", "unrolled"):  # scores, their exponentials and a gradient
        live += 3 * tokens * work.sequence_length * config.num_heads / t * 4
    update = UPDATE_BYTES.get(work.optimizer, 0.0) * work.trainable / work.shards
    return gradients, activations, max(gathered + live, update - gradients - activations), host


def estimated_bytes(work: Workload, chip: Chip) -> float:
    """All bytes that a step needs on one chip, by arithmetic."""
    part = work.of_one_slice()
    frozen = 0 if part.full_weights else part.architecture.num_parameters * part.item_bytes
    state = (part.trainable * part.state_bytes + frozen) / part.shards
    gradients, activations, rest, _ = estimate_temporaries(part)
    return chip.devices * (state + gradients + activations + rest)


def cudnn_workspace(work: Workload) -> float:
    """Bytes per device, by arithmetic: dQ in float32, and two float32 numbers per query; for a
    deterministic backward pass also the scores' gradients in bfloat16 (NVIDIA/cudnn-frontend#398
    ends that, but no jax has it up to 0.12)."""
    config, tensor = work.architecture, work.mesh["tensor"]
    queries = work.tokens / work.accumulation / (work.devices / tensor) * config.num_heads / tensor
    scores = work.sequence_length if is_deterministic() else 0
    return queries * ((config.head_dim + 2) * 4 + scores * 2)


def advice_to_fit(
    memory: Memory, capacity: float, work: Workload, optimizer: Any, platform: str
) -> str:
    """What to change when a step does not fit, the most promising first; `optimizer` is that
    section of the run's config."""
    over = (memory.needed - capacity) / GIB
    large_state = memory.arguments > 0.9 * capacity
    adam_of_all = work.full_weights and optimizer.name == "adam"
    may_offload = work.remat == "full" and "offload" in remat_policies(platform)
    heads_are_left = work.mesh["tensor"] < work.architecture.num_kv_heads
    advice = {
        "more chips": large_state,
        "config.optimizer.mu_dtype=bfloat16 (a sixth of the state)": (
            adam_of_all and optimizer.mu_dtype == "float32"
        ),
        "config.lora.rank=64 (no optimizer state for the base)": work.full_weights and large_state,
        "config.remat=full": work.remat in ("none", "dots", "minimal"),
        "config.remat=offload": may_offload and memory.activations > 0.1 * capacity,
        "config.accumulation (smaller micro-batches)": memory.temporaries > 0.3 * capacity,
        "a larger config.mesh.tensor (shards activations and gathered layers)": heads_are_left,
        "more chips or fewer tokens per step": True,
    }
    remedies = [remedy for remedy, applies in advice.items() if applies][:3]
    return f"{over:.1f} GiB per chip too much; try {'; '.join(remedies)}"


def checkpoint_bytes(config: ConfigDict, total_steps: int, work: Workload) -> dict[str, float]:
    """Bytes of the checkpoints that `training.checkpoints.RunCheckpointer` keeps of a run.

    Of `work`, the run's step, only the number of parameters and the bytes of their state count.

    Returns:
      full_state and weights (bytes of one), full_states and weights_alone (how many are kept), and
      total, at the end of the run. During a save, the checkpoint that it replaces still exists.
    """
    settings, interval = config.checkpoint, config.checkpoint.interval
    reached = {step for step in settings.steps if step <= total_steps}
    regular = {*range(interval, total_steps + 1, interval)} if interval else set()
    if settings.listed == "full":
        always = reached | {total_steps}
        full_states = len(always) + min(settings.keep_interval, len(regular - always))
        weights_alone = 0
    else:
        full_states = min(settings.keep_interval, len(regular | {total_steps}))
        weights_alone = len(reached)
    full_state = round(work.trainable * work.state_bytes)
    item_bytes = 2 if settings.listed == "weights_bf16" else jnp.dtype(config.param_dtype).itemsize
    weights = work.trainable * item_bytes
    return {
        "full_state": full_state,
        "weights": weights,
        "full_states": full_states,
        "weights_alone": weights_alone,
        "total": full_states * full_state + weights_alone * weights,
    }
