"""The compiled training step of a config on a mesh: what the loop runs and the plan compiles."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sa_jax.errors import UsageError
from sa_jax.llama.attention import Choice, choose_attention
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.model import (
    REMAT_POLICIES,
    Llama,
    check_mesh,
    remat_policies,
    with_small_kernels_merged,
)
from sa_jax.optim.build import make_optimizer, make_schedule
from sa_jax.parallel.hardware import chip_of
from sa_jax.parallel.mesh import check_divisible, check_rows
from sa_jax.parallel.rules import BATCH_SPEC, abstract, with_shardings
from sa_jax.parallel.xla_flags import Options, check_options, compiler_options
from sa_jax.training.losses import DEFAULT_LOSS, LOSSES, Loss, LossFn
from sa_jax.training.start import abstract_params, lora_config, split_trainable
from sa_jax.training.step import TrainState, init_state, make_train_step, state_shardings

UNROLLED_LAYERS = 16  # of a step on one CPU; a deeper model would take long to compile

BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "loss_mask": jnp.bool_,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step, ready to be compiled."""

    tx: optax.GradientTransformation
    # (state, frozen, batch) as shapes with shardings: what `step` is lowered with. `frozen` are the
    # parameters that do not train.
    arguments: tuple[TrainState, Any, dict[str, jax.ShapeDtypeStruct]]
    state_shardings: Any
    step: Any  # a jitted function
    options: Options  # compiler options of `step`


def attention_of(config: ConfigDict, platform: str) -> Choice:
    """The attention implementation of a config on a platform."""
    length = config.sequence_length
    return choose_attention(config.attention, platform, sequence_length=length, dtype=config.dtype)


def check_remat(remat: str, platform: str) -> None:
    """UsageError for a policy that is wrong on this platform."""
    if remat in REMAT_POLICIES and remat not in remat_policies(platform):
        raise UsageError(
            f"config.remat={remat!r} gives wrong gradients on GPUs with jax {jax.__version__}: "
            "use jax 0.11.1 or later, or config.remat='full'"
        )


def make_model(config: ConfigDict, architecture: LlamaConfig, mesh: Mesh) -> Llama:
    """The model of a config on a mesh; UsageError for settings that cannot work."""
    if config.sequence_length > architecture.max_position_embeddings:
        raise UsageError(
            f"config.sequence_length={config.sequence_length} is more than the model's context of "
            f"{architecture.max_position_embeddings} tokens"
        )
    check_mesh(architecture, mesh)
    check_rows(mesh.shape)
    platform = mesh.devices.flat[0].platform
    check_remat(config.remat, platform)
    micro_batch = config.batch_size // config.accumulation
    check_divisible(mesh, ("data", "fsdp"), micro_batch, "rows of a micro-batch")
    model = Llama(
        architecture,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        attention=attention_of(config, platform).implementation,
        remat=config.remat,
        lora=lora_config(config.lora),
        mesh=mesh,
    )
    trainable, _ = split_trainable(abstract_params(model), model.lora)
    if not jax.tree.leaves(trainable):
        raise UsageError(f"config.lora.targets={config.lora.targets!r} matches no projection")
    make_optimizer(config.optimizer, 1)  # unknown names and settings show here
    LOSSES[config.loss or DEFAULT_LOSS].make(model, config)
    return model


def make_program(config: ConfigDict, model: Llama, total_steps: int) -> Program:
    """The step of `model`, on the model's mesh, for a run of `total_steps`."""
    mesh = model.mesh
    if mesh is None:
        raise ValueError("make_program needs a model on a mesh")
    if config.xla_options:
        check_options(mesh, config.xla_options)
    # Here and not in `make_model`: evals take half as long again with their layers unrolled. And
    # without a loop XLA undoes remat.
    on_one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    few_layers = model.config.num_layers <= UNROLLED_LAYERS
    model = model.clone(unroll=on_one_cpu and few_layers and model.remat == "none")
    tx = make_optimizer(config.optimizer, total_steps, mesh)
    trainable, frozen = split_trainable(abstract_params(model), model.lora)
    # Never updated, so kept in the dtype of the computation (see `start.load_trainable`).
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype), frozen)
    state = jax.eval_shape(lambda params: init_state(params, tx), trainable)
    placed = state_shardings(mesh, state)
    shape, sharding = (config.batch_size, config.sequence_length), NamedSharding(mesh, BATCH_SPEC)
    rows = functools.partial(jax.ShapeDtypeStruct, shape, sharding=sharding)
    batch = {name: rows(dtype) for name, dtype in BATCH_DTYPES.items()}
    device = mesh.devices.flat[0]
    loss = LOSSES[config.loss or DEFAULT_LOSS]
    train_step = make_train_step(
        model,
        _loss_fn(loss, model, config),
        tx,
        make_schedule(config.optimizer, total_steps),
        accumulation=config.accumulation,
        seed=config.seed,
        only_through_model=loss.only_through_model,
    )
    options = compiler_options(device.platform, chip_of(device), config.xla_options)
    step = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(placed, NamedSharding(mesh, P())),
        compiler_options=options or None,
    )
    arguments = with_shardings(state, placed), abstract(mesh, frozen), batch
    return Program(tx, arguments, placed, step, options)


def _loss_fn(loss: Loss, model: Llama, config: ConfigDict) -> LossFn:
    """The loss, of merged weights where these are faster and it does not look at parameters."""
    if not loss.only_through_model:
        return loss.make(model, config)
    merged_model, merge = with_small_kernels_merged(model)
    loss_of_merged = loss.make(merged_model, config)
    return lambda params, batch, rng: loss_of_merged(merge(params), batch, rng)


def begin_compiling(program: Program, mesh: Mesh, *, at_once: bool = True) -> Callable[..., Any]:
    """Begins to compile the step in a thread, and returns a function that waits for it.

    On a TPU compiling takes minutes, in which the weights are loaded and the evals of step 0 run.

    Args:
      at_once: False compiles when the function is first called, for a run that has no step left:
        its process could not end before the thread. On GPUs it is always so, because their compiler
        times kernels on the device, which must be idle.

    Returns:
      `compiled(wait=True)`: it returns the executable, which is called as `program.step`, or raises
      what compiling has raised. With `wait=False` it returns at once, perhaps None.
    """

    def compile_step() -> jax.stages.Compiled:
        return program.step.lower(*program.arguments).compile()

    if not at_once or mesh.devices.flat[0].platform == "gpu":
        compile_once = functools.cache(compile_step)
        return lambda wait=True: compile_once() if wait else None
    future = concurrent.futures.ThreadPoolExecutor(1).submit(compile_step)
    return lambda wait=True: future.result() if wait or future.done() else None
