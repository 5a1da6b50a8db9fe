"""What both modes of SOAP share: settings, leaves by path, Adam's formulas, and optax updates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sa_jax.optim.soap_layout import SpecRule
from sa_jax.optim.soap_views import ViewRule


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `soap`, defaults filled in; from `block_size` on those of the fast mode."""

    learning_rate: optax.ScalarOrSchedule
    b1: float
    b2: float
    shampoo_beta: float
    eps: float
    weight_decay: float
    precondition_frequency: int
    max_precond_dim: int
    correct_bias: bool
    normalize_grads: bool
    mask: Any
    view: ViewRule
    block_size: int
    block_above: int
    dense_steps: int
    refresh_slots: int
    matmul_dtype: Any
    mesh: Mesh | None
    partition_spec: SpecRule | None


def flatten(tree: Any) -> tuple[list[str], list[jax.Array], Any]:
    """(paths such as 'mlp/up/kernel', leaves, structure)."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
    return paths, [leaf for _, leaf in with_paths], treedef


def adam_moments(
    settings: Settings, g: jax.Array, mu: jax.Array, nu: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adam's averages, updated with a gradient."""
    b1, b2 = settings.b1, settings.b2
    return b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * jnp.square(g)


def unit_rms(
    direction: jax.Array,
    largest: Callable[[jax.Array], jax.Array] = jnp.max,
    mean: Callable[[jax.Array], jax.Array] = jnp.mean,
) -> jax.Array:
    """A tensor scaled to a root mean square of 1; zeros stay zeros. `largest` and `mean` reduce an
    array over the axes of a tensor.

    It squares numbers up to 1, because the squares of a very small direction would underflow.
    """
    size = largest(jnp.abs(direction))
    scaled = direction / jnp.where(size == 0, 1, size)
    scaled = scaled / (1e-30 / size + jnp.sqrt(mean(jnp.square(scaled))))
    return jnp.where(size == 0, 0, scaled)


def bias_correction(settings: Settings, t: jax.Array, dtype: Any) -> jax.Array:
    """The factor of the direction of Adam's t-th step (from 1)."""
    if not settings.correct_bias:
        return jnp.ones((), dtype)
    b1, b2, t = jnp.asarray(settings.b1, dtype), jnp.asarray(settings.b2, dtype), t.astype(dtype)
    return jnp.sqrt(1 - b2**t) / (1 - b1**t)


def to_updates(
    settings: Settings,
    directions: Any,
    params: optax.Params | None,
    count: jax.Array,
    moves: jax.Array,
) -> Any:
    """-lr·direction, and then the decay of the parameter that this has just moved.

    Args:
      count: calls so far, for the schedule.
      moves: bool scalar; if it is False (as at the first call) nothing decays, and directions must
        be 0.
    """
    rate = settings.learning_rate
    rate = jnp.asarray(rate(count) if callable(rate) else rate)
    updates = jax.tree.map(lambda d: -rate.astype(d.dtype) * d, directions)
    if isinstance(settings.weight_decay, int | float) and settings.weight_decay == 0:
        return updates
    if params is None:
        raise ValueError(optax.NO_PARAMS_MSG)
    decays = settings.mask(params) if callable(settings.mask) else settings.mask
    decays = jax.tree.broadcast(True if decays is None else decays, params)
    decay = jnp.where(moves, rate * settings.weight_decay, 0)

    def with_decay(u: jax.Array, p: jax.Array, is_decayed: bool) -> jax.Array:
        return u - decay.astype(u.dtype) * (p.astype(u.dtype) + u) if is_decayed else u

    return jax.tree.map(with_decay, updates, params, decays)
