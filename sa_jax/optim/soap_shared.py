"""What both modes of SOAP share: settings, the views of leaves, Adam's formulas, and updates."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sa_jax.parallel.rules import path_string

# From a leaf's path and number of axes to how it is sharded; `parallel.rules.partition_spec`.
SpecRule = Callable[[str, int], P]


class TensorView(NamedTuple):
    """A parameter as independent tensors, and the sides of each.

    Example: attention weights [L, D, heads, head_dim] are L matrices of D × heads·head_dim:
      TensorView(batch=1, sides=(1, 2)).
    """

    batch: int  # leading axes that count independent tensors (the layers of scanned weights)
    sides: tuple[int, ...]  # consecutive axes that each side merges; (): the parameter gets Adam
    skip: tuple[int, ...] = ()  # indices of sides that never get a basis (the vocabulary's)

    def side_sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Lengths of a tensor's sides."""
        edges = itertools.accumulate((self.batch, *self.sides))
        return tuple(math.prod(shape[start:end]) for start, end in itertools.pairwise(edges))


# From a leaf's path ("layers/attention/q/kernel") and shape to its view.
ViewRule = Callable[[str, tuple[int, ...]], TensorView]

ELEMENTWISE = TensorView(0, ())


def every_axis(path: str, shape: tuple[int, ...]) -> TensorView:
    """Every axis is a side, as in the official code; vectors and scalars get Adam."""
    return TensorView(0, (1,) * len(shape)) if len(shape) > 1 else ELEMENTWISE


def trailing_matrix(path: str, shape: tuple[int, ...]) -> TensorView:
    """The last two axes are a matrix, the axes before count matrices; vectors get Adam."""
    return TensorView(len(shape) - 2, (1, 1)) if len(shape) > 1 else ELEMENTWISE


def checked_view(rule: ViewRule, path: str, shape: tuple[int, ...]) -> TensorView:
    """The rule's view of a leaf; ValueError if it does not fit the shape."""
    view = rule(path, shape)
    fits = not view.sides or view.batch + sum(view.sides) == len(shape)
    if not fits or any(not 0 <= side < len(view.sides) for side in view.skip):
        raise ValueError(f"the view {view} does not fit {path!r} of shape {shape}")
    return view


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


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves by path ('mlp/up/kernel'), in order; and the structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return {path_string(path): leaf for path, leaf in leaves}, treedef


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
    settings: Settings, directions: Any, params: Any, count: jax.Array, moves: jax.Array
) -> Any:
    """-lr·direction, and then the decay of the parameter that this has just moved.

    `count` is the number of calls so far, for the schedule. `moves` is a bool scalar; if it is
    False (as at the first call) nothing decays, and directions must be 0.
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
