"""SOAP exactly as in the official code (github.com/nikhilvyas/SOAP, commit a1e5535).

It is for comparison with that code and for small models: an eigendecomposition at the first step,
whole factors on every device, no checks. The step, with every tensor rotated along each of its
sides by a basis Q:

    step 0:  GG = (1-sb)·g·gᵀ, Q = eigenvectors of GG, descending; nothing moves
    later:   m, v: Adam's averages of the rotated gradient
             p -= lr·bias·rotate_back(m / (√v + eps)),  then  p -= lr·wd·p
             GG += (1-sb)·(g·gᵀ - GG)
             every f steps: sort Q's columns by diag(QᵀGG Q), v likewise, then Q = qr(GG·Q)
             m is re-expressed in the new basis
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sa_jax.optim.soap_linalg import loops_on_cpu
from sa_jax.optim.soap_shared import (
    Settings,
    adam_moments,
    bias_correction,
    checked_view,
    flatten,
    to_updates,
    unit_rms,
)

_HIGHEST = jax.lax.Precision.HIGHEST

# One entry a side of a tensor: a matrix [n, n], or None for a side without a basis.
Sides = tuple[jax.Array | None, ...]


class OfficialState(NamedTuple):
    """State of `soap(mode="official")`; float32, or float64 for float64 parameters."""

    # Calls so far, int32 (the first one only builds the bases). The name is optax's, and that of a
    # tuple's method.
    count: jax.Array  # type: ignore[assignment]
    mu: Any  # trees like the parameters: Adam's averages, in the rotated bases
    nu: Any
    # For each parameter a tuple with one entry per side: the factor GG and its basis Q (its columns
    # are basis vectors), each [*batch axes, n, n], or None for a side without a basis; () for a
    # parameter that gets Adam. Replace entries of `q` to start from other bases.
    gg: Any
    q: Any


class _Tensor(NamedTuple):
    """The state of one tensor (or parameter)."""

    mu: jax.Array
    nu: jax.Array
    gg: Sides
    q: Sides


def official(settings: Settings) -> optax.GradientTransformation:
    """See `sa_jax.optim.soap.soap`."""

    def init_leaf(path: str, p: jax.Array) -> _Tensor:
        view = checked_view(settings.view, path, p.shape)
        dtype = jnp.promote_types(p.dtype, jnp.float32)
        factors = tuple(
            None
            if side in view.skip or n > settings.max_precond_dim
            else jnp.zeros((*p.shape[: view.batch], n, n), dtype)
            for side, n in enumerate(view.side_sizes(p.shape))
        )
        zeros = jnp.zeros(p.shape, dtype)
        return _Tensor(zeros, zeros, factors, factors)

    def update_leaf(path: str, g: jax.Array, leaf: _Tensor, count: jax.Array):
        """`_step` over the batch axes, on the merged sides of a parameter."""
        view = checked_view(settings.view, path, g.shape)
        step = functools.partial(_step, settings, count)
        for _ in range(view.batch):
            step = jax.vmap(step)
        shape = (*g.shape[: view.batch], *view.side_sizes(g.shape)) if view.sides else g.shape
        leaf = leaf._replace(mu=leaf.mu.reshape(shape), nu=leaf.nu.reshape(shape))
        direction, new = step(g.astype(leaf.mu.dtype).reshape(shape), leaf)
        new = new._replace(mu=new.mu.reshape(g.shape), nu=new.nu.reshape(g.shape))
        return direction.reshape(g.shape), new

    def pack(treedef: Any, count: jax.Array, leaves: list[_Tensor]) -> OfficialState:
        fields = zip(*leaves, strict=True) if leaves else ((),) * len(_Tensor._fields)
        return OfficialState(count, *(treedef.unflatten(field) for field in fields))

    def init(params: optax.Params) -> OfficialState:
        leaves, treedef = flatten(params)
        return pack(
            treedef, jnp.zeros((), jnp.int32), list(map(init_leaf, leaves, leaves.values()))
        )

    def update(grads: optax.Updates, state: OfficialState, params: optax.Params | None = None):
        gradients, treedef = flatten(grads)
        leaves = map(_Tensor, *(treedef.flatten_up_to(tree) for tree in state[1:]))
        done = [
            update_leaf(path, g, leaf, state.count)
            for (path, g), leaf in zip(gradients.items(), leaves, strict=True)
        ]
        directions = treedef.unflatten([direction for direction, _ in done])
        updates = to_updates(settings, directions, params, state.count, state.count > 0)
        count = optax.safe_increment(state.count)
        return updates, pack(treedef, count, [new for _, new in done])

    return optax.GradientTransformation(init, update)


def _step(
    settings: Settings, count: jax.Array, g: jax.Array, tensor: _Tensor
) -> tuple[jax.Array, _Tensor]:
    """One tensor's direction, to be subtracted times the learning rate, and its new state."""
    gg = _moved_factors(g, tensor.gg, settings.shampoo_beta)

    def first() -> tuple[jax.Array, _Tensor]:
        return jnp.zeros_like(g), tensor._replace(gg=gg, q=jax.tree.map(_eigenvectors, gg))

    def later() -> tuple[jax.Array, _Tensor]:
        mu, nu = adam_moments(settings, _rotate(g, tensor.q), tensor.mu, tensor.nu)
        direction = _rotate_back(mu / (jnp.sqrt(nu) + settings.eps), tensor.q)
        if settings.normalize_grads:
            direction = unit_rms(direction)
        direction = direction * bias_correction(settings, count, g.dtype)

        def refresh() -> _Tensor:
            new_nu, q = _refreshed(nu, gg, tensor.q)
            return _Tensor(_rotate(_rotate_back(mu, tensor.q), q), new_nu, gg, q)

        due = count % settings.precondition_frequency == 0
        return direction, jax.lax.cond(due, refresh, lambda: _Tensor(mu, nu, gg, tensor.q))

    return jax.lax.cond(count == 0, first, later)


def _rotate(x: jax.Array, q: Sides) -> jax.Array:
    """x in the bases' coordinates: each side is multiplied by its Qᵀ."""
    for axis, basis in enumerate(q):
        if basis is not None:
            x = jnp.moveaxis(jnp.tensordot(x, basis, (axis, 0), precision=_HIGHEST), -1, axis)
    return x


def _rotate_back(x: jax.Array, q: Sides) -> jax.Array:
    return _rotate(x, jax.tree.map(jnp.transpose, q))


def _moved_factors(g: jax.Array, gg: Sides, beta: float) -> Sides:
    def moved(axis: int, factor: jax.Array) -> jax.Array:
        others = [i for i in range(g.ndim) if i != axis]
        outer = jnp.tensordot(g, g, (others, others), precision=_HIGHEST)
        return factor + (1 - beta) * (outer - factor)

    return tuple(None if a is None else moved(axis, a) for axis, a in enumerate(gg))


@loops_on_cpu
def _eigenvectors(factor: jax.Array) -> jax.Array:
    """Columns, largest eigenvalue first."""
    jitter = 1e-30 * jnp.eye(factor.shape[0], dtype=factor.dtype)
    return jnp.linalg.eigh(factor + jitter)[1][:, ::-1]


@loops_on_cpu
def _orthonormal(y: jax.Array) -> jax.Array:
    return jnp.linalg.qr(y)[0]


def _refreshed(nu: jax.Array, gg: Sides, q: Sides) -> tuple[jax.Array, Sides]:
    """One QR iteration per side; nu's entries follow the sorting of the columns, not the QR."""
    bases: list[jax.Array | None] = list(q)
    for axis, (factor, basis) in enumerate(zip(gg, q, strict=True)):
        if factor is not None and basis is not None:
            power = jnp.matmul(factor, basis, precision=_HIGHEST)
            order = jnp.argsort(-jnp.sum(basis * power, axis=0))
            nu = jnp.take(nu, order, axis=axis)
            bases[axis] = _orthonormal(power[:, order])
    return nu, tuple(bases)
