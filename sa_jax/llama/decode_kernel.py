"""Attention of one new token a row to its cached past: one kernel for GPUs (Pallas, Triton).

XLA copies each block of the cache before a product reads it. This kernel reads each key and value
once, in place, and only up to the end of their own row (flash-decoding, arXiv 2311.01282).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sa_jax.llama.blockwise import MASKED_SCORE, Softmax, add_keys
from sa_jax.llama.cache import KVCache, cache_specs

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax 0.12 deprecates it
    triton = None  # type: ignore[assignment]

SMALLEST_PRODUCT = 16  # rows and columns of a product in Triton
PROGRAMS = 512  # if the cache has so many blocks; four for each multiprocessor of an H200


def kernel_takes(head_dim: int, block: int) -> bool:
    """Whether this jax has Triton, and the kernel takes heads and blocks of such sizes."""
    return triton is not None and all(
        n >= SMALLEST_PRODUCT and n & (n - 1) == 0 for n in (head_dim, block)
    )


def attend_to_past(
    q_bgrh: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    start_b: jax.Array,
    mesh: Mesh,
    parts: int | None = None,
) -> Softmax:
    """The running softmax over the cached tokens 0..start_b-1, of queries [B, kv_heads, r].

    Args:
      q_bgrh: a query of each row [B, kv_heads, r, head_dim]; r query heads share a key/value head.
      cache: copied at every call, unless its values have heads before tokens in memory, as
        `Sampler` lays them out.
      layer: index into L.
      start_b: int [B]; 0 for a row without a past, whose largest score is then `MASKED_SCORE`.
      mesh: of GPUs; each works on its own rows and heads.
      parts: of a row's blocks, each summed by one program; by default as many as make `PROGRAMS`.
    """
    specs = cache_specs(mesh, q_bgrh.shape[1])
    rows, heads = specs.k[2:4]
    by_head = P(rows, heads)
    return jax.shard_map(
        functools.partial(_on_device, parts=parts),
        mesh=mesh,
        in_specs=(by_head, specs, P(), P(rows)),
        out_specs=(by_head, by_head, by_head),
        check_vma=False,  # a kernel says nothing of axes
    )(q_bgrh, cache, layer, start_b)


def merge_softmaxes(top_zbgr: jax.Array, total_zbgr: jax.Array, out_zbgrh: jax.Array) -> Softmax:
    """Merges the running softmaxes over parts (z) of the tokens into one."""
    top_bgr = jnp.max(top_zbgr, axis=0)
    shrink_zbgr = jnp.exp(top_zbgr - top_bgr)
    out_bgrh = jnp.sum(out_zbgrh * shrink_zbgr[..., None], axis=0)
    return top_bgr, jnp.sum(total_zbgr * shrink_zbgr, axis=0), out_bgrh


def _on_device(q_bgrh, cache, layer, start_b, parts, interpret=False):
    """`interpret` computes the kernel's operations one by one, on any platform."""
    b, groups, r, h = q_bgrh.shape
    parts = parts or min(cache.k.shape[1], pl.cdiv(PROGRAMS, b * groups))
    queries = max(SMALLEST_PRODUCT, 1 << (r - 1).bit_length())  # rows above r are masked
    query = pl.BlockSpec((None, None, queries, h), lambda b, g, z: (b, g, 0, 0))
    per_head = pl.BlockSpec((None, None, None, queries), lambda b, g, z: (z, b, g, 0))
    per_feature = pl.BlockSpec((None, None, None, queries, h), lambda b, g, z: (z, b, g, 0, 0))
    whole = pl.BlockSpec()
    per_query = jax.ShapeDtypeStruct((parts, b, groups, r), jnp.float32)
    softmaxes = pl.pallas_call(
        functools.partial(_kernel, r=r, parts=parts),
        grid=(b, groups, parts),
        in_specs=[query, whole, whole, whole, whole],
        out_specs=[per_head, per_head, per_feature],
        out_shape=[per_query, per_query, per_query.update(shape=(*per_query.shape, h))],
        compiler_params=triton.CompilerParams(),  # Triton, with its defaults for the device
        interpret=interpret,
        name="attend_to_past",
    )(q_bgrh, cache.k, cache.v.swapaxes(3, 4), layer.reshape(1), start_b)
    return merge_softmaxes(*softmaxes)


def _kernel(
    q_ref: Any,  # [queries, head_dim]
    k_ref: Any,  # [L, C, B, kv_heads, head_dim, T]
    v_ref: Any,  # [L, C, B, kv_heads, T, head_dim]
    layer_ref: Any,  # [1]
    start_ref: Any,  # [B]
    top_ref: Any,  # [queries]
    total_ref: Any,  # [queries]
    out_ref: Any,  # [queries, head_dim]
    *,
    r: int,
    parts: int,
):
    """Every `parts`-th block of a row's past, for the queries of one key/value head."""
    row, head, part = (pl.program_id(axis) for axis in range(3))
    layer, start = layer_ref[0], start_ref[row]
    queries, h = q_ref.shape
    block = k_ref.shape[-1]
    is_query_n = jnp.arange(queries) < r
    q_nh = triton.load(q_ref, mask=is_query_n[:, None], other=0)

    def add_block(turn, softmax):
        i = part + turn * parts
        scores_nt = triton.dot(q_nh, k_ref[layer, i, row, head]) * h**-0.5
        is_past_t = i * block + jnp.arange(block) < start
        scores_nt = jnp.where(is_past_t[None], scores_nt, MASKED_SCORE)

        def weigh(weights_nt):
            v_th = v_ref[layer, i, row, head]
            return triton.dot(weights_nt.astype(v_th.dtype), v_th)

        return add_keys(softmax, scores_nt, weigh)

    empty = (
        jnp.full(queries, MASKED_SCORE, jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.zeros((queries, h), jnp.float32),
    )
    turns = pl.cdiv(pl.cdiv(start, block) - part, parts)
    top_n, total_n, out_nh = jax.lax.fori_loop(0, turns, add_block, empty)
    triton.store(top_ref, top_n, mask=is_query_n)
    triton.store(total_ref, total_n, mask=is_query_n)
    triton.store(out_ref, out_nh, mask=is_query_n[:, None])
