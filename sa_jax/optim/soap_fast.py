"""SOAP for large sharded models: each matrix's algebra on one device, refreshed without eigh.

It differs from the official mode in four things. Bases come from QR iterations that start at the
identity, at every step at first and rarely later. Long sides have block-diagonal factors. Products
with gradients, and the directions that come of them, may be rounded to bfloat16. Values that are
not finite, and bases that are not orthogonal, are never used.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.optim.soap_layout import (
    FastState,
    Stack,
    StackPlan,
    from_owners,
    init_stack,
    make_layout,
    state_specs,
    to_owners,
)
from sa_jax.optim.soap_linalg import gram, rotate
from sa_jax.optim.soap_refresh import cut_into_slots, refresh
from sa_jax.optim.soap_shared import (
    Settings,
    adam_moments,
    bias_correction,
    flatten,
    to_updates,
    unit_rms,
)


def fast(settings: Settings) -> optax.GradientTransformation:
    """See `sa_jax.optim.soap.soap`."""
    place = _placer(settings.mesh)
    layout_of = functools.partial(
        make_layout,
        view=settings.view,
        block_size=settings.block_size,
        block_above=settings.block_above,
        max_precond_dim=settings.max_precond_dim,
        mesh=settings.mesh,
        partition_spec=settings.partition_spec,
    )

    def init(params: optax.Params) -> FastState:
        shapes = {path: leaf.shape for path, leaf in flatten(params)[0].items()}
        plans, elementwise = layout_of(shapes)
        moments = {path: jnp.zeros(shapes[path], jnp.float32) for path in elementwise}
        stacks = {plan.name: init_stack(plan) for plan in plans}
        zero = jnp.zeros((), jnp.int32)
        state = FastState(
            count=zero, skipped=zero, rejected=zero, stacks=stacks, mu=moments, nu=moments
        )
        return place(state, state_specs(state, settings.partition_spec))

    def update(grads: optax.Updates, state: FastState, params: optax.Params | None = None):
        leaves, treedef = flatten(grads)
        g = {path: x.astype(jnp.float32) for path, x in leaves.items()}
        plans, elementwise = layout_of({path: x.shape for path, x in g.items()})
        finite = functools.reduce(
            jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in g.values()], jnp.array(True)
        )
        t = state.count - state.skipped  # 0 where this call builds the first bases
        moves = finite & (t > 0)

        directions, stacks, rejected = {}, {}, jnp.zeros((), jnp.int32)
        if plans:
            specs = {leaf.path: leaf.spec for plan in plans for leaf in plan.leaves}
            # Products round their operands in any case: rounded before, they are sent as such.
            matrices = {path: g[path].astype(settings.matmul_dtype) for path in specs}
            run: Callable = functools.partial(_update_stacks, settings, plans)
            if settings.mesh is not None:  # the partitioner would gather what it cannot shard
                stack_specs = state_specs(state, None).stacks
                run = jax.shard_map(
                    run,
                    mesh=settings.mesh,
                    in_specs=(specs, stack_specs, P(), P()),
                    out_specs=(specs, stack_specs, P()),
                    check_vma=False,  # what is the same on several devices is computed by each
                )
            directions, stacks, rejected = run(place(matrices, specs), state.stacks, t, finite)

        mu, nu = dict(state.mu), dict(state.nu)
        for path in elementwise:
            new = adam_moments(settings, g[path], mu[path], nu[path])
            mu[path] = jnp.where(moves, new[0], mu[path])
            nu[path] = jnp.where(moves, new[1], nu[path])
            direction = mu[path] / (jnp.sqrt(nu[path]) + settings.eps)
            directions[path] = unit_rms(direction) if settings.normalize_grads else direction

        size = jnp.where(moves, bias_correction(settings, t, jnp.float32), 0)
        scaled = treedef.unflatten([size * directions[path] for path in g])
        updates = to_updates(settings, scaled, params, state.count, moves)
        updates = jax.tree.map(lambda u: jnp.where(jnp.isnan(u), 0, u), updates)
        return updates, FastState(
            count=optax.safe_increment(state.count),
            skipped=state.skipped + ~finite,
            rejected=state.rejected + rejected,
            stacks=stacks,
            mu=mu,
            nu=nu,
        )

    return optax.GradientTransformation(init, update)


def _update_stacks(
    settings: Settings,
    plans: Sequence[StackPlan],
    matrices: dict[str, jax.Array],
    stacks: dict[str, Stack],
    t: jax.Array,
    finite: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, Stack], jax.Array]:
    """One device's part of an update.

    Returns:
      directions of the leaves, by path, NaN for a matrix that is not updated (it must not decay
      either); the new stacks; how many matrices were not updated.
    """
    before, stacks = stacks, dict(stacks)  # the caller's stay as they are
    moved, sound = {}, {}
    for plan in plans:
        g = to_owners(matrices, plan, settings.mesh)
        stacks[plan.name], moved[plan.name], sound[plan.name] = _step_stack(
            settings, plan, g, stacks[plan.name], t, finite
        )
    counts = [stacks[plan.name].mu_ncr.shape[0] for plan in plans]
    frequency = settings.precondition_frequency
    for number, parts in enumerate(cut_into_slots(plans, counts, settings.refresh_slots)):
        if parts:
            turn = t % frequency == number * frequency // settings.refresh_slots
            due = finite & (turn | (t <= settings.dense_steps))
            stacks, rejected = refresh(stacks, parts, due, t == 0)
            sound |= {name: sound[name] & ~kept for name, kept in rejected.items()}

    directions: dict[str, jax.Array] = {}
    still = jnp.zeros((), jnp.int32)
    for plan in plans:
        good = _over(jax.lax.pmin, sound[plan.name], plan.split_axes)
        direction = _turn_back(settings, plan, moved[plan.name], before[plan.name], good)
        directions |= from_owners(direction, plan, settings.mesh)
        still += _over(jax.lax.psum, jnp.sum(~good, dtype=jnp.int32), plan.stack_axes)
    return directions, stacks, jnp.where(finite, still, 0)


def _step_stack(
    settings: Settings, plan: StackPlan, g: jax.Array, stack: Stack, t: jax.Array, finite: jax.Array
) -> tuple[Stack, jax.Array, jax.Array]:
    """The step of a stack in its current bases, and its new factors.

    A matrix whose basis or factor is not finite is not sound, and keeps its state.

    Returns:
      new stack; direction in the bases' coordinates, [n, cols, rows]; which matrices are sound,
      bool [n].
    """
    bases = (stack.q_rows, stack.q_cols)
    matmul_dtype = settings.matmul_dtype

    def moved(gg: jax.Array | None, side: int, axes: tuple[str, ...]) -> jax.Array | None:
        if gg is None:
            return None
        new = _over(jax.lax.psum, gram(g, side, gg.shape[1], matmul_dtype), axes)
        return gg + (1 - settings.shampoo_beta) * (new - gg)

    # Rows are whole here, but where columns are cut their products are partial sums.
    gg_rows = moved(stack.gg_rows, 1, plan.split_axes)
    gg_cols = moved(stack.gg_cols, 2, ())
    sound = jnp.ones(g.shape[0], bool)
    for x in jax.tree.leaves((bases, gg_rows, gg_cols)):
        sound &= jnp.all(jnp.isfinite(x), axis=(1, 2, 3))
    sound = _over(jax.lax.pmin, sound, plan.split_axes)

    def new_where(matrices: jax.Array, new: Any, old: Any) -> Any:
        def choose(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(matrices, range(1, a.ndim)), a, b)

        return jax.tree.map(choose, new, old)

    learns = sound & finite
    old_moments = stack.mu_ncr, stack.nu_ncr
    moments = adam_moments(settings, rotate(g, *bases, matmul_dtype), *old_moments)
    mu, nu = new_where(learns & (t > 0), moments, old_moments)
    gg_rows, gg_cols = new_where(learns, (gg_rows, gg_cols), (stack.gg_rows, stack.gg_cols))
    direction = (mu / (jnp.sqrt(nu) + settings.eps)).astype(matmul_dtype)
    stack = dataclasses.replace(stack, mu_ncr=mu, nu_ncr=nu, gg_rows=gg_rows, gg_cols=gg_cols)
    return stack, direction, sound


def _turn_back(
    settings: Settings, plan: StackPlan, direction: jax.Array, stack: Stack, good: jax.Array
) -> jax.Array:
    """A direction [n, cols, rows] in the bases of `stack` -> [n, rows, cols], NaN where not good.

    The result is rounded to `matmul_dtype`, so that as few bytes are sent as for gradients.
    """
    # A basis of NaN makes its whole matrix NaN. To fill the matrix itself would take longer.
    q_rows = jnp.where(good[:, None, None, None], stack.q_rows, jnp.nan)
    q_cols = None if stack.q_cols is None else stack.q_cols.mT
    direction = rotate(direction, q_cols, q_rows.mT, settings.matmul_dtype)

    def largest(x: jax.Array) -> jax.Array:
        return _over(jax.lax.pmax, jnp.max(x, axis=(1, 2), keepdims=True), plan.split_axes)

    def mean(x: jax.Array) -> jax.Array:
        total = _over(jax.lax.psum, jnp.sum(x, axis=(1, 2), keepdims=True), plan.split_axes)
        return total / (plan.rows.size * plan.cols.size)

    if settings.normalize_grads:
        direction = unit_rms(direction, largest, mean)
    return direction.astype(settings.matmul_dtype)


def _placer(mesh: Mesh | None) -> Callable[[Any, Any], Any]:
    """A function that shards a tree as a tree of PartitionSpec says."""
    if mesh is None:
        return lambda tree, specs: tree
    explicit = AxisType.Explicit in mesh.axis_types
    put = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    return functools.partial(jax.tree.map, lambda x, spec: put(x, NamedSharding(mesh, spec)))


def _over(reduce: Callable, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A collective over mesh axes, if there are any."""
    return reduce(x, axes) if axes else x
