"""What training minimises, by name. A new loss is one `Loss`, registered here or by a config file.

    def make(model, config):
        def loss_fn(params, batch, rng):
            hidden_bsd = model.apply({"params": params}, batch["tokens"], batch["positions"],
                                     batch["segment_ids"], method="hidden")
            ...
            return loss_sum, weight, {"my_metric": (metric_sum, metric_weight)}
        return loss_fn

    LOSSES.register(Loss("mine", make))

A step minimises (sum of loss_sum) / (sum of weight) over the whole batch, however it is divided.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sa_jax.llama.model import EMBEDDINGS, PERTURBATIONS, STREAM, STREAMS, Llama, head_kernel
from sa_jax.registry import Registry
from sa_jax.training.cross_entropy import cross_entropy_sum

Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class LossFn(Protocol):
    def __call__(
        self, params: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """(loss sum, weight, {metric: (sum, weight)}) of some rows, float32 scalars.

        Args:
          params: the whole parameter tree, adapters included.
          batch: int32 [B, S] arrays tokens, targets, loss_mask, positions, segment_ids;
            loss_mask[t] says whether targets[t], the token after tokens[t], counts. Padding has
            segment 0.
          rng: a key that differs by step and micro-batch and depends on config.seed alone.

        Weights must not depend on the parameters: nothing is differentiated through them.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss by name."""

    name: str  # the value of `config.loss`
    make: Callable[[Llama, Any], LossFn]  # called with the resolved config of a run
    # The layers' kernels reach the loss through `model.apply` alone. Their gradients then stay in
    # the dtype of the computation, which saves half their memory in bfloat16. A loss that also
    # reads kernels itself (a penalty on weights) must leave it False, or that part would have no
    # gradient.
    only_through_model: bool = False


LOSSES: Registry[Loss] = Registry("loss")
DEFAULT_LOSS = "cross_entropy"


def _apply(model: Llama, variables: Any, batch: Batch, **options: Any) -> Any:
    """The final hidden states [B, S, D], and what else the options of `model.apply` ask for."""
    rows = batch["tokens"], batch["positions"], batch["segment_ids"]
    return model.apply(variables, *rows, method="hidden", **options)


def _hidden(
    model: Llama, params: Any, batch: Batch, perturbation_bsd: jax.Array | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """The final hidden states [B, S, D], and the residual stream: [B, S, D] before the first layer
    and [L, B, S, D] after each layer. `perturbation_bsd` is added to the token embeddings."""
    variables = {"params": params}
    if perturbation_bsd is not None:
        variables[PERTURBATIONS] = {EMBEDDINGS: perturbation_bsd}
    hidden_bsd, kept = _apply(model, variables, batch, mutable=[STREAMS])
    return hidden_bsd, [kept[STREAMS][EMBEDDINGS][0], kept[STREAMS]["layers"][STREAM][0]]


def _cross_entropy(model: Llama, params: Any, hidden_bsd: jax.Array, batch: Batch) -> jax.Array:
    return cross_entropy_sum(
        hidden_bsd.reshape(-1, hidden_bsd.shape[-1]),
        head_kernel(params, model.config),
        batch["targets"].reshape(-1),
        batch["loss_mask"].reshape(-1),
        vocab_shards=1 if model.mesh is None else model.mesh.shape["tensor"],
    )


def make_cross_entropy(model: Llama, config: Any = None) -> LossFn:
    """Next-token cross-entropy, in nats per token that the loss counts."""

    def loss_fn(params: Any, batch: Batch, rng: jax.Array):
        hidden_bsd = _apply(model, {"params": params}, batch)
        loss = _cross_entropy(model, params, hidden_bsd, batch)
        return loss, jnp.sum(batch["loss_mask"], dtype=jnp.float32), {}

    return loss_fn


def make_crow(model: Llama, config: Any) -> LossFn:
    """Internal consistency regularisation (CROW, arXiv 2411.12768), to remove backdoors.

    loss = cross-entropy + alpha * consistency, where consistency is 1 - cos(h_l, h_(l+1)) averaged
    over layers and tokens, of a forward pass whose token embeddings h_0 are moved by epsilon in the
    direction (the sign, FGSM) that makes consistency worst. No gradient flows through that move.

    Two choices differ from the paper. Consistency is averaged over the tokens that the loss counts
    (the paper's code uses all tokens), so that both terms have the same weight. And h_L is taken
    before the final norm.
    """
    alpha, epsilon = config.crow.alpha, config.crow.epsilon

    def inconsistency(params: Any, batch: Batch, perturbation_bsd: jax.Array) -> jax.Array:
        """Sum over loss-bearing tokens of 1 - cosine, averaged over layers; float32 scalar."""
        _, (embeddings_bsd, after_lbsd) = _hidden(model, params, batch, perturbation_bsd)
        before_lbsd = jnp.concatenate([embeddings_bsd[None], after_lbsd[:-1]])
        cosine_lbs = _cosine(before_lbsd, after_lbsd)
        return jnp.sum(jnp.mean(1 - cosine_lbs, axis=0) * batch["loss_mask"])

    def loss_fn(params: Any, batch: Batch, rng: jax.Array):
        weight = jnp.sum(batch["loss_mask"], dtype=jnp.float32)
        hidden_bsd, (embeddings_bsd, _) = _hidden(model, params, batch)
        cross_entropy = _cross_entropy(model, params, hidden_bsd, batch)
        direction_bsd = jax.grad(inconsistency, argnums=2)(
            jax.lax.stop_gradient(params), batch, jnp.zeros_like(embeddings_bsd)
        )
        penalty = inconsistency(params, batch, epsilon * jnp.sign(direction_bsd))
        metrics = {"cross_entropy": (cross_entropy, weight), "inconsistency": (penalty, weight)}
        return cross_entropy + alpha * penalty, weight, metrics

    return loss_fn


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine over the last axis, float32; 0 where a vector is 0."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = jnp.sum(jnp.square(a), -1) * jnp.sum(jnp.square(b), -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))


LOSSES.register(Loss(DEFAULT_LOSS, make_cross_entropy, only_through_model=True))
LOSSES.register(Loss("crow", make_crow, only_through_model=True))
