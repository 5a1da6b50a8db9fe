"""SOAP to the letter of the official code (github.com/nikhilvyas/SOAP, commit a1e5535).

Meant for parity and small models: an eigendecomposition at the first step, whole factors on every
device, no guard. The step, with every tensor rotated along each of its sides by a basis Q:

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

from sa_jax.optim.soap_views import TensorView, ViewRule, checked_view

_HIGHEST = jax.lax.Precision.HIGHEST


class OfficialState(NamedTuple):
    """State of `soap(mode="official")`; float32, or float64 for float64 parameters.

    count: int32 scalar, calls so far (the first one only builds the bases).
    mu, nu: trees like the parameters: Adam's averages, in the rotated bases.
    gg, q: for each parameter a tuple with one entry a side: the factor GG and its basis Q (columns
      are basis vectors), each [*batch axes, n, n], or None for a side without a basis; () where
      Adam is all there is. Replace entries of `q` to start from other bases.
    """

    count: jax.Array
    mu: Any
    nu: Any
    gg: Any
    q: Any


class _Leaf(NamedTuple):
    """What one parameter's update needs and gives."""

    mu: jax.Array
    nu: jax.Array
    gg: tuple[jax.Array | None, ...]
    q: tuple[jax.Array | None, ...]


def official(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float,
    b2: float,
    shampoo_beta: float,
    eps: float,
    weight_decay: float,
    mask: Any,
    precondition_frequency: int,
    max_precond_dim: int,
    correct_bias: bool,
    normalize_grads: bool,
    view: ViewRule,
) -> optax.GradientTransformation:
    """See `sa_jax.optim.soap.soap`."""

    def factors(view: TensorView, p: jax.Array) -> tuple[jax.Array | None, ...]:
        return tuple(
            None
            if side in view.skip or n > max_precond_dim
            else jnp.zeros((*p.shape[: view.batch], n, n), state_dtype(p))
            for side, n in enumerate(view.side_sizes(p.shape))
        )

    def init(params: optax.Params) -> OfficialState:
        paths, leaves, treedef = flatten(params)
        views = [checked_view(view, path, p.shape) for path, p in zip(paths, leaves, strict=True)]
        moments = [jnp.zeros(p.shape, state_dtype(p)) for p in leaves]
        gg = [factors(v, p) for v, p in zip(views, leaves, strict=True)]
        return OfficialState(
            jnp.zeros((), jnp.int32),
            treedef.unflatten(moments),
            treedef.unflatten(moments),
            treedef.unflatten(gg),
            treedef.unflatten(gg),
        )

    def step_tensor(g: jax.Array, leaf: _Leaf, count: jax.Array) -> tuple[jax.Array, _Leaf]:
        """Direction to subtract (before the learning rate) and new state of one tensor."""

        def first() -> tuple[jax.Array, _Leaf]:
            gg = _lerp_factors(g, leaf.gg, shampoo_beta)
            q = tuple(None if a is None else _eigenvectors(a) for a in gg)
            return jnp.zeros_like(g), _Leaf(leaf.mu, leaf.nu, gg, q)

        def later() -> tuple[jax.Array, _Leaf]:
            rotated = _rotate(g, leaf.q)
            mu = b1 * leaf.mu + (1 - b1) * rotated
            nu = b2 * leaf.nu + (1 - b2) * rotated**2
            direction = _rotate_back(mu / (jnp.sqrt(nu) + eps), leaf.q)
            if normalize_grads:
                direction = direction / (1e-30 + jnp.sqrt(jnp.mean(direction**2)))
            if correct_bias:
                direction = direction * bias_correction(b1, b2, count, g.dtype)
            gg = _lerp_factors(g, leaf.gg, shampoo_beta)

            def refresh() -> tuple[jax.Array, jax.Array, tuple]:
                sorted_nu, q = _refreshed(nu, gg, leaf.q)
                return _rotate(_rotate_back(mu, leaf.q), q), sorted_nu, q

            new_mu, new_nu, q = jax.lax.cond(
                count % precondition_frequency == 0, refresh, lambda: (mu, nu, leaf.q)
            )
            return direction, _Leaf(new_mu, new_nu, gg, q)

        return jax.lax.cond(count == 0, first, later)

    def direction_of(path: str, g: jax.Array, leaf: _Leaf, count: jax.Array):
        """`step_tensor` for a parameter: over its batch axes, on its merged sides."""
        v = checked_view(view, path, g.shape)
        viewed = (*g.shape[: v.batch], *v.side_sizes(g.shape)) if v.sides else g.shape

        run = functools.partial(step_tensor, count=count)
        for _ in range(v.batch):
            run = jax.vmap(run)
        flat = leaf._replace(mu=leaf.mu.reshape(viewed), nu=leaf.nu.reshape(viewed))
        direction, new = run(g.reshape(viewed), flat)
        new = new._replace(mu=new.mu.reshape(g.shape), nu=new.nu.reshape(g.shape))
        return direction.reshape(g.shape), new

    def update(grads: optax.Updates, state: OfficialState, params: optax.Params | None = None):
        paths, g_leaves, treedef = flatten(grads)
        leaves = map(_Leaf, *(treedef.flatten_up_to(tree) for tree in state[1:]))
        directions, new_leaves = [], []
        for path, g, leaf in zip(paths, g_leaves, leaves, strict=True):
            direction, new = direction_of(path, g.astype(leaf.mu.dtype), leaf, state.count)
            directions.append(direction)
            new_leaves.append(new)
        updates = to_updates(
            treedef.unflatten(directions),
            params,
            learning_rate(state.count) if callable(learning_rate) else learning_rate,
            weight_decay,
            mask,
            state.count > 0,
        )
        trees = [treedef.unflatten(part) for part in zip(*new_leaves, strict=True)]
        if not new_leaves:
            trees = list(state[1:])
        return updates, OfficialState(optax.safe_increment(state.count), *trees)

    return optax.GradientTransformation(init, update)


def flatten(tree: Any) -> tuple[list[str], list[jax.Array], Any]:
    """(paths such as 'mlp/up/kernel', leaves, structure)."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
    return paths, [leaf for _, leaf in with_paths], treedef


def state_dtype(p: jax.Array) -> jnp.dtype:
    """At least float32, whatever the parameter's dtype."""
    return jnp.promote_types(p.dtype, jnp.float32)


def bias_correction(b1: float, b2: float, t: jax.Array, dtype: Any) -> jax.Array:
    """What the t-th step (from 1) of Adam's averages is multiplied by."""
    t = t.astype(dtype)
    return jnp.sqrt(1 - jnp.asarray(b2, dtype) ** t) / (1 - jnp.asarray(b1, dtype) ** t)


def to_updates(
    directions: Any,
    params: optax.Params | None,
    learning_rate: jax.Array | float,
    weight_decay: float,
    mask: Any,
    moves: jax.Array,
) -> Any:
    """-lr·direction, and then the decay of the parameter that this has just moved.

    Where `moves` is False (as at the first call) nothing decays; directions must be 0 then.
    """
    updates = jax.tree.map(lambda d: -jnp.asarray(learning_rate, d.dtype) * d, directions)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return updates
    if params is None:
        raise ValueError(optax.NO_PARAMS_MSG)
    decayed = mask(params) if callable(mask) else mask
    if decayed is None:
        decayed = jax.tree.map(lambda _: True, params)
    rate = jnp.where(moves, jnp.asarray(learning_rate) * weight_decay, 0)

    def with_decay(u: jax.Array, p: jax.Array, decays: bool) -> jax.Array:
        return u - rate.astype(u.dtype) * (p.astype(u.dtype) + u) if decays else u

    return jax.tree.map(with_decay, updates, params, decayed)


def _rotate(x: jax.Array, q: tuple[jax.Array | None, ...]) -> jax.Array:
    """x in the bases' coordinates: each side is multiplied by its Qᵀ."""
    for axis, basis in enumerate(q):
        if basis is not None:
            x = jnp.moveaxis(jnp.tensordot(x, basis, (axis, 0), precision=_HIGHEST), -1, axis)
    return x


def _rotate_back(x: jax.Array, q: tuple[jax.Array | None, ...]) -> jax.Array:
    return _rotate(x, tuple(None if basis is None else basis.T for basis in q))


def _lerp_factors(
    g: jax.Array, gg: tuple[jax.Array | None, ...], beta: float
) -> tuple[jax.Array | None, ...]:
    def lerp(axis: int, factor: jax.Array) -> jax.Array:
        others = [i for i in range(g.ndim) if i != axis]
        outer = jnp.tensordot(g, g, (others, others), precision=_HIGHEST)
        return factor + (1 - beta) * (outer - factor)

    return tuple(None if a is None else lerp(axis, a) for axis, a in enumerate(gg))


def _eigenvectors(factor: jax.Array) -> jax.Array:
    """Largest eigenvalue first."""
    jitter = 1e-30 * jnp.eye(factor.shape[0], dtype=factor.dtype)
    return jnp.linalg.eigh(factor + jitter)[1][:, ::-1]


def _refreshed(nu: jax.Array, gg: tuple, q: tuple) -> tuple[jax.Array, tuple]:
    """One QR iteration a side; nu's entries follow the sorting of the columns, not the QR."""
    bases = []
    for axis, (factor, basis) in enumerate(zip(gg, q, strict=True)):
        if basis is None:
            bases.append(None)
            continue
        power = jnp.matmul(factor, basis, precision=_HIGHEST)
        order = jnp.argsort(-jnp.sum(basis * power, axis=0))
        nu = jnp.take(nu, order, axis=axis)
        bases.append(jnp.linalg.qr(power[:, order])[0])
    return nu, tuple(bases)
