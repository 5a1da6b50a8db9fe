"""One optimizer step: gradients of the global batch's mean loss, accumulated over micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.llama.lora import combine
from sa_jax.llama.model import CHANGES, Llama, head_kernel
from sa_jax.optim import optimizer_metrics, optimizer_specs
from sa_jax.parallel.rules import partition_specs
from sa_jax.training.loss import cross_entropy_sum


class TrainState(NamedTuple):
    """What a step changes, and a checkpoint holds.

    step: int32 scalar, updates done. params: the trainable leaves (all, or the adapters).
    opt_state: the optimizer's, in float32 whatever the parameters' dtype.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """State before the first step; traceable (use under jit or eval_shape to place it)."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(_float32(params)))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """A tree of NamedSharding like the state (arrays or their shapes), for jit and restore."""
    specs = TrainState(P(), partition_specs(state.params), optimizer_specs(state.opt_state))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def loss_sum(
    model: Llama,
    params: Any,
    batch: dict[str, jax.Array],
    vocab_shards: int = 1,
    changes: Any = None,
) -> jax.Array:
    """Sum of next-token losses over the batch's loss-bearing tokens, float32 scalar (nats).

    Args:
      params: the whole tree.
      batch: int32 [B, S] arrays tokens, targets, loss_mask, positions, segment_ids; loss_mask[t]
        says whether targets[t], the token after tokens[t], counts.
      changes: what is added to kernels after their cast, see `llama.model.CHANGES`.
    """
    hidden_bsd = model.apply(
        {"params": params, **({CHANGES: changes} if changes else {})},
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        method="hidden",
    )
    return cross_entropy_sum(
        hidden_bsd.reshape(-1, hidden_bsd.shape[-1]),
        head_kernel(params, model.config),
        batch["targets"].reshape(-1),
        batch["loss_mask"].reshape(-1),
        vocab_shards=vocab_shards,
    )


def make_train_step(
    model: Llama,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int = 1,
) -> Callable[[TrainState, Any, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `step(state, frozen, batch) -> (state, metrics)`, to be jitted with state donated.

    The loss is sum(nll · mask) / sum(mask) over the whole batch: sums are accumulated over the
    micro-batches and over devices, and divided once, so neither count changes the result.

    Args:
      model: its `mesh` says over how many parts the vocabulary is cut.
      tx: takes and returns float32 trees.
      schedule: learning rate by step, for the metric only.
      accumulation: micro-batches a batch is cut into; must divide its rows.

    Returns:
      step: `frozen` holds the leaves that do not train ({} for full weights). Metrics, float32:
      loss (nats a token), grad_norm (before clipping), learning_rate, loss_tokens, the optimizer's
      own (`optimizer_metrics`), and grad_square_sums [leaves], in the order of
      `jax.tree.leaves(state.params)`.
    """
    vocab_shards = 1 if model.mesh is None else model.mesh.shape["tensor"]

    def step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]):
        # The layers' kernels, nearly all there is, are differentiated after their cast: products
        # give their gradients in that dtype, and the stack of all layers' is kept in it, half of
        # float32's bytes for bfloat16.
        kernels, others = split_kernels(state.params)
        changes = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, model.dtype), kernels)

        def objective(differentiated, micro):
            others, changes = differentiated
            params = combine(combine(kernels, others), frozen)
            return loss_sum(model, params, micro, vocab_shards, changes)

        def value_and_gradients(micro):
            value, gradients = jax.value_and_grad(objective)((others, changes), micro)
            return value, _float32(combine(*gradients))

        def accumulate(carry, micro):
            total, gradients = carry
            value, more = value_and_gradients(micro)
            return (total + value, jax.tree.map(jnp.add, gradients, more)), None

        if accumulation == 1:
            total, gradients = value_and_gradients(batch)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            micros = jax.tree.map(lambda x: _split_rows(x, accumulation), batch)
            (total, gradients), _ = jax.lax.scan(accumulate, (jnp.float32(0), zeros), micros)
        tokens = jnp.sum(batch["loss_mask"], dtype=jnp.float32)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        square_sums = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)])

        # Else XLA prepares the update (copies to other layouts) before the backward pass, whose
        # peak they then live through: 0.8 GiB a chip for 8B on 8 of v5p, 1.6 for 70B on 64.
        gradients, state = jax.lax.optimization_barrier((gradients, state))
        params = _float32(state.params)
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        params = jax.tree.map(
            lambda old, p, u: (p + u).astype(old.dtype), state.params, params, updates
        )
        metrics = {
            "loss": total / tokens,
            "grad_norm": jnp.sqrt(jnp.sum(square_sums)),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "loss_tokens": tokens,
            "grad_square_sums": square_sums,
            **optimizer_metrics(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def split_kernels(params: Any) -> tuple[Any, Any]:
    """The layers' kernels and the rest, each as a tree of its own (see `lora.combine`)."""
    leaves = flatten_dict(params, sep="/")
    kernels = {p: x for p, x in leaves.items() if p.startswith("layers/") and p.endswith("kernel")}
    others = {path: leaf for path, leaf in leaves.items() if path not in kernels}
    return unflatten_dict(kernels, sep="/"), unflatten_dict(others, sep="/")


def _split_rows(x_bs: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B/parts, ...] such that every device's rows spread over all parts."""
    return x_bs.reshape(x_bs.shape[0] // parts, parts, *x_bs.shape[1:]).swapaxes(0, 1)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
