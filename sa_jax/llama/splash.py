"""Splash attention on TPU: flash attention (arXiv 2205.14135) that skips masked-out blocks.

Pallas is imported only where the kernel is used, because the import takes half a second.
"""

import math
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

# What the kernel's backward pass needs, for remat policies: its output and log-sum-exp.
ATTENTION_RESIDUALS = "attention_residuals"
LANES = 128  # blocks are multiples of it

# Queries and keys of a tile in VMEM, forward and backward, by device_kind.
# v5p and v6e: MaxText's benchmarks/maxtext_{v5p,trillium}_model_configs.py (Llama 3.1). v4 and v5e
# have less VMEM in reach of one kernel: MaxText's default of 512 (configs/base.yml).
_BLOCKS = (
    ("TPU v4", 512),
    ("TPU v5 lite", 512),
    ("TPU v5", 1024),
    ("TPU v6", 1024),
    ("TPU7x", 1024),
)


def splash_attention(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    """`attention` on one device. A query head reads its group's keys and values without a copy.

    On other platforms the kernel is interpreted, which is slow and only for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    s, heads, h = q_bskh.shape[1:]
    mask = splash.MultiHeadMask([splash.CausalMask((s, s))] * heads)
    kernel = splash.make_splash_mha_single_device(
        mask,
        block_sizes=block_sizes(device.device_kind, s),
        residual_checkpoint_name=ATTENTION_RESIDUALS,
        interpret=device.platform != "tpu",
    )
    segment_ids = splash.SegmentIds(segment_ids_bs, segment_ids_bs)
    # The kernel does not scale its scores.
    q_bksh, k_bgsh, v_bgsh = (x.swapaxes(1, 2) for x in (q_bskh * h**-0.5, k_bsgh, v_bsgh))
    return jax.vmap(kernel)(q_bksh, k_bgsh, v_bgsh, segment_ids).swapaxes(1, 2)


def block_sizes(device_kind: str, s: int) -> "BlockSizes":
    """Tile sizes of a TPU generation, cut to divisors of the sequence length."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    tuned = (size for prefix, size in _BLOCKS if device_kind.startswith(prefix))
    size = math.gcd(next(tuned, LANES), s)
    return BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=min(size, 512),
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=min(size, 512),
        block_q_dq=size,
        block_kv_dq=size,
    )
