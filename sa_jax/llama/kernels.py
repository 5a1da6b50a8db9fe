"""Libraries' attention kernels over packed documents: splash on TPU, cuDNN and tokamax on GPU.

Each takes (q, k, v, segment_ids) as `attention` does, for the rows and heads of one device. Pallas
and tokamax are imported where they are used, because their imports take half a second or more.
"""

import contextlib
import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import flags
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from sa_jax.errors import UsageError

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

# What splash's and `blockwise`'s backward pass needs, for remat policies: output and log-sum-exp.
ATTENTION_RESIDUALS = "attention_residuals"

LANES = 128  # splash's blocks are multiples of it

# Queries and keys of splash's tile in VMEM, forward and backward, by the start of device_kind.
# v5p and v6e: MaxText's benchmarks/maxtext_{v5p,trillium}_model_configs.py (Llama 3.1). v4 and v5e
# have less VMEM in reach of one kernel: MaxText's default of 512 (configs/base.yml).
_BLOCKS = {"TPU v4": 512, "TPU v5 lite": 512, "TPU v5": 1024, "TPU v6": 1024, "TPU7x": 1024}

CUDNN_DTYPES = ("bfloat16", "float16")
MOST_DOCUMENTS = 256  # of a row, that `cudnn_packed` has room for
_PLANNED_CUDNN = 91000  # cuDNN 9.10: what is compiled for where no cuDNN is installed
_TOKAMAX = "0.0.12"  # its packed mask is no public API: 0.0.17 has another


def splash_attention(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    """Flash attention on TPU (arXiv 2205.14135) that skips masked-out blocks.

    A query head reads its group's keys and values without a copy. On other platforms the kernel is
    interpreted, which is slow and only for tests.
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
    """Splash's tile sizes of a TPU generation, cut to divisors of the sequence length."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    tuned = (size for prefix, size in _BLOCKS.items() if device_kind.startswith(prefix))
    size = math.gcd(next(tuned, LANES), s)
    compute = min(size, 512)
    return BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=compute,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=compute,
        block_q_dq=size,
        block_kv_dq=size,
    )


def cudnn_attention(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    """cuDNN's flash attention, in bfloat16 or float16.

    A mask [B, 1, S, S], shared by all heads, separates documents; it takes 32 MiB per row of 4,096
    tokens. The kernel itself is causal, so it skips half of the blocks.
    """
    same_b1st = segment_ids_bs[:, None, :, None] == segment_ids_bs[:, None, None, :]
    with _jax_mended(device):
        return jax.nn.dot_product_attention(
            q_bskh, k_bsgh, v_bsgh, mask=same_b1st, is_causal=True, implementation="cudnn"
        )


def cudnn_packed_attention(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    """`cudnn_attention` without a mask: cuDNN gets the offsets of each document.

    It needs Hopper or newer, and a jax for which `offsets_are_right`. The result of a row with more
    than `MOST_DOCUMENTS` is NaN, which stops training, because cuDNN would lose documents silently.
    """
    if capability(device) < (9,):
        raise UsageError(
            f"config.attention='cudnn_packed' needs Hopper or newer, and this is a "
            f"{device.device_kind}; use config.attention='cudnn'"
        )
    most = min(MOST_DOCUMENTS, q_bskh.shape[1])
    lengths_bm, starts_bm, count_b = packed_offsets(segment_ids_bs, most)
    with _jax_mended(device):
        out_bskh = jax_cudnn.dot_product_attention(
            *(q_bskh, k_bsgh, v_bsgh, None, None),
            *(lengths_bm, lengths_bm, starts_bm, starts_bm),
            scale=q_bskh.shape[-1] ** -0.5,
            mask_type=jax_cudnn.MaskType.PADDING_CAUSAL,
        )
    return jnp.where((count_b <= most)[:, None, None, None], out_bskh, jnp.nan)


def _starts(segment_ids_bs: jax.Array) -> jax.Array:
    """bool [B, S]: which tokens begin a document, a run of equal ids; padding is one too."""
    new_bs = segment_ids_bs[:, 1:] != segment_ids_bs[:, :-1]
    return jnp.pad(new_bs, ((0, 0), (1, 0)), constant_values=True)


def packed_offsets(segment_ids_bs: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The offsets of each row's documents, in the form of jax's cuDNN attention.

    Padding counts as a document: cuDNN's output there would be undefined otherwise.

    Args:
      segment_ids_bs: int [B, S]; a document is a run of equal ids.
      most: documents of a row (M); more are cut off.

    Returns:
      int32 lengths [B, M] and starts [B, M + 1], -1 after a row's last document; and how many
      documents each row has [B], also those that are cut off.
    """
    starts_bs = _starts(segment_ids_bs)
    count_b = jnp.sum(starts_bs, axis=1, dtype=jnp.int32)
    find = functools.partial(jnp.nonzero, size=most + 1, fill_value=segment_ids_bs.shape[1])
    bounds_bm = jax.vmap(lambda row_s: find(row_s)[0])(starts_bs).astype(jnp.int32)
    is_document_bm = jnp.arange(most + 1) < count_b[:, None]
    lengths_bm = jnp.where(is_document_bm[:, :-1], jnp.diff(bounds_bm), -1)
    return lengths_bm, jnp.where(is_document_bm, bounds_bm, -1), count_b


def offsets_are_right() -> bool:
    """Whether jax's offsets of documents are right when several query heads share keys.

    Before jax-ml/jax#39521 they were computed as if every query head had its own keys.
    """
    starts, length = jnp.asarray([[0, 1, -1]], jnp.int32), jnp.ones((1, 2), jnp.int32)
    query, key = (jnp.zeros((1, 2, heads, 8)) for heads in (2, 1))
    fixed = jax_cudnn._fix_seqlen_offsets(length, length, starts, starts, query, key)
    return int(fixed[3].ravel()[1]) == 8


def check_documents(count: int) -> None:
    """UsageError unless `cudnn_packed` takes rows of this many documents."""
    if count > MOST_DOCUMENTS:
        raise UsageError(
            f"config.attention='cudnn_packed' takes rows of up to {MOST_DOCUMENTS} documents, "
            f"padding included, and a packed row has {count}; use config.attention='cudnn', or a "
            "shorter config.sequence_length"
        )


@contextlib.contextmanager
def _jax_mended(device: jax.Device) -> Iterator[None]:
    """Corrects two things in jax while a call is traced.

    jax 0.10.2 makes cuDNN write the gradient of a boolean mask, [B, 1, S, S], which nothing reads.
    And jax checks the machine that compiles, where a plan needs the GPU that is compiled for.
    """
    changes: dict[str, Callable[..., Any]] = {"should_export_dbias": lambda *shapes: False}
    if jax.default_backend() != "gpu":
        here = capability(device)
        changes |= {
            "check_compute_capability": lambda least: here >= _version(least),
            "is_cuda_compute_capability_equal": lambda other: here == _version(other),
            "check_cudnn_version": lambda: _PLANNED_CUDNN,
        }
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            # A newer jax may have mended, and dropped, what is replaced here.
            if hasattr(jax_cudnn, name):
                stack.enter_context(mock.patch.object(jax_cudnn, name, value))
        yield


def capability(device: jax.Device) -> tuple[int, ...]:
    """CUDA's compute capability of a GPU, as (9, 0) for Hopper."""
    return _version(str(getattr(device, "compute_capability", "9.0")))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def first_keys(segment_ids_bs: jax.Array) -> jax.Array:
    """int32 [B, S]: where the document of each token starts; padding is a document."""
    index_s = jnp.arange(segment_ids_bs.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(_starts(segment_ids_bs), index_s, 0), axis=1)


def check_tokamax() -> None:
    """UsageError unless the supported version of tokamax is installed."""
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version != _TOKAMAX:
        installed = f"and {version} is installed" if version else "which is not installed"
        raise UsageError(
            f"config.attention='tokamax' needs tokamax {_TOKAMAX}, {installed}: pip install "
            f"tokamax=={_TOKAMAX}, or use config.attention='cudnn'"
        )


def tokamax_attention(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    """tokamax's flash attention, a Pallas Mosaic kernel for Hopper. It gets the first key that each
    query sees ([B, S] integers) instead of a mask."""
    check_tokamax()
    from tokamax._src import gpu_utils
    from tokamax._src.ops.attention import api, base

    if capability(device)[0] != 9:
        raise UsageError(
            f"config.attention='tokamax' is for Hopper GPUs, and this is a {device.device_kind}; "
            "use config.attention='cudnn'"
        )
    if not flags.FLAGS.is_parsed():  # tokamax would read the arguments of any program as its flags
        flags.FLAGS(["tokamax"])
    mask = base.Mask(k_start=first_keys(segment_ids_bs)[:, None], is_causal=True)
    if jax.default_backend() != "gpu":
        # For a plan the GPU that is compiled for counts, not the machine that compiles. For good:
        # the backward pass asks when this call has returned.
        for name in ("is_sm90", "is_sm100", "has_mosaic_gpu_support"):
            setattr(gpu_utils, name, lambda *_, name=name: name != "is_sm100")
    return api.IMPLEMENTATIONS["mosaic_gpu"](q_bskh, k_bsgh, v_bsgh, mask=mask)
