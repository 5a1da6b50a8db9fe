"""The state of the fast SOAP, and how it is sharded."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_map_with_path

from sa_jax.optim.soap_layout import Side, SpecRule, StackPlan


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


def init_stack(plan: StackPlan) -> Stack:
    """Zeros, and identities as bases."""

    def factor(side: Side) -> jax.Array | None:
        shape = (plan.padded, side.blocks, side.block, side.block)
        return jnp.zeros(shape, jnp.float32) if side.blocks else None

    def basis(gg: jax.Array | None) -> jax.Array | None:
        return None if gg is None else gg + jnp.eye(gg.shape[-1], dtype=gg.dtype)

    moments = jnp.zeros((plan.padded, plan.cols.padded, plan.rows.padded), jnp.float32)
    rows, cols = factor(plan.rows), factor(plan.cols)
    return Stack(
        mu_ncr=moments,
        nu_ncr=moments,
        gg_rows=rows,
        q_rows=basis(rows),
        gg_cols=cols,
        q_cols=basis(cols),
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
