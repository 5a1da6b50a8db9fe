"""Keys and values of past tokens, and where new ones are written."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sa_jax.llama.config import LlamaConfig
from sa_jax.parallel.rules import BATCH_SPEC

CACHE_BLOCK = 64  # cached tokens that lie together and are read at a time


class KVCache(NamedTuple):
    """Keys [L, C, B, kv_heads, head_dim, T] and values [L, C, B, T, kv_heads, head_dim] of past
    tokens, in C blocks of T.

    Attention reads one layer's block at a time, which is contiguous in memory: on CPU this is 4
    times faster than reading from a row's whole capacity. The last axis of each array is the one
    that its product in attention does not sum over.
    """

    k: jax.Array
    v: jax.Array


def init_cache(config: LlamaConfig, batch: int, capacity: int, dtype=jnp.float32) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens, rounded up to whole blocks."""
    block = min(CACHE_BLOCK, capacity)
    rows = (config.num_layers, -(-capacity // block), batch)
    heads = (config.num_kv_heads, config.head_dim)
    return KVCache(
        jnp.zeros((*rows, *heads, block), dtype), jnp.zeros((*rows, block, *heads), dtype)
    )


def cache_specs(mesh: Mesh, kv_heads: int) -> Any:
    """A `KVCache` of PartitionSpecs: rows over data and fsdp, heads over tensor if it divides."""
    rows, heads = BATCH_SPEC[0], None if kv_heads % mesh.shape["tensor"] else "tensor"
    specs: Any = P(None, None, rows, heads), P(None, None, rows, None, heads)
    return KVCache(*specs)


def write(
    cache: KVCache,
    positions_bs: jax.Array,
    k_lbsgh: jax.Array,
    v_lbsgh: jax.Array,
    mesh: Mesh | None,
) -> KVCache:
    """Writes the new keys and values of all layers at their positions, in place, one write each.

    Each device of the mesh writes what it holds, or the compiler gathers the values of all heads.
    The layer and row axes are batch axes of the scatters: XLA does not move another axis to the
    front, which would copy the cache. On TPU the heads are a batch axis too: one index must write
    contiguous memory, and attention's products need the tokens inside the heads.
    """
    put = functools.partial(jax.lax.platform_dependent, tpu=write_heads, default=write_tokens)
    if mesh is not None:
        cache_spec = cache_specs(mesh, k_lbsgh.shape[3])
        new_spec = P(None, BATCH_SPEC[0], None, cache_spec.k[3])
        specs = (cache_spec, BATCH_SPEC, new_spec, new_spec)
        put = jax.shard_map(put, mesh=mesh, in_specs=specs, out_specs=cache_spec)
    return put(cache, positions_bs, k_lbsgh, v_lbsgh)


def write_tokens(cache, positions_bs, k_lbsgh, v_lbsgh) -> KVCache:
    """An index for each new token of a row."""
    index_lbs2 = _index(positions_bs, cache, k_lbsgh.shape[:3])
    return KVCache(
        _scatter(cache.k, index_lbs2, k_lbsgh, (0, 2), time_axis=5),
        _scatter(cache.v, index_lbs2, v_lbsgh, (0, 2), time_axis=3),
    )


def write_heads(cache, positions_bs, k_lbsgh, v_lbsgh) -> KVCache:
    """An index for each head of each new token of a row.

    The values' order in memory, heads before tokens as `Sampler` lays them out, is fixed: XLA would
    fold the swap of axes into the write, and move all values to another order at every step.
    """
    k_lbgsh, v_lbgsh = k_lbsgh.swapaxes(2, 3), v_lbsgh.swapaxes(2, 3)
    index_lbgs2 = _index(positions_bs[:, None], cache, k_lbgsh.shape[:4])
    v_lcbgth = with_layout_constraint(cache.v.swapaxes(3, 4), Layout(tuple(range(6))))
    v_lcbgth = _scatter(v_lcbgth, index_lbgs2, v_lbgsh, (0, 2, 3), time_axis=4)
    return KVCache(
        _scatter(cache.k, index_lbgs2, k_lbgsh, (0, 2, 3), time_axis=5), v_lcbgth.swapaxes(3, 4)
    )


def _index(positions: jax.Array, cache: KVCache, shape: tuple[int, ...]) -> jax.Array:
    """Block and place in the block of each position, [*shape, 2]."""
    block = cache.v.shape[3]
    index = jnp.stack([positions // block, positions % block], axis=-1)
    return jnp.broadcast_to(index, (*shape, 2))


def _scatter(leaf, index, new, batch_axes, *, time_axis):
    """`new` has the leaf's batch axes first, then the tokens, then the rest."""
    count = len(batch_axes)
    return jax.lax.scatter(
        leaf,
        index,
        new.astype(leaf.dtype),
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(count + 1, new.ndim)),
            inserted_window_dims=(1, time_axis),
            scatter_dims_to_operand_dims=(1, time_axis),
            operand_batching_dims=batch_axes,
            scatter_indices_batching_dims=tuple(range(count)),
        ),
        unique_indices=True,
        mode="promise_in_bounds",
    )
