"""cuDNN's flash attention over packed documents, on NVIDIA GPUs."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from sa_jax.errors import UsageError

DTYPES = ("bfloat16", "float16")
MOST_DOCUMENTS = 256  # a row, that `cudnn_packed` has room for
PLANNED_VERSION = 91000  # cuDNN 9.10: what is compiled for where no cuDNN is installed


def cudnn_attention(q_bskh, k_bsgh, v_bsgh, segment_ids_bs, *, device):
    """`attention` on one GPU, in bfloat16 or float16.

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


def packed_offsets(segment_ids_bs: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The offsets of each row's documents, in the form of jax's cuDNN attention.

    Padding counts as a document; else cuDNN's output there would be undefined.

    Args:
      segment_ids_bs: int [B, S]; a document is a run of equal ids.
      most: maximal number of documents per row (M); more are cut off.

    Returns:
      int32 lengths [B, M] and starts [B, M + 1], -1 after a row's last document, and how many
      documents each row has [B].
    """
    b, s = segment_ids_bs.shape
    new_bs = segment_ids_bs[:, 1:] != segment_ids_bs[:, :-1]
    starts_bs = jnp.concatenate([jnp.ones((b, 1), bool), new_bs], axis=1)
    count_b = jnp.sum(starts_bs, axis=1, dtype=jnp.int32)
    find = functools.partial(jnp.nonzero, size=most + 1, fill_value=s)
    bounds_bm = jax.vmap(lambda row_s: find(row_s)[0])(starts_bs).astype(jnp.int32)
    is_document_bm = jnp.arange(most + 1) < count_b[:, None]
    lengths_bm = jnp.where(is_document_bm[:, :-1], jnp.diff(bounds_bm), -1)
    return lengths_bm, jnp.where(is_document_bm, bounds_bm, -1), count_b


def offsets_are_right() -> bool:
    """Whether jax's offsets are right when several heads share keys. Before jax-ml/jax#39521 they
    were computed as if every query head had its own keys."""
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
    And jax checks the compiling machine, where a plan needs the GPU that is compiled for.
    """
    changes: dict[str, Callable[..., Any]] = {"should_export_dbias": lambda *shapes: False}
    if jax.default_backend() != "gpu":
        here = capability(device)
        changes |= {
            "check_compute_capability": lambda least: here >= _version(least),
            "is_cuda_compute_capability_equal": lambda other: here == _version(other),
            "check_cudnn_version": lambda: PLANNED_VERSION,
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
