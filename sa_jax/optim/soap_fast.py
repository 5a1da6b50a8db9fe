"""SOAP for large sharded models: each matrix's algebra on one device, refreshed without eigh.

Differs from the official mode in this: bases come from QR iterations that start at the identity,
at every step at first and rarely later; long sides have block-diagonal factors; products with
gradients may have bfloat16 operands; and what is not finite or not orthogonal is never used.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.optim.soap_basis import refreshed_bases
from sa_jax.optim.soap_layout import (
    Layout,
    SpecRule,
    StackPlan,
    from_owners,
    local_count,
    make_layout,
    to_owners,
)
from sa_jax.optim.soap_official import bias_correction, flatten, to_updates
from sa_jax.optim.soap_views import ViewRule

_FIRST_ITERATIONS, _FIRST_LIFT = 8, 1e-2  # reach what eigh gives, on the tasks tried
_LIFT = 0.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mu", "nu", "gg_rows", "q_rows", "gg_cols", "q_cols"),
    meta_fields=("stack_axes", "split_axes"),
)
@dataclasses.dataclass(frozen=True)
class Stack:
    """State of n matrices of the same shape, float32.

    Attributes:
      mu, nu: Adam's averages in the bases' coordinates [n, rows, cols].
      gg_rows, q_rows: the rows' factors and their bases [n, blocks, block, block], or None.
      gg_cols, q_cols: those of the columns.
      stack_axes, split_axes: mesh axes that cut n, and the columns (and their blocks).
    """

    mu: Any
    nu: Any
    gg_rows: Any
    q_rows: Any
    gg_cols: Any
    q_cols: Any
    stack_axes: tuple[str, ...] = ()
    split_axes: tuple[str, ...] = ()


class FastState(NamedTuple):
    """State of `soap(mode="fast")`.

    count: int32 scalar, calls so far.
    skipped: int32 scalar, calls whose gradient was not finite; they changed nothing else.
    rejected: int32 scalar, how often a matrix stood still for a step because its basis or factor
      was not finite, or its new basis not orthogonal.
    stacks: matrices by size class, e.g. "64x4096x4096".
    mu, nu: Adam's averages of the other parameters, by path.
    """

    count: jax.Array
    skipped: jax.Array
    rejected: jax.Array
    stacks: dict[str, Stack]
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]


class _Slot(NamedTuple):
    """Matrices [start, stop) of a stack on each device, refreshed together with others."""

    stack: int
    start: int
    stop: int


def fast(
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
    block_size: int,
    block_above: int,
    dense_steps: int,
    refresh_slots: int,
    matmul_dtype: Any,
    mesh: Mesh | None,
    partition_spec: SpecRule | None,
) -> optax.GradientTransformation:
    """See `sa_jax.optim.soap.soap`."""

    def layout_of(paths: Sequence[str], leaves: Sequence[jax.Array]) -> Layout:
        return make_layout(
            paths,
            [leaf.shape for leaf in leaves],
            view=view,
            block_size=block_size,
            block_above=block_above,
            max_precond_dim=max_precond_dim,
            mesh=mesh,
            partition_spec=partition_spec,
        )

    def place(tree: Any, specs: Any) -> Any:
        return tree if mesh is None else jax.tree.map(_placer(mesh), tree, specs)

    def init(params: optax.Params) -> FastState:
        paths, leaves, _ = flatten(params)
        layout = layout_of(paths, leaves)
        shapes = dict(zip(paths, [leaf.shape for leaf in leaves], strict=True))
        moments = {path: jnp.zeros(shapes[path], jnp.float32) for path in layout.elementwise}
        zero = jnp.zeros((), jnp.int32)
        state = FastState(
            count=zero,
            skipped=zero,
            rejected=zero,
            stacks={plan.name: _init_stack(plan) for plan in layout.stacks},
            mu=moments,
            nu=moments,
        )
        return place(state, state_specs(state, partition_spec))

    def update(grads: optax.Updates, state: FastState, params: optax.Params | None = None):
        paths, leaves, treedef = flatten(grads)
        layout = layout_of(paths, leaves)
        by_path = {p: g.astype(jnp.float32) for p, g in zip(paths, leaves, strict=True)}
        finite = jnp.array(True)
        for g in by_path.values():
            finite &= jnp.all(jnp.isfinite(g))
        t = state.count - state.skipped

        matrices = {leaf.path: by_path[leaf.path] for p in layout.stacks for leaf in p.leaves}
        specs = {leaf.path: leaf.spec for p in layout.stacks for leaf in p.leaves}
        run = functools.partial(update_stacks, layout.stacks)
        if mesh is not None and layout.stacks:
            stack_specs = state_specs(state, None).stacks
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(specs, stack_specs, P(), P()),
                out_specs=(specs, stack_specs, P()),
                check_vma=False,  # results are replicated over axes that cut nothing
            )
        directions, stacks, rejected = run(place(matrices, specs), state.stacks, t, finite)

        mu, nu = {}, {}
        for path in layout.elementwise:
            g = by_path[path]
            new = _adam(g, state.mu[path], state.nu[path], b1, b2)
            mu[path], nu[path] = (
                jnp.where(finite & (t > 0), a, b)
                for a, b in zip(new, (state.mu[path], state.nu[path]), strict=True)
            )
            direction = mu[path] / (jnp.sqrt(nu[path]) + eps)
            if normalize_grads:
                direction = direction / (1e-30 + jnp.sqrt(jnp.mean(direction**2)))
            directions[path] = direction
        moves = finite & (t > 0)
        size = bias_correction(b1, b2, t, jnp.float32) if correct_bias else 1.0
        size = jnp.where(moves, size, 0.0)
        updates = to_updates(
            treedef.unflatten([size * directions[path] for path in paths]),
            params,
            learning_rate(state.count) if callable(learning_rate) else learning_rate,
            weight_decay,
            mask,
            moves,
        )
        return updates, FastState(
            count=optax.safe_increment(state.count),
            skipped=state.skipped + ~finite,
            rejected=state.rejected + rejected,
            stacks=stacks,
            mu=mu,
            nu=nu,
        )

    def update_stacks(
        plans: tuple[StackPlan, ...],
        matrices: dict[str, jax.Array],
        stacks: dict[str, Stack],
        t: jax.Array,
        finite: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, Stack], jax.Array]:
        """One device's part: directions of the leaves, new stacks, matrices that stood still."""
        current, moved, bad = [], [], []
        for plan in plans:
            g = to_owners(matrices, plan, mesh)
            stack, direction, sound = step_stack(plan, g, stacks[plan.name], t, finite)
            current.append(stack)
            moved.append(direction)
            bad.append(~sound)
        counts = [local_count(plan, mesh) for plan in plans]
        for number, ranges in enumerate(_slots(plans, counts, refresh_slots)):
            offset = number * precondition_frequency // refresh_slots
            due = (t <= dense_steps) | (t % precondition_frequency == offset)
            _refresh(current, bad, ranges, due & finite, t)
        directions, rejected = {}, jnp.zeros((), jnp.int32)
        for plan, direction, unsound in zip(plans, moved, bad, strict=True):
            if plan.split_axes:
                unsound = jax.lax.pmax(unsound, plan.split_axes)
            directions |= from_owners(jnp.where(unsound[:, None, None], 0, direction), plan, mesh)
            number = jnp.sum(unsound, dtype=jnp.int32)
            rejected += jax.lax.psum(number, plan.stack_axes) if plan.stack_axes else number
        names = [plan.name for plan in plans]
        return directions, dict(zip(names, current, strict=True)), jnp.where(finite, rejected, 0)

    def step_stack(
        plan: StackPlan, g: jax.Array, stack: Stack, t: jax.Array, finite: jax.Array
    ) -> tuple[Stack, jax.Array, jax.Array]:
        """Moments, direction [n, rows, cols] and factors; and which matrices were sound, [n]."""

        def lerp(gg: jax.Array | None, gram: jax.Array | None) -> jax.Array | None:
            return None if gg is None else gg + (1 - shampoo_beta) * (gram - gg)

        rotate = functools.partial(_rotate, dtype=matmul_dtype)
        q = (stack.q_rows, stack.q_cols)
        gram_rows = _gram(g, stack.gg_rows, 1, matmul_dtype)
        if gram_rows is not None and plan.split_axes:
            gram_rows = jax.lax.psum(gram_rows, plan.split_axes)
        gram_cols = _gram(g, stack.gg_cols, 2, matmul_dtype)
        gg_rows, gg_cols = lerp(stack.gg_rows, gram_rows), lerp(stack.gg_cols, gram_cols)
        sound = jnp.ones(g.shape[0], bool)
        for x in (*q, gg_rows, gg_cols):
            if x is not None:
                sound &= jnp.all(jnp.isfinite(x), axis=(1, 2, 3))
        if plan.split_axes:
            sound = jax.lax.pmin(sound, plan.split_axes)

        learn = sound & finite
        step = (learn & (t > 0))[:, None, None]
        new_mu, new_nu = _adam(rotate(g, *q), stack.mu, stack.nu, b1, b2)
        mu, nu = jnp.where(step, new_mu, stack.mu), jnp.where(step, new_nu, stack.nu)
        direction = rotate(mu / (jnp.sqrt(nu) + eps), *(None if x is None else x.mT for x in q))
        if normalize_grads:
            square_sum = jnp.sum(direction**2, axis=(1, 2), keepdims=True)
            if plan.split_axes:
                square_sum = jax.lax.psum(square_sum, plan.split_axes)
            mean = square_sum / (plan.rows.size * plan.cols.size)
            direction = direction / (1e-30 + jnp.sqrt(mean))

        def keep(new: jax.Array | None, old: jax.Array | None) -> jax.Array | None:
            return None if old is None else jnp.where(learn[:, None, None, None], new, old)

        stack = dataclasses.replace(
            stack,
            mu=mu,
            nu=nu,
            gg_rows=keep(gg_rows, stack.gg_rows),
            gg_cols=keep(gg_cols, stack.gg_cols),
        )
        return stack, direction, sound

    return optax.GradientTransformation(init, update)


def state_specs(state: FastState, partition_spec: SpecRule | None) -> FastState:
    """How a state (arrays or their shapes) is sharded: the same tree, of PartitionSpec."""

    def stack_specs(s: Stack) -> Stack:
        whole = P(s.stack_axes or None, None, s.split_axes or None)
        rows, cols = P(s.stack_axes or None), P(s.stack_axes or None, s.split_axes or None)
        return dataclasses.replace(
            s,
            mu=whole,
            nu=whole,
            gg_rows=None if s.gg_rows is None else rows,
            q_rows=None if s.q_rows is None else rows,
            gg_cols=None if s.gg_cols is None else cols,
            q_cols=None if s.q_cols is None else cols,
        )

    def leaf_specs(moments: dict[str, Any]) -> dict[str, P]:
        return {
            path: P() if partition_spec is None else partition_spec(path, x.ndim)
            for path, x in moments.items()
        }

    return FastState(
        count=P(),
        skipped=P(),
        rejected=P(),
        stacks={name: stack_specs(stack) for name, stack in state.stacks.items()},
        mu=leaf_specs(state.mu),
        nu=leaf_specs(state.nu),
    )


def _placer(mesh: Mesh):
    explicit = AxisType.Explicit in mesh.axis_types
    constrain = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    return lambda x, spec: constrain(x, NamedSharding(mesh, spec))


def _init_stack(plan: StackPlan) -> Stack:
    def factor(side: Any) -> jax.Array | None:
        shape = (plan.padded, side.blocks, side.block, side.block)
        return jnp.zeros(shape, jnp.float32) if side.blocks else None

    def basis(gg: jax.Array | None) -> jax.Array | None:
        return None if gg is None else gg + jnp.eye(gg.shape[-1], dtype=gg.dtype)

    moments = jnp.zeros((plan.padded, plan.rows.padded, plan.cols.padded), jnp.float32)
    rows, cols = factor(plan.rows), factor(plan.cols)
    return Stack(
        moments,
        moments,
        rows,
        basis(rows),
        cols,
        basis(cols),
        stack_axes=plan.stack_axes,
        split_axes=plan.split_axes,
    )


def _adam(g: jax.Array, mu: jax.Array, nu: jax.Array, b1: float, b2: float):
    return b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * jnp.square(g)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """Operands rounded to `dtype`, accumulation in float32."""
    if dtype == jnp.float32:
        return jnp.einsum(subscripts, x, y, precision=jax.lax.Precision.HIGHEST)
    kind = jnp.finfo(dtype)

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)

    return jax.lax.platform_dependent(
        x,
        y,
        # XLA's CPU backend lacks the batched product; the float32 one of rounded values equals it.
        cpu=lambda x, y: jnp.einsum(subscripts, rounded(x), rounded(y)),
        default=lambda x, y: jnp.einsum(
            subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
        ),
    )


def _rotate(
    x: jax.Array, q_rows: jax.Array | None, q_cols: jax.Array | None, *, dtype: Any
) -> jax.Array:
    """Q_rowsᵀ·x·Q_cols of each matrix, block by block. x is [n, rows, cols]."""
    n, rows, cols = x.shape
    if q_rows is not None:
        blocks, block = q_rows.shape[1:3]
        x = _einsum("nkrc,nkrs->nksc", x.reshape(n, blocks, block, cols), q_rows, dtype)
        x = x.reshape(n, rows, cols)
    if q_cols is not None:
        blocks, block = q_cols.shape[1:3]
        x = _einsum("nrkc,nkcd->nrkd", x.reshape(n, rows, blocks, block), q_cols, dtype)
        x = x.reshape(n, rows, cols)
    return x


def _gram(x: jax.Array, like: jax.Array | None, side: int, dtype: Any) -> jax.Array | None:
    """x·xᵀ (side 1) or xᵀ·x (side 2) of each matrix's blocks, shaped as the factors `like`."""
    if like is None:
        return None
    n, rows, cols = x.shape
    blocks, block = like.shape[1:3]
    if side == 1:
        x = x.reshape(n, blocks, block, cols)
        return _einsum("nkrc,nksc->nkrs", x, x, dtype)
    x = x.reshape(n, rows, blocks, block)
    return _einsum("nrkc,nrkd->nkcd", x, x, dtype)


def _slots(plans: Sequence[StackPlan], counts: Sequence[int], slots: int) -> list[list[_Slot]]:
    """Cuts a device's matrices, in their order, into parts of about equal refresh cost."""
    ends, total = [], 0.0
    for index, (plan, count) in enumerate(zip(plans, counts, strict=True)):
        cost = sum(side.blocks * side.block**3 for side in (plan.rows, plan.cols))
        for matrix in range(count):
            ends.append((index, matrix, total + cost / 2))
            total += cost
    parts: list[dict[int, list[int]]] = [{} for _ in range(slots)]
    for index, matrix, middle in ends:
        parts[int(middle / total * slots)].setdefault(index, []).append(matrix)
    return [
        [_Slot(index, matrices[0], matrices[-1] + 1) for index, matrices in part.items()]
        for part in parts
    ]


def _refresh(
    stacks: list[Stack], bad: list[jax.Array], slot: list[_Slot], due: jax.Array, t: jax.Array
) -> None:
    """Refreshes the bases of a slot if they are due, in one batch a block size; in place.

    A new basis that is not finite and orthogonal marks its matrix as bad and is not taken.
    """
    first = t == 0
    iterations = jnp.where(first, _FIRST_ITERATIONS, 1)
    lift = jnp.where(first, _FIRST_LIFT, _LIFT)

    def refresh(mus: list, factors: list, bases: list):
        flat = [x.reshape(-1, *x.shape[-2:]) for x in factors]
        flat_bases = [x.reshape(-1, *x.shape[-2:]) for x in bases]
        new: list = [None] * len(flat)
        good: list = [None] * len(flat)
        for size in sorted({x.shape[-1] for x in flat}):
            members = [i for i, x in enumerate(flat) if x.shape[-1] == size]
            made, fine = refreshed_bases(
                jnp.concatenate([flat[i] for i in members]),
                jnp.concatenate([flat_bases[i] for i in members]),
                iterations,
                lift,
            )
            start = 0
            for i in members:
                stop = start + flat[i].shape[0]
                new[i] = made[start:stop].reshape(bases[i].shape)
                good[i] = jnp.all(fine[start:stop].reshape(bases[i].shape[:2]), axis=1)
                start = stop
        turns = [
            jnp.einsum("nkij,nkil->nkjl", old, now, precision=jax.lax.Precision.HIGHEST)
            for old, now in zip(bases, new, strict=True)
        ]
        mus = [
            _rotate(mu, *(None if i is None else turns[i] for i in where), dtype=jnp.float32)
            for mu, where in zip(mus, sides, strict=True)
        ]
        unsound = [
            functools.reduce(jnp.logical_or, [~good[i] for i in where if i is not None])
            for where in sides
        ]
        return mus, new, unsound

    def keep(mus: list, factors: list, bases: list):
        return mus, bases, [jnp.zeros(mu.shape[0], bool) for mu in mus]

    mus, factors, bases, sides = [], [], [], []
    for index, start, stop in slot:
        stack = stacks[index]
        mus.append(stack.mu[start:stop])
        where = []
        for gg, q in ((stack.gg_rows, stack.q_rows), (stack.gg_cols, stack.q_cols)):
            where.append(None if gg is None else len(bases))
            if gg is not None:
                factors.append(gg[start:stop])
                bases.append(q[start:stop])
        sides.append(where)
    if not slot:
        return
    mus, bases, unsound = jax.lax.cond(due, refresh, keep, mus, factors, bases)
    for (index, start, stop), mu, where, is_bad in zip(slot, mus, sides, unsound, strict=True):
        stack = stacks[index]
        changed = {"mu": stack.mu.at[start:stop].set(mu)}
        for name, i in zip(("q_rows", "q_cols"), where, strict=True):
            if i is not None:
                changed[name] = getattr(stack, name).at[start:stop].set(bases[i])
        stacks[index] = dataclasses.replace(stack, **changed)
        bad[index] = bad[index].at[start:stop].set(bad[index][start:stop] | is_bad)
