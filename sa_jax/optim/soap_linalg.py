"""Products with block-diagonal bases, and those bases by QR iterations; batched over matrices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST

# XLA unrolls its QR over column panels: compiling n = 2048 takes a minute for TPU. Above this size
# the loop over panels is ours, and compiled once.
_LARGEST_DIRECT = 256
_PANEL = 256

# Largest |QᵀQ - I| of a basis that is accepted; float32 gives 1e-6, three passes up to 1e-4.
_ORTHOGONALITY = 1e-3

# In place of the dtype of a product's operands: float32, multiplied by `three_passes`.
IN_THREE_PASSES = None


def einsum(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """jnp.einsum with operands rounded to `dtype` (or `IN_THREE_PASSES`), summed in float32."""
    if dtype is IN_THREE_PASSES:
        return three_passes(subscripts, x, y)
    if dtype == jnp.float32:
        return jnp.einsum(subscripts, x, y, precision=_HIGHEST)
    kind = jnp.finfo(dtype)

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)

    return jax.lax.platform_dependent(
        x,
        y,
        # XLA's CPU backend lacks the batched product; the float32 one of rounded values equals it.
        cpu=lambda x, y: jnp.einsum(subscripts, rounded(x), rounded(y)),
        default=lambda x, y: jnp.einsum(
            subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
        ),
    )


def rotate(
    x: jax.Array, q_rows: jax.Array | None, q_cols: jax.Array | None, dtype: Any
) -> jax.Array:
    """(Q_rowsᵀ·x·Q_cols)ᵀ of each matrix, block by block: [n, rows, cols] -> [n, cols, rows].

    The result is transposed, because a TPU's product over columns leaves them as rows, and would
    copy them to turn them back. The inverse is rotate(·, Q_colsᵀ, Q_rowsᵀ).
    """
    n, rows, cols = x.shape
    if q_rows is not None:
        blocks, block = q_rows.shape[1:3]
        x = x.reshape(n, blocks, block, cols)
        x = einsum("nkrc,nkrs->nksc", x, q_rows, dtype).reshape(n, rows, cols)
    if q_cols is None:
        return x.mT
    parts = [
        einsum("nrc,ncd->ndr", part, q_cols[:, k], dtype)
        for k, part in enumerate(jnp.split(x, q_cols.shape[1], 2))
    ]
    return jnp.concatenate(parts, 1)


def gram(x: jax.Array, side: int, blocks: int, dtype: Any) -> jax.Array:
    """x·xᵀ (side 1, rows) or xᵀ·x (side 2, columns) of each matrix's blocks along that side.

    x is [n, rows, cols]; returns float32 [n, blocks, block, block].
    """
    n, rows, cols = x.shape
    if side == 1:
        x = x.reshape(n, blocks, rows // blocks, cols)
        return einsum("nkrc,nksc->nkrs", x, x, dtype)
    # A TPU would copy x for one product with the axis of blocks between rows and columns.
    parts = [einsum("nrc,nrd->ncd", part, part, dtype) for part in jnp.split(x, blocks, 2)]
    return jnp.stack(parts, 1)


def refreshed_bases(
    gg: jax.Array, q: jax.Array, iterations: int | jax.Array, lift: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """QR iterations Q <- qr(A·Q) towards the eigenvectors of each factor.

    A is the factor over its mean eigenvalue, plus lift·I. Columns are sorted by eigenvalue for the
    QR, and then written back to their places, so that each place keeps its direction.

    Args:
      gg: symmetric factors, float32 [B, n, n]. A zero one keeps its basis (up to signs).
      q: their bases, float32 [B, n, n].
      iterations: how many (may be traced).
      lift: keeps directions without gradient unchanged, and slows the others down.

    Returns:
      New bases [B, n, n]; and whether each is finite and orthogonal, bool [B]. If one is not, its
      old basis is returned.
    """
    n = gg.shape[-1]
    scale = jnp.trace(gg, axis1=1, axis2=2)[:, None, None] / n
    eye = jnp.eye(n, dtype=gg.dtype)
    a = jnp.where(scale == 0, eye, gg / jnp.where(scale == 0, 1, scale) + lift * eye)

    def iterate(_, q):
        # Columns as rows: a permutation then moves what lies together in memory.
        y_rows = jnp.einsum("bij,bjk->bki", a, q, precision=_HIGHEST)
        order = jnp.argsort(-jnp.sum(q.mT * y_rows, axis=2), axis=1)[:, :, None]
        sorted_q = orthonormal(jnp.take_along_axis(y_rows, order, axis=1).mT)
        return jnp.take_along_axis(sorted_q.mT, jnp.argsort(order, axis=1), axis=1).mT

    new = jax.lax.fori_loop(0, iterations, iterate, q)
    overlaps = three_passes("bij,bik->bjk", new, new)
    good = jnp.max(jnp.abs(overlaps - eye), axis=(1, 2)) < _ORTHOGONALITY  # False for NaN
    # What is expressed in a spoilt basis could not be expressed in another.
    good &= jnp.all(jnp.isfinite(q) & jnp.isfinite(gg), axis=(1, 2))
    return jnp.where(good[:, None, None], new, q), good


def three_passes(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum to about 1e-5 on a TPU, in half the passes of HIGHEST; in float32 elsewhere.

    HIGH is not for GPUs: there it is TF32, which leaves bases orthogonal to 1e-3 only. Nor is
    `jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3` for either: in a program for several devices, XLA
    (Shardy's import) forgets the algorithm of a product of two plain matrices, and a TPU then
    rounds its operands to bfloat16.
    """
    product = functools.partial(jnp.einsum, subscripts)
    return jax.lax.platform_dependent(
        x,
        y,
        tpu=functools.partial(product, precision=jax.lax.Precision.HIGH),
        default=functools.partial(product, precision=_HIGHEST),
    )


def loops_on_cpu(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A function of one matrix that `jax.vmap` turns into a loop over the batch on CPU.

    The loop takes as long as the batch. For a batch, jaxlib's LAPACK waits in a thread of XLA's
    pool for tasks of that same pool: as many devices as the pool has threads wait for ever.
    """
    looping = jax.custom_batching.custom_vmap(function)

    @looping.def_vmap
    def of_batch(_: int, __: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        loop = functools.partial(jax.lax.map, looping)
        return jax.lax.platform_dependent(x, cpu=loop, default=jax.vmap(function)), True

    return looping


def orthonormal(y: jax.Array) -> jax.Array:
    """The orthogonal factor of the QR decomposition of each square matrix, [B, n, n].

    On CPU one matrix after the other, for the reason that `loops_on_cpu` gives.
    """

    def together(y: jax.Array) -> jax.Array:
        direct = y.shape[-1] <= _LARGEST_DIRECT
        return jnp.linalg.qr(y)[0] if direct else _blocked_qr(y, _PANEL)

    def one_by_one(y: jax.Array) -> jax.Array:
        return jax.lax.map(lambda matrix: together(matrix[None])[0], y)

    return jax.lax.platform_dependent(y, cpu=one_by_one, default=together)


def qr_flops(n: int) -> float:
    """Operations of `orthonormal` for one matrix."""
    return (8 / 3 if n <= _LARGEST_DIRECT else 8) * float(n) ** 3


def _blocked_qr(y: jax.Array, panel: int) -> jax.Array:
    """Householder QR panel by panel, each panel's reflections applied as I - V·T·Vᵀ.

    Every panel has the same static shapes: finished rows are rotated to the bottom and zeroed,
    where reflections do not change them. Costs 8n³ in matrix products, whose precision leaves Q
    orthogonal to 1e-4.
    """
    batch, n, _ = y.shape
    extra = -n % panel
    q = jnp.broadcast_to(jnp.eye(n, dtype=y.dtype), (batch, n, n))
    # Yᵀ above Q: both are multiplied by the reflections from the right. (A TPU would transpose Y
    # twice for each panel.)
    both = jnp.concatenate([jnp.pad(y.mT, [(0, 0), (0, extra), (0, 0)]), q], 1)
    columns = jnp.arange(n)

    def reflect(k, both):
        start = k * panel
        block = jax.lax.dynamic_slice_in_dim(both, start, panel, axis=1)
        block = jnp.roll(jnp.where(columns >= start, block, 0), -start, axis=2)
        packed, tau = jnp.linalg.qr(block.mT, mode="raw")
        v = jnp.tril(packed.mT, -1) + jnp.eye(n, panel, dtype=y.dtype)
        # Reflections past the last row (and those of the padding) have tau = 0: they do nothing.
        v = jnp.roll(v, start, axis=1)
        vt = jnp.matmul(v, _triangular_factor(v, tau), precision=_HIGHEST)
        return both - three_passes("bip,bjp->bij", three_passes("bij,bjp->bip", both, vt), v)

    return jax.lax.fori_loop(0, (n + extra) // panel, reflect, both)[:, -n:]


def _triangular_factor(v: jax.Array, tau: jax.Array) -> jax.Array:
    """T of H_1·…·H_p = I - V·T·Vᵀ: (I + D·U)⁻¹·D, D = diag(τ), U = VᵀV above the diagonal."""
    upper = jnp.triu(jnp.einsum("bnp,bnq->bpq", v, v, precision=_HIGHEST), 1)
    system = jnp.eye(tau.shape[-1], dtype=v.dtype) + tau[:, :, None] * upper
    d = tau[:, :, None] * jnp.eye(tau.shape[-1], dtype=v.dtype)
    return jax.lax.linalg.triangular_solve(
        system, d, left_side=True, lower=False, unit_diagonal=True
    )
