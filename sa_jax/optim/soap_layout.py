"""The fast SOAP's state and its layout: one device (or a few) owns each matrix.

Matrices of the same shape and sharding form one stack [n, rows, cols], and the mesh shards the
stack, not its matrices. Moments, factors and bases stay on their owners. One all-to-all for each
mesh axis that shards the parameters sends gradients to the owners, and another sends updates back
(an all-to-all over two axes would need all the gradients on every device). If a mesh has more
devices than a stack has matrices, the columns are sharded as well.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_map_with_path

from sa_jax.optim.soap_shared import SpecRule, TensorView, ViewRule, checked_view
from sa_jax.parallel.rules import spec_axes

# Above this a side is a vocabulary rather than a layer's.
LONGEST_SIDE = 65536

_ROWS, _COLS = 1, 2  # axes of a stack [n, rows, cols]


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the matrices of a stack: its length is `size`, in `blocks` blocks of `block`.

    A side without a basis has no blocks. The last block may extend past the end (`padded`).
    """

    size: int
    block: int = 0
    blocks: int = 0

    @property
    def padded(self) -> int:
        return self.block * self.blocks or self.size


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter that is a stack of matrices; `transposed` ones are stored as [n, cols, rows]."""

    path: str
    shape: tuple[int, ...]
    count: int
    transposed: bool
    spec: P


@dataclasses.dataclass(frozen=True)
class StackPlan:
    """Matrices that are handled as one array; the `..._axes` are those of a mesh."""

    name: str  # count x rows x columns; the key of the stack in the state
    leaves: tuple[Leaf, ...]  # the parameters, in the order of the stack
    rows: Side
    cols: Side  # only these are sharded over devices
    row_axes: tuple[str, ...] = ()  # shard the rows of the parameters themselves
    col_axes: tuple[str, ...] = ()
    stack_axes: tuple[str, ...] = ()  # shard the stack
    split_axes: tuple[str, ...] = ()  # shard its columns
    hops: tuple[str, ...] = ()  # mesh axes in the order in which gradients are moved
    padded: int = 0  # matrices in the stack, with zeros so that it divides over its axes

    @property
    def count(self) -> int:
        return sum(leaf.count for leaf in self.leaves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """State of n matrices of the same shape, float32."""

    mu_ncr: Any  # Adam's averages in the bases' coordinates [n, cols, rows]
    nu_ncr: Any
    gg_rows: Any  # the rows' factors [n, blocks, block, block], or None
    q_rows: Any  # their bases
    gg_cols: Any
    q_cols: Any
    # Mesh axes that shard n, and those that shard the columns (and their blocks).
    stack_axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    split_axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})


class FastState(NamedTuple):
    """State of `soap(mode="fast")`; the first three are int32 scalars."""

    # Calls so far. The name is optax's, and that of a tuple's method.
    count: jax.Array  # type: ignore[assignment]
    skipped: jax.Array  # calls whose gradient was not finite; they changed nothing else
    # How often a matrix was not updated in a step because its basis or factor was not finite, or
    # its new basis not orthogonal.
    rejected: jax.Array
    # Matrices by size class, e.g. "64x4096x4096". Replace a stack's q_rows and q_cols to start from
    # other bases.
    stacks: dict[str, Stack]
    mu: dict[str, jax.Array]  # Adam's averages of the other parameters, by path
    nu: dict[str, jax.Array]


def make_layout(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    view: ViewRule,
    block_size: int,
    block_above: int,
    max_precond_dim: int,
    mesh: Mesh | None = None,
    partition_spec: SpecRule | None = None,
) -> tuple[list[StackPlan], list[str]]:
    """Decides sides, blocks, stacks and owners, from the leaves' shapes by path.

    Returns the stacks, and the paths of the leaves that get Adam. ValueError for a view that does
    not fit, and for a batch axis, or the inner part of a merged side, that is sharded.
    """
    grouped: dict[tuple, list[Leaf]] = {}
    elementwise = []
    for path, shape in shapes.items():
        leaf_view = checked_view(view, path, shape)
        sides = _sides(leaf_view, shape, block_size, block_above, max_precond_dim)
        if sides is None:
            elementwise.append(path)
            continue
        spec = P() if partition_spec is None else partition_spec(path, len(shape))
        axes = _side_axes(path, leaf_view, shape, spec, mesh)
        # Columns, which may be cut, are the side without a basis, or else the longer one. Square
        # matrices are turned so that those that are cut in opposite ways make one stack.
        ranks = [(not s.blocks, s.size, names) for s, names in zip(sides, axes, strict=True)]
        transposed = ranks[0] > ranks[1]
        key = (*sides[::-1], *axes[::-1]) if transposed else (*sides, *axes)
        leaf = Leaf(path, shape, math.prod(shape[: leaf_view.batch]), transposed, spec)
        grouped.setdefault(key, []).append(leaf)
    stacks: list[StackPlan] = []
    for (rows, cols, row_axes, col_axes), leaves in grouped.items():
        name = f"{sum(leaf.count for leaf in leaves)}x{rows.size}x{cols.size}"
        namesakes = sum(plan.name.partition("_")[0] == name for plan in stacks)
        name += f"_{namesakes + 1}" if namesakes else ""
        plan = StackPlan(name, tuple(leaves), rows, cols, row_axes, col_axes)
        stacks.append(_with_owners(plan, mesh))
    return stacks, elementwise


def init_stack(plan: StackPlan) -> Stack:
    """The first state of a stack: zeros, and identities as bases."""

    def factor_and_basis(side: Side) -> tuple[jax.Array | None, jax.Array | None]:
        if not side.blocks:
            return None, None
        gg = jnp.zeros((plan.padded, side.blocks, side.block, side.block), jnp.float32)
        return gg, gg + jnp.eye(side.block, dtype=gg.dtype)

    moments = jnp.zeros((plan.padded, plan.cols.padded, plan.rows.padded), jnp.float32)
    gg_rows, q_rows = factor_and_basis(plan.rows)
    gg_cols, q_cols = factor_and_basis(plan.cols)
    return Stack(
        mu_ncr=moments,
        nu_ncr=moments,
        gg_rows=gg_rows,
        q_rows=q_rows,
        gg_cols=gg_cols,
        q_cols=q_cols,
        stack_axes=plan.stack_axes,
        split_axes=plan.split_axes,
    )


def state_specs(state: FastState, partition_spec: SpecRule | None) -> FastState:
    """The same tree as the state (arrays or their shapes), of PartitionSpec."""

    def stack_specs(s: Stack) -> Stack:
        rows, cols = P(s.stack_axes or None), P(s.stack_axes or None, s.split_axes or None)
        of_rows = {"gg_rows": rows, "q_rows": rows}
        return tree_map_with_path(lambda path, _: of_rows.get(path[0].name, cols), s)

    def leaf_specs(moments: dict[str, Any]) -> dict[str, P]:
        return {
            path: P() if partition_spec is None else partition_spec(path, x.ndim)
            for path, x in moments.items()
        }

    return jax.tree.map(lambda _: P(), state)._replace(
        stacks={name: stack_specs(stack) for name, stack in state.stacks.items()},
        mu=leaf_specs(state.mu),
        nu=leaf_specs(state.nu),
    )


def to_owners(leaves: dict[str, jax.Array], plan: StackPlan, mesh: Mesh | None) -> jax.Array:
    """This device's parts of the stack's leaves -> its part of the stack, [n, rows, cols] padded.

    Inside shard_map (or with mesh None, where nothing moves).
    """
    rows = plan.rows.size // _size(mesh, plan.row_axes)  # on this device
    parts = [
        leaves[leaf.path].reshape(leaf.count, -1, rows).swapaxes(1, 2)
        if leaf.transposed
        else leaves[leaf.path].reshape(leaf.count, rows, -1)
        for leaf in plan.leaves
    ]
    x = jnp.concatenate(parts)
    x = jnp.pad(x, [(0, plan.padded - x.shape[0]), (0, 0), (0, 0)])
    for axis in plan.hops:
        split, concat = _hop(plan, axis)
        x = _move(x, axis, split, concat)
    rows, cols = plan.rows.padded - plan.rows.size, plan.cols.padded - plan.cols.size
    return jnp.pad(x, [(0, 0), (0, rows), (0, cols)])


def from_owners(x: jax.Array, plan: StackPlan, mesh: Mesh | None) -> dict[str, jax.Array]:
    """The inverse of `to_owners`: a device's part of the stack -> its parts of leaves, by path."""
    x = x[:, : plan.rows.size, : x.shape[2] - (plan.cols.padded - plan.cols.size)]
    for axis in reversed(plan.hops):
        split, concat = _hop(plan, axis)
        x = _move(x, axis, concat, split)
    leaves, start = {}, 0
    for leaf in plan.leaves:
        part = x[start : start + leaf.count]
        part = part.swapaxes(1, 2) if leaf.transposed else part
        shape = leaf.shape
        if mesh is not None:
            shape = NamedSharding(mesh, leaf.spec).shard_shape(shape)
        leaves[leaf.path] = part.reshape(shape)
        start += leaf.count
    return leaves


def _sides(
    view: TensorView, shape: tuple[int, ...], block_size: int, block_above: int, longest: int
) -> tuple[Side, Side] | None:
    """The two sides of a matrix; None where neither has a basis."""
    if not view.sides:
        return None
    sizes = view.side_sizes(shape)
    if len(sizes) != 2:
        raise ValueError(f"the fast mode needs matrices; {view} has {len(sizes)} sides")
    rows, cols = (
        Side(size)
        if index in view.skip or size > longest or size == 1
        else Side(size, *_blocks(size, block_size if size > block_above else size))
        for index, size in enumerate(sizes)
    )
    return (rows, cols) if rows.blocks or cols.blocks else None


def _blocks(size: int, block_size: int) -> tuple[int, int]:
    """(length, number) of equal blocks; a few more than needed, if these divide the side."""
    fewest = math.ceil(size / block_size)
    number = next((n for n in range(fewest, 2 * fewest) if size % n == 0), fewest)
    return math.ceil(size / number), number


def _side_axes(
    path: str, view: TensorView, shape: tuple[int, ...], spec: P, mesh: Mesh | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that shard each side of a leaf."""
    entries = spec_axes(spec, len(shape))
    first = (view.batch, view.batch + view.sides[0])
    for axis, names in enumerate(entries):
        if axis not in first and _size(mesh, names) > 1:
            raise ValueError(
                f"{path!r}: axis {axis} of {shape} is cut over {names}, but only the first axis of "
                f"a side of {view} can be"
            )
    return entries[first[0]], entries[first[1]]


def _with_owners(plan: StackPlan, mesh: Mesh | None) -> StackPlan:
    """Assigns each mesh axis to the stack or to the columns, so that devices store the least."""
    if mesh is None:
        return dataclasses.replace(plan, padded=plan.count)
    cut = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    kept = [axis for axis in plan.col_axes if axis in cut]

    def cost(roles: Sequence[str]) -> tuple[float, int]:
        """(a device's work, parts of the columns); infinite work if columns cannot be cut so."""
        role = dict(zip(cut, roles, strict=True))
        parts = _size(mesh, [axis for axis in cut if role[axis] == "split"])
        devices = _size(mesh, [axis for axis in cut if role[axis] == "stack"])
        stays = [role[axis] == "split" for axis in kept]
        fits = (
            (plan.cols.blocks or plan.cols.size) % parts == 0
            and (parts == 1 or plan.cols.padded == plan.cols.size)
            # Columns stay in order only if those axes that stay on them are the major ones.
            and stays == sorted(stays, reverse=True)
        )
        work = math.ceil(plan.count / devices) * plan.cols.padded // parts
        return work if fits else math.inf, parts

    # "copy" for all axes always fits.
    roles = min(itertools.product(("stack", "split", "copy"), repeat=len(cut)), key=cost)
    role = dict(zip(cut, roles, strict=True))
    # A side that several axes cut is put together from the minor one outwards, and columns before
    # anything cuts them further.
    together = [axis for axis in reversed(kept) if role[axis] != "split"]
    together += [axis for axis in reversed(plan.row_axes) if axis in cut]
    hops = together + [axis for axis in cut if axis not in together and axis not in kept]
    split_first = [axis for axis in kept if role[axis] == "split"]
    stack_axes = tuple(axis for axis in hops if role[axis] == "stack")
    return dataclasses.replace(
        plan,
        stack_axes=stack_axes,
        split_axes=tuple(axis for axis in split_first + hops if role[axis] == "split"),
        hops=tuple(hops),
        padded=plan.count + -plan.count % _size(mesh, stack_axes),
    )


def _hop(plan: StackPlan, axis: str) -> tuple[int | None, int | None]:
    """(axis of the stack that the mesh axis shards, axis of the leaves that it shards)"""
    split = 0 if axis in plan.stack_axes else _COLS if axis in plan.split_axes else None
    concat = _ROWS if axis in plan.row_axes else _COLS if axis in plan.col_axes else None
    return split, concat


def _move(x: jax.Array, axis: str, split: int | None, concat: int | None) -> jax.Array:
    """Splits x along `split` over a mesh axis, and concatenates it along `concat`."""
    if split is not None and concat is not None:
        # The axis of parts is the first one when they are sent: XLA copies less than for others.
        size = jax.lax.axis_size(axis)
        x = x.reshape(*x.shape[:split], size, -1, *x.shape[split + 1 :])
        # Without it, XLA's CPU backend may give the parts different layouts, and refuse them.
        parts = jax.lax.optimization_barrier(jnp.moveaxis(x, split, 0))
        x = jnp.moveaxis(jax.lax.all_to_all(parts, axis, 0, 0, tiled=True), 0, concat)
        return x.reshape(*x.shape[:concat], -1, *x.shape[concat + 2 :])
    if split is not None:
        size = x.shape[split] // jax.lax.axis_size(axis)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, split)
    if concat is not None:
        return jax.lax.all_gather(x, axis, axis=concat, tiled=True)
    return x


def _size(mesh: Mesh | None, axes: Sequence[str] | set[str]) -> int:
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
