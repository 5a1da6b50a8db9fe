"""Checks attention on the current devices, because a wrong kernel trains without an error."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from sa_jax.errors import UserError
from sa_jax.llama.attention import attention, masked_attention
from sa_jax.llama.cache import KVCache, cache_specs
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.decode_kernel import attend_to_past, kernel_takes
from sa_jax.parallel.multihost import exchange
from sa_jax.parallel.rules import BATCH_SPEC
from sa_jax.parallel.xla_flags import is_deterministic
from sa_jax.text import first_line

# Tokens of the row that is tested, which every kernel takes. Tiles have up to 1,024 (splash).
LENGTHS = {"cpu": 512, "gpu": 512, "tpu": 3072}
# Of the largest number: four times bfloat16's epsilon, in which some matrix units multiply float32
# too. A token that sees another document is far beyond it.
TOLERANCE = 0.03


def check_attention(implementation: str, mesh: Mesh, dtype: Any, head_dim: int) -> dict[str, float]:
    """Compares attention, forward and backward, with `masked_attention` in float32.

    Each device has one row, with padding, a document of one token, and two that cross the tiles of
    the kernel; four query heads share a key/value head. The other arguments are those of the model.

    Returns:
      The largest differences of "output" and of the gradients of "queries", "keys" and "values",
      relative to the largest number.

    Raises:
      UserError: one is above `TOLERANCE`, or not finite; the message has both numbers.
    """
    worst = lower_attention_check(implementation, mesh, dtype, head_dim).compile()()
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


def lower_attention_check(implementation: str, mesh: Mesh, dtype: Any, head_dim: int) -> Lowered:
    """The program of `check_attention`: takes nothing, returns `_worst` of the output and of each
    gradient."""
    rows, groups = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    length = LENGTHS[mesh.devices.flat[0].platform]
    short = 2 * length // 5
    ids_s = np.repeat(np.arange(4, dtype=np.int32), [20, 1, short, length - 21 - short])
    index_s = np.arange(length)
    mask_st = (ids_s[:, None] == ids_s) & (index_s[:, None] >= index_s)

    def both():
        keys = jax.random.split(jax.random.key(0), 4)
        placed = NamedSharding(mesh, P(BATCH_SPEC[0], None, "tensor", None))
        *qkv, g = (
            jax.lax.with_sharding_constraint(
                jax.random.normal(each, (rows, length, heads, head_dim), dtype), placed
            )
            for each, heads in zip(keys, (4 * groups, groups, groups, 4 * groups), strict=True)
        )
        ids_bs = jnp.broadcast_to(ids_s, (rows, length))
        mask_bst = jnp.broadcast_to(mask_st, (rows, length, length))

        def ours(q, k, v):
            return attention(q, k, v, ids_bs, implementation=implementation, mesh=mesh)

        out, back = jax.vjp(ours, *qkv)
        floats = (x.astype(jnp.float32) for x in qkv)
        with jax.default_matmul_precision("highest"):
            oracle, oracle_back = jax.vjp(
                lambda q, k, v: masked_attention(q, k, v, mask_bst), *floats
            )
            oracles = oracle, *oracle_back(g.astype(jnp.float32))
        return [_worst(a, b) for a, b in zip((out, *back(g)), oracles, strict=True)]

    return jax.jit(both, out_shardings=NamedSharding(mesh, P())).lower()


def decoding_takes_kernel(mesh: Mesh, config: LlamaConfig, dtype: Any, block: int) -> bool:
    """Whether `Sampler` takes `decode_kernel`: on GPUs, if its sizes are the kernel's, and if it is
    right on these devices. `block` is the number of tokens in a block of the cache.

    Where the kernel does not compile or is wrong, a warning says so, and decoding takes products
    instead: each step then reads the cache twice and writes it once. Without these devices (plans)
    nothing is run.
    """
    if mesh.devices.flat[0].platform != "gpu" or not kernel_takes(config.head_dim, block):
        return False
    heads = config.num_heads // config.num_kv_heads
    return jax.default_backend() != "gpu" or _is_right(mesh, dtype, heads, config.head_dim, block)


@functools.cache
def _is_right(mesh: Mesh, dtype: Any, heads: int, head_dim: int, block: int) -> bool:
    why, error = "", float("nan")
    try:
        compare = compile_decode_check(mesh, dtype, heads, head_dim, block)
    except Exception as failure:  # whatever Triton raises on a device that it does not know
        why = first_line(failure)
    why = next(filter(None, exchange(why)), "")  # all processes decide alike
    if not why:
        error = float(compare())
        why = f"it differs by {error:.2g} of a row's largest number ({TOLERANCE} is allowed)"
    if not error <= TOLERANCE:  # NaN too
        logging.warning("decoding does without its kernel on these GPUs, and is slower: %s", why)
    return error <= TOLERANCE


def compile_decode_check(
    mesh: Mesh, dtype: Any, heads: int, head_dim: int, block: int
) -> Callable[[], jax.Array]:
    """Compiles a comparison of `attend_to_past` with `masked_attention` in float32.

    Each device has rows whose past is 1 token, a block, not a whole number of blocks, and 6 blocks,
    in 3 parts of 2 blocks; and two key/value heads, each shared by so many query heads.

    Returns:
      A function that computes the largest difference, relative to the largest number of the same
      row (float32 []).
    """
    past = np.asarray([1, block, 5 * block - 9, 6 * block], np.int32)
    groups = 2 * mesh.shape["tensor"]
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * len(past)
    specs = cache_specs(mesh, groups)

    def random(key, shape, spec):
        placed = NamedSharding(mesh, spec)
        return jax.lax.with_sharding_constraint(jax.random.normal(key, shape, dtype), placed)

    def compare():
        keys = jax.random.split(jax.random.key(0), 3)
        q_bgrh = random(keys[0], (rows, groups, heads, head_dim), P(*specs.k[2:4]))
        cache = KVCache(
            random(keys[1], (2, 6, rows, groups, head_dim, block), specs.k),
            random(keys[2], (2, 6, rows, block, groups, head_dim), specs.v),
        )
        past_b = jnp.tile(past, rows // len(past))
        _, total_bgr, out_bgrh = attend_to_past(q_bgrh, cache, jnp.int32(1), past_b, mesh, parts=3)
        ours_bkh = (out_bgrh / total_bgr[..., None]).reshape(rows, -1, head_dim)
        k_btgh = cache.k[1].transpose(1, 0, 4, 2, 3).reshape(rows, -1, groups, head_dim)
        v_btgh = cache.v[1].swapaxes(0, 1).reshape(k_btgh.shape)
        mask_b1t = jnp.arange(6 * block) < past_b[:, None, None]
        q_bskh = q_bgrh.reshape(rows, 1, -1, head_dim)
        q, k, v = (x.astype(jnp.float32) for x in (q_bskh, k_btgh, v_btgh))
        with jax.default_matmul_precision("highest"):
            oracle_bkh = masked_attention(q, k, v, mask_b1t)[:, 0]
        error_b = jnp.max(jnp.abs(ours_bkh - oracle_bkh), axis=(1, 2))
        return jnp.max(error_b / jnp.max(jnp.abs(oracle_bkh), axis=(1, 2)))

    return jax.jit(compare, out_shardings=NamedSharding(mesh, P())).lower().compile()


def _worst(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(difference relative to the largest number, both numbers) at the place that differs most."""
    ours = ours.astype(jnp.float32)
    difference = jnp.abs(ours - theirs)
    at = jnp.argmax(jnp.where(jnp.isnan(difference), jnp.inf, difference))
    numbers = ours.ravel()[at], theirs.ravel()[at]
    return difference.ravel()[at] / jnp.max(jnp.abs(theirs)), *numbers


def determinism(implementation: str, devices: int) -> str:
    """Whether a GPU run repeats bit for bit, also after a kill, in words."""
    if not is_deterministic():
        return (
            "not bit for bit the same when repeated or resumed; to make it so, set "
            "XLA_FLAGS='--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false'"
        )
    if devices > 1 and os.environ.get("NCCL_ALGO", "").lower() != "ring":
        return (
            "not bit for bit the same when repeated or resumed, because NVSwitch may add up "
            "gradients in any order; to make it so, set NCCL_ALGO=Ring"
        )
    same = "the same bit for bit when repeated or resumed"
    if implementation.startswith("cudnn"):
        same += (
            "; for that, cuDNN may need memory that grows with the square of the row, which "
            "config.attention='blockwise' does not"
        )
    return same
