"""Checks attention on the current devices, because a wrong kernel trains without an error."""

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UserError
from sa_jax.llama.attention import attention, cached_attention, masked_attention
from sa_jax.llama.cache import CACHE_BLOCK, KVCache
from sa_jax.llama.decode_kernel import kernel_takes
from sa_jax.parallel.rules import BATCH_SPEC

LENGTH = 512  # every kernel takes it
# Of the largest number: four times bfloat16's epsilon, in which some matrix units multiply float32
# too. A token that sees another document is far beyond it.
TOLERANCE = 0.03


def check_attention(implementation: str, mesh: Mesh, dtype: Any, head_dim: int) -> dict[str, float]:
    """Compares attention, forward and backward, with `masked_attention` in float32.

    Each device has one row, with padding and documents of 1, 200 and 290 tokens; four query heads
    share a key/value head.

    Args:
      implementation, dtype, head_dim: as the model uses them.
      mesh: of the run; a row for each of data x fsdp, a key/value head for each of tensor.

    Returns:
      The largest differences of "output" and of the gradients of "queries", "keys" and "values",
      relative to the largest number.

    Raises:
      UserError: one is above `TOLERANCE`, or not finite; the message has both numbers.
    """
    rows, groups = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    ids_s = np.repeat(np.arange(4, dtype=np.int32), [LENGTH - 491, 1, 200, 290])
    index_s = np.arange(LENGTH)
    mask_st = (ids_s[:, None] == ids_s) & (index_s[:, None] >= index_s)

    def both(key):
        keys = jax.random.split(key, 4)
        placed = NamedSharding(mesh, P(BATCH_SPEC[0], None, "tensor", None))
        q, k, v, g = (
            jax.lax.with_sharding_constraint(
                jax.random.normal(each, (rows, LENGTH, heads, head_dim), dtype), placed
            )
            for each, heads in zip(keys, (4 * groups, groups, groups, 4 * groups), strict=True)
        )
        ids_bs = jnp.broadcast_to(ids_s, (rows, LENGTH))
        mask_bst = jnp.broadcast_to(mask_st, (rows, LENGTH, LENGTH))
        out, back = jax.vjp(
            lambda q, k, v: attention(q, k, v, ids_bs, implementation=implementation, mesh=mesh),
            q,
            k,
            v,
        )
        floats = (x.astype(jnp.float32) for x in (q, k, v))
        with jax.default_matmul_precision("highest"):
            oracle, oracle_back = jax.vjp(
                lambda q, k, v: masked_attention(q, k, v, mask_bst), *floats
            )
            oracles = oracle, *oracle_back(g.astype(jnp.float32))
        return [_worst(a, b) for a, b in zip((out, *back(g)), oracles, strict=True)]

    worst = jax.jit(both, out_shardings=NamedSharding(mesh, P()))(jax.random.key(0))
    names = ("output", "queries", "keys", "values")
    errors = {}
    for name, (error, ours, theirs) in zip(names, jax.device_get(worst), strict=True):
        errors[name] = float(error)
        if not error <= TOLERANCE:  # NaN too
            what = name if name == "output" else f"gradient of the {name}"
            raise UserError(
                f"attention {implementation!r} is wrong on these devices "
                f"({mesh.devices.flat[0].device_kind}, jax {jax.__version__}): its {what} has "
                f"{ours:.4g} where the reference has {theirs:.4g}, {error:.2g} of the largest "
                f"number ({TOLERANCE} is allowed); use config.attention='blockwise', or "
                "config.self_test=False to train without this check"
            )
    return errors


def decoding_takes_kernel(mesh: Mesh, dtype: Any, head_dim: int, block: int) -> bool:
    """Whether `Sampler` takes `decode_kernel`: on GPUs, if its sizes are the kernel's, and if it is
    right on these devices.

    Where the kernel fails or is wrong, a warning says so, and decoding takes products instead: each
    step then reads and writes the cache twice. Without these devices (plans), nothing is run.
    """
    if mesh.devices.flat[0].platform != "gpu" or not kernel_takes(head_dim, block):
        return False
    if jax.default_backend() != "gpu":
        return True
    try:
        error = decode_kernel_error(mesh, dtype, head_dim)
    except Exception as failure:  # whatever Triton's compiler raises on an unknown device
        why = str(failure).partition("\n")[0]
    else:
        if error <= TOLERANCE:
            return True
        why = f"it differs by {error:.2g} of the largest number ({TOLERANCE} is allowed)"
    logging.warning("decoding does not use its kernel on these GPUs, and is slower: %s", why)
    return False


@functools.cache
def decode_kernel_error(mesh: Mesh, dtype: Any, head_dim: int) -> float:
    """The largest difference of attention with `decode_kernel` from that without, in float32,
    relative to the largest number; rows of several lengths on each device."""
    starts = np.asarray([0, 1, CACHE_BLOCK, 5 * CACHE_BLOCK + 7], np.int32)
    devices, groups = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    rows, heads, layer = devices * len(starts), (groups, head_dim), jnp.int32(1)
    placed = NamedSharding(mesh, P(BATCH_SPEC[0], None, "tensor", None))

    def compare(key):
        keys, start_b = jax.random.split(key, 5), jnp.tile(starts, devices)
        q, k, v = (
            jax.lax.with_sharding_constraint(
                jax.random.normal(each, (rows, 1, n, head_dim), dtype), placed
            )
            for each, n in zip(keys, (4 * groups, groups, groups), strict=False)
        )
        cache = KVCache(
            jax.random.normal(keys[3], (2, 6, rows, *heads, CACHE_BLOCK), dtype),
            jax.random.normal(keys[4], (2, 6, rows, CACHE_BLOCK, *heads), dtype),
        )
        ours = cached_attention(q, k, v, cache, layer, start_b, kernel_mesh=mesh)
        q, k, v, cache = jax.tree.map(lambda x: x.astype(jnp.float32), (q, k, v, cache))
        with jax.default_matmul_precision("highest"):
            return _worst(ours, cached_attention(q, k, v, cache, layer, start_b))[0]

    return float(jax.jit(compare, out_shardings=NamedSharding(mesh, P()))(jax.random.key(0)))


def _worst(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(difference relative to the largest number, both numbers) at the place that differs most."""
    ours = ours.astype(jnp.float32)
    difference = jnp.abs(ours - theirs)
    at = jnp.argmax(jnp.where(jnp.isnan(difference), jnp.inf, difference))
    numbers = ours.ravel()[at], theirs.ravel()[at]
    return difference.ravel()[at] / jnp.max(jnp.abs(theirs)), *numbers


def determinism(implementation: str, cudnn_version: int | None) -> str:
    """Whether a GPU run repeats bit for bit, also after a kill, in words.

    Args:
      implementation: the implementation of attention.
      cudnn_version: 92500 for 9.25; None if not known.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if not re.search(r"--xla_gpu_deterministic_ops(=true|=1)?(\s|$)", flags):
        return (
            "not bit for bit the same when repeated or resumed; to make it so, set "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true"
        )
    if implementation.startswith("cudnn") and (cudnn_version or 0) < 92500:
        return (
            "deterministic, but for this cuDNN before 9.25 may need memory that grows with the "
            "square of the row: update cuDNN, or use config.attention='blockwise'"
        )
    return "deterministic: the same bit for bit when repeated or resumed"


def installed_cudnn() -> int | None:
    """The version of cuDNN, 92500 for 9.25; None without cuDNN."""
    try:
        from jax._src.lib import cuda_versions

        return None if cuda_versions is None else cuda_versions.cudnn_get_version()
    except (ImportError, RuntimeError):
        return None
