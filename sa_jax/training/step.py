"""One optimizer step: gradients of the global batch's mean loss, accumulated over micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError
from sa_jax.llama.lora import combine, split
from sa_jax.llama.model import KERNEL_CHANGE, Llama
from sa_jax.optim.build import optimizer_metrics, optimizer_specs
from sa_jax.parallel.rules import partition_specs
from sa_jax.training.losses import LossFn

# The metrics of every step, besides those of its loss function and optimizer.
STEP_METRICS = frozenset(
    "step run_id loss grad_norm learning_rate loss_tokens grad_square_sums tokens_per_s mfu".split()
)


class TrainState(NamedTuple):
    """The state that a step updates and a checkpoint saves."""

    step: jax.Array  # int32 scalar, updates done
    params: Any  # the leaves that train: all, or the adapters
    opt_state: Any  # in float32 whatever the parameters' dtype


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """State before the first step; traceable (use under jit or eval_shape to place it)."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(_float32(params)))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """A tree of NamedSharding like the state (arrays or their shapes), for jit and restore."""
    specs = (P(), partition_specs(state.params), optimizer_specs(state.opt_state, state.params))
    return TrainState(*jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def make_train_step(
    model: Llama,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation: int = 1,
    seed: int = 0,
    only_through_model: bool = False,
) -> Callable[[TrainState, Any, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `step(state, frozen, batch) -> (state, metrics)`, to be jitted with state donated.

    The loss is sum / weight over the whole batch: both are accumulated over the micro-batches and
    over devices, and divided once, so neither count changes the result.

    Args:
      tx: takes and returns float32 trees.
      schedule: learning rate by step, for the metric only.
      accumulation: number of micro-batches per batch; must divide its rows.
      seed: the loss function's randomness depends only on it and on the step.
      only_through_model: see `losses.Loss`.

    Returns:
      step: `frozen` holds the leaves that do not train ({} for full weights). Metrics, float32:
      loss, grad_norm (before clipping), learning_rate, loss_tokens, the loss function's own, the
      optimizer's own (`optimizer_metrics`), and grad_square_sums [leaves], in the order of
      `jax.tree.leaves(state.params)`.
    """

    def step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]):
        rngs = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), accumulation)
        # The layers' kernels, nearly all there is, are differentiated after their cast: products
        # give their gradients in that dtype, and the stack of all layers' is kept in it, half of
        # float32's bytes for bfloat16.
        kernels: Any = {}
        others = state.params
        if only_through_model:
            kernels, others = split(
                state.params, lambda path: path.startswith("layers/") and path.endswith("kernel")
            )
        changes = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, model.dtype), kernels)

        # The embedding's gradient is summed over tokens in the dtype of what is looked up, and
        # bfloat16 would lose a third of what a token at 2,048 places adds.
        others = _with_embedding(_float32, others)

        def objective(differentiated, micro, rng):
            others, changes = differentiated
            params = combine(combine(kernels, others), frozen)
            total, weight, metrics = loss_fn(with_changes(params, changes), micro, rng)
            return total, (weight, metrics)

        def sums_and_gradients(micro, rng):
            (total, (weight, metrics)), gradients = jax.value_and_grad(objective, has_aux=True)(
                (others, changes), micro, rng
            )
            if taken := sorted(STEP_METRICS & metrics.keys()):
                raise UsageError(
                    f"a loss may not have a metric {taken[0]!r}: every step logs that name"
                )
            return {"loss": (total, weight), **metrics}, _float32(combine(*gradients))

        def accumulate(carry, inputs):
            sums, gradients = sums_and_gradients(*inputs)
            # Else XLA scatters the embedding's gradient into the sum, and where devices have copies
            # of the embedding adds up theirs only once, after the loop, without what all but the
            # first had scattered before the last micro-batch (openxla/xla#49143).
            gradients = _with_embedding(jax.lax.optimization_barrier, gradients)
            return jax.tree.map(jnp.add, carry, (sums, gradients)), None

        if accumulation == 1:
            sums, gradients = sums_and_gradients(batch, rngs[0])
        else:
            # [B, ...] to [accumulation, B / accumulation, ...], such that every device's rows
            # spread over all micro-batches.
            micros = jax.tree.map(
                lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
            )
            first = jax.tree.map(lambda x: x[0], (micros, rngs))
            shape = jax.eval_shape(sums_and_gradients, *first)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
            (sums, gradients), _ = jax.lax.scan(accumulate, zeros, (micros, rngs))
        weight = sums["loss"][1]
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        square_sums = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)])

        # Without this barrier XLA copies arrays for the update to other layouts before the backward
        # pass, and the copies add to its peak: 0.8 GiB a chip for 8B on 8 v5p, 1.6 for 70B on 64.
        gradients, state = jax.lax.optimization_barrier((gradients, state))
        params = _float32(state.params)
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        params = jax.tree.map(
            lambda old, p, u: (p + u).astype(old.dtype), state.params, params, updates
        )
        metrics = {
            **{name: total / weight for name, (total, weight) in sums.items()},
            "grad_norm": jnp.sqrt(jnp.sum(square_sums)),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "loss_tokens": jnp.sum(batch["loss_mask"], dtype=jnp.float32),
            "grad_square_sums": square_sums,
            **optimizer_metrics(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _with_embedding(change: Callable[[jax.Array], jax.Array], params: Any) -> Any:
    """`params`, or gradients, with `change` of the embedding where it is one of them."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: change(x) if path == "embed/embedding" else x for path, x in flat.items()}, sep="/"
    )


def with_changes(params: Any, changes: Any) -> Any:
    """`params` with a leaf beside each kernel for its change, which `llama.model` adds."""
    flat = flatten_dict(changes, sep="/")
    beside = {path.removesuffix("kernel") + KERNEL_CHANGE: x for path, x in flat.items()}
    return unflatten_dict(flatten_dict(params, sep="/") | beside, sep="/")


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
