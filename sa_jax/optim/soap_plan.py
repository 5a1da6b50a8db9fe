"""What the fast SOAP stores and computes for each parameter, only from shapes."""

import dataclasses
import math
from typing import Any

from sa_jax.optim.soap_layout import LONGEST_SIDE, Leaf, Side, StackPlan, make_layout
from sa_jax.optim.soap_linalg import qr_flops
from sa_jax.optim.soap_shared import ViewRule, flatten, trailing_matrix

_FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class SoapRow:
    """A parameter's line in the table."""

    path: str
    shape: tuple[int, ...]
    matrices: int  # independent ones in it; 0 if it gets Adam
    rows: Side | None  # not sharded
    cols: Side | None
    moment_bytes: int  # of Adam's two averages
    basis_bytes: int  # of factors and bases
    step_flops: float  # of every step: rotations and Grams
    refresh_flops: float  # more, in a step that refreshes the bases


def soap_plan(
    params: Any,
    *,
    view: ViewRule = trailing_matrix,
    block_size: int = 2048,
    block_above: int | None = None,
    max_precond_dim: int = LONGEST_SIDE,
) -> list[SoapRow]:
    """One row per parameter (or its ShapeDtypeStruct), for `soap(mode="fast")` with these settings.

    Zeros that pad a stack for a mesh are not counted: `jax.eval_shape(tx.init, params)` with the
    mesh shows them.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(params)[0].items()}
    plans, elementwise = make_layout(
        shapes,
        view=view,
        block_size=block_size,
        block_above=block_size if block_above is None else block_above,
        max_precond_dim=max_precond_dim,
    )
    rows = {leaf.path: _matrix_row(leaf, plan) for plan in plans for leaf in plan.leaves}
    for path in elementwise:
        moments = 2 * _FLOAT32 * math.prod(shapes[path])
        rows[path] = SoapRow(path, shapes[path], 0, None, None, moments, 0, 0.0, 0.0)
    return [rows[path] for path in shapes]


def _matrix_row(leaf: Leaf, plan: StackPlan) -> SoapRow:
    sides = (plan.rows, plan.cols)
    elements = plan.rows.padded * plan.cols.padded
    # A product of a matrix with blocks of n: 2n operations an element.
    product = sum(2.0 * side.block * elements for side in sides)
    # A refresh: A·Q, its QR, QᵀQ for the guard, old-to-new, and the average turned by that.
    refresh = sum(s.blocks * (3 * 2.0 * s.block**3 + qr_flops(s.block)) for s in sides if s.blocks)
    return SoapRow(
        path=leaf.path,
        shape=leaf.shape,
        matrices=leaf.count,
        rows=plan.rows,
        cols=plan.cols,
        moment_bytes=2 * _FLOAT32 * leaf.count * elements,
        basis_bytes=2 * _FLOAT32 * leaf.count * sum(s.blocks * s.block**2 for s in sides),
        step_flops=leaf.count * 3 * product,  # the gradient there, the step back, the Gram
        refresh_flops=leaf.count * (refresh + product),
    )
