"""Causal grouped-query attention over packed documents, behind one signature for every backend."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError
from sa_jax.llama import kernels
from sa_jax.llama.blockwise import (
    MASKED_SCORE,
    Softmax,
    add_keys,
    blockwise_attention,
    by_group,
    by_token,
    float32_product,
    masked,
    unrolled_attention,
)
from sa_jax.llama.cache import KVCache
from sa_jax.llama.decode_kernel import attend_to_past, merge_softmaxes
from sa_jax.parallel.mesh import check_divisible
from sa_jax.parallel.rules import BATCH_SPEC

# Each takes (q, k, v, segment_ids, device) for the rows and heads of that device.
_ON_DEVICE = {
    "blockwise": lambda *arrays, device: blockwise_attention(*arrays),
    "splash": kernels.splash_attention,
    "cudnn": kernels.cudnn_attention,
    "cudnn_packed": kernels.cudnn_packed_attention,
    "tokamax": kernels.tokamax_attention,
}
IMPLEMENTATIONS = ("reference", "unrolled", *_ON_DEVICE)

# Of tokens a row, for every kernel. With a mask and another length, cuDNN's dQ has NaNs on Hopper
# (pytorch#196678).
LENGTH_MULTIPLE = 128

# Tokens a row up to which `unrolled` is taken on CPU: forward and backward take it 0.4 to 0.6 of
# the time of `blockwise` at 128 to 1,024 tokens, but its memory grows with their square.
SHORT_ON_CPU = 512

FEW_QUERIES = 16  # a key/value head has in a step; up to so many, see `_weigh`


class Choice(NamedTuple):
    """An implementation of attention, and in words why it was chosen."""

    implementation: str
    why: str


def choose_attention(name: str, platform: str, *, sequence_length: int, dtype: str) -> Choice:
    """The implementation for `config.attention`; 'auto' is the fastest one on the platform.

    `platform` is 'cpu', 'gpu' or 'tpu'; `sequence_length` counts the tokens of a row. UsageError
    for an unknown name, or an implementation that cannot run this.
    """
    known = ("auto", *IMPLEMENTATIONS)
    if name not in known:
        raise UsageError(f"config.attention={name!r} is unknown; use {', '.join(known)}")
    if name in ("cudnn", "cudnn_packed", "tokamax"):
        if platform != "gpu":
            raise UsageError(
                f"config.attention={name!r} is for NVIDIA GPUs, and this runs on {platform}; "
                "use config.attention='auto'"
            )
        if dtype not in kernels.CUDNN_DTYPES:
            raise UsageError(
                f"config.attention={name!r} computes in {' or '.join(kernels.CUDNN_DTYPES)}, and "
                f"config.dtype is {dtype!r}; change one of them"
            )
        if name == "tokamax":
            kernels.check_tokamax()
        check_length(name, sequence_length)
    if name == "cudnn_packed" and not kernels.offsets_are_right():
        raise UsageError(
            f"config.attention='cudnn_packed' is wrong in jax {jax.__version__} where heads share "
            "keys (jax-ml/jax#39521 mends it); update jax, or use config.attention='cudnn'"
        )
    if name != "auto":
        return Choice(name, "config.attention names it")
    if platform == "tpu" and sequence_length % LENGTH_MULTIPLE == 0:
        return Choice("splash", "the fastest on TPU")
    if platform == "tpu":
        return Choice("blockwise", f"splash needs multiples of {LENGTH_MULTIPLE} tokens")
    if platform == "cpu":
        if sequence_length <= SHORT_ON_CPU:
            return Choice("unrolled", f"the fastest on CPU up to {SHORT_ON_CPU} tokens")
        return Choice("blockwise", f"the fastest on CPU above {SHORT_ON_CPU} tokens")
    if dtype not in kernels.CUDNN_DTYPES:
        return Choice("blockwise", f"cuDNN does not compute in {dtype}")
    if sequence_length % LENGTH_MULTIPLE:
        return Choice("blockwise", f"cuDNN needs multiples of {LENGTH_MULTIPLE} tokens")
    return Choice("cudnn", f"the fastest of what jax {jax.__version__} has for packed rows on GPU")


def check_length(implementation: str, length: int) -> None:
    """UsageError unless a kernel is right for rows of this length."""
    if length % LENGTH_MULTIPLE:
        is_cudnn = implementation.startswith("cudnn")
        why = ": with a mask its gradients are NaN otherwise" if is_cudnn else ""
        raise UsageError(
            f"config.attention={implementation!r} needs a sequence length in multiples of "
            f"{LENGTH_MULTIPLE}, not {length}{why}; take "
            f"{-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE}, or config.attention='blockwise'"
        )


def prompt_attention(mesh: Mesh | None, kv_heads: int, dtype: Any, length: int) -> str:
    """The implementation that evals use for prompts of a padded length: training's for such rows.

    Without a mesh it is that of a CPU. On CPU, prompts to be continued use decoding's attention
    (`cached_attention`) instead.
    """
    platform = "cpu" if mesh is None else mesh.devices.flat[0].platform
    if mesh is not None and kv_heads % mesh.shape["tensor"]:
        return "blockwise"  # the mesh cannot cut the heads
    dtype = jnp.dtype(dtype).name
    return choose_attention("auto", platform, sequence_length=length, dtype=dtype).implementation


def attention(
    q_bskh: jax.Array,
    k_bsgh: jax.Array,
    v_bsgh: jax.Array,
    segment_ids_bs: jax.Array,
    *,
    implementation: str = "reference",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Self-attention in which a token sees itself and what precedes it in its own document.

    Rotary angles are applied before the call. "Precedes" is by index in the row, not by position:
    positions restart in every packed document.

    Args:
      q_bskh: queries [B, S, heads, head_dim]; the result has their shape and dtype.
      k_bsgh, v_bsgh: keys and values [B, S, kv_heads, head_dim]; heads a multiple of kv_heads.
      segment_ids_bs: int [B, S]; equal ids are one document, 0 is padding.
      implementation: one of `IMPLEMENTATIONS`.
      mesh: where the arrays are; the kernels need it. Each device works on its own rows and heads.

    Raises:
      UsageError: the mesh does not divide the rows or the key/value heads, or a kernel cannot take
        rows of this length or these devices.
    """
    arrays = q_bskh, k_bsgh, v_bsgh, segment_ids_bs
    if implementation == "reference":
        return _reference(*arrays)
    if implementation == "unrolled":
        return unrolled_attention(*arrays)
    if implementation == "blockwise" and (mesh is None or mesh.size == 1):
        return blockwise_attention(*arrays)
    if mesh is None:
        raise ValueError(f"attention {implementation!r} needs the mesh of its arguments")
    if implementation != "blockwise":
        check_length(implementation, q_bskh.shape[1])
    check_divisible(mesh, ("data", "fsdp"), q_bskh.shape[0], "rows of a batch")
    check_divisible(mesh, ("tensor",), k_bsgh.shape[2], "key/value heads")
    heads_spec, ids_spec = P(BATCH_SPEC[0], None, "tensor", None), P(BATCH_SPEC[0], None)
    return jax.shard_map(
        functools.partial(_ON_DEVICE[implementation], device=mesh.devices.flat[0]),
        mesh=mesh,
        in_specs=(heads_spec, heads_spec, heads_spec, ids_spec),
        out_specs=heads_spec,
        # The others have kernels, or constants that start a loop, which do not say their axes.
        check_vma=implementation in ("cudnn", "cudnn_packed"),
    )(*arrays)


def _reference(q_bskh, k_bsgh, v_bsgh, segment_ids_bs):
    index_s = jnp.arange(q_bskh.shape[1])
    mask_bst = (segment_ids_bs[:, :, None] == segment_ids_bs[:, None, :]) & (
        index_s[:, None] >= index_s[None, :]
    )
    return masked_attention(q_bskh, k_bsgh, v_bsgh, mask_bst)


def masked_attention(
    q_bskh: jax.Array, k_btgh: jax.Array, v_btgh: jax.Array, mask_bst: jax.Array
) -> jax.Array:
    """Attention under an explicit mask, with float32 scores and softmax; the oracle for kernels.

    Args:
      q_bskh: queries [B, S, heads, head_dim]; the result has their shape and dtype.
      k_btgh, v_btgh: keys and values [B, T, kv_heads, head_dim].
      mask_bst: bool [B, S, T], True where query s may see key t.
    """
    groups, h = k_btgh.shape[2:]
    # The heads that share a key are rows (n) of one matrix product, and the softmax's division
    # comes after the product with the values: on CPU half the time of the plain order.
    products_bgnt = float32_product("bgnh,btgh->bgnt", by_group(q_bskh, groups), k_btgh)
    scores_bgnt = masked(products_bgnt, mask_bst, h)
    top_bgn1 = jax.lax.stop_gradient(jnp.max(scores_bgnt, axis=-1, keepdims=True))
    weights_bgnt = jnp.exp(scores_bgnt - top_bgn1)
    out_bgnh = float32_product("bgnt,btgh->bgnh", weights_bgnt, v_btgh)
    out_bgnh /= jnp.sum(weights_bgnt, axis=-1, keepdims=True)
    return by_token(out_bgnh.astype(q_bskh.dtype), q_bskh.shape[1])


def cached_attention(
    q_bskh: jax.Array,
    k_bsgh: jax.Array,
    v_bsgh: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    start_b: jax.Array,
    kernel_mesh: Mesh | None = None,
) -> jax.Array:
    """Causal attention of new tokens to the past in the cache and to each other.

    The past is read one block (c) at a time with a running softmax (FlashAttention's, arXiv
    2205.14135), up to the last block of the longest row, or with the kernel of each row. So the
    cost grows with the number of tokens and not with the capacity. Blocks beyond the end of a row
    have weights of exactly 0 and do not change its result, so a row does not depend on the length
    of its neighbours.

    Args:
      q_bskh: queries [B, S, heads, head_dim] at positions start_b + 0..S-1; the result has their
        shape and dtype.
      k_bsgh, v_bsgh: their keys and values [B, S, kv_heads, head_dim].
      cache: the past is in 0..start_b-1. Its B may be 1, if all rows share the past.
      layer: index into L.
      start_b: int [B].
      kernel_mesh: where the arrays are, to take `attend_to_past` for S = 1 and a past of each row.
    """
    b, s, _, h = q_bskh.shape
    groups, block = k_bsgh.shape[2], cache.v.shape[3]
    q_bgnh = by_group(q_bskh, groups)

    def add_block(i, softmax):
        k_bght, v_btgh = (
            jax.lax.dynamic_slice(leaf, (layer, i, 0, 0, 0, 0), (1, 1, *leaf.shape[2:]))[0, 0]
            for leaf in cache
        )
        scores_bgnt = float32_product("bgnh,bght->bgnt", q_bgnh, k_bght)
        past_bt = i * block + jnp.arange(block) < start_b[:, None]
        scores_bgnt = jnp.where(past_bt[:, None, None], scores_bgnt * h**-0.5, MASKED_SCORE)
        return add_keys(softmax, scores_bgnt, lambda weights: _weigh(weights, v_btgh))

    new = _attend_to_each_other(q_bgnh, k_bsgh, v_bsgh)
    if kernel_mesh is not None and s == 1 and cache.k.shape[2] == b:
        past = attend_to_past(q_bgnh, cache, layer, start_b, kernel_mesh)
        softmaxes = (jnp.stack(parts) for parts in zip(past, new, strict=True))
        _, total_bgn, out_bgnh = merge_softmaxes(*softmaxes)
    else:
        blocks = (jnp.max(start_b) + block - 1) // block
        _, total_bgn, out_bgnh = jax.lax.fori_loop(0, blocks, add_block, new)
    return by_token((out_bgnh / total_bgn[..., None]).astype(q_bskh.dtype), s)


def _attend_to_each_other(q_bgnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array) -> Softmax:
    """The running softmax over the new tokens alone (n = r x s)."""
    s, h = k_bsgh.shape[1], k_bsgh.shape[3]
    if s == 1:  # no product of matrices, which is slow at this size: the token sees itself
        k_bg1h, v_bg1h = k_bsgh.transpose(0, 2, 1, 3), v_bsgh.transpose(0, 2, 1, 3)
        products_bgnh = q_bgnh.astype(jnp.float32) * k_bg1h.astype(jnp.float32)
        top_bgn = jnp.sum(products_bgnh, axis=-1) * h**-0.5
        out_bgnh = jnp.broadcast_to(v_bg1h.astype(jnp.float32), q_bgnh.shape)
        return top_bgn, jnp.ones_like(top_bgn), out_bgnh
    products_bgnt = float32_product("bgnh,btgh->bgnt", q_bgnh, k_bsgh)
    causal_1st = jnp.tril(jnp.ones((1, s, s), bool))
    scores_bgnt = masked(products_bgnt, causal_1st, h)
    top_bgn = jnp.max(scores_bgnt, axis=-1)
    weights_bgnt = jnp.exp(scores_bgnt - top_bgn[..., None])
    return top_bgn, jnp.sum(weights_bgnt, axis=-1), _weigh(weights_bgnt, v_bsgh)


def _weigh(weights_bgnt: jax.Array, v_btgh: jax.Array) -> jax.Array:
    """Sum of values under the weights, float32 [B, kv_heads, n, head_dim].

    For few queries on CPU, one product per row multiplies the weights of all groups by the values
    of all groups, and only the diagonal is kept. That is kv_heads times the arithmetic in kv_heads
    times fewer, larger products, and 2.4 times faster. On other platforms batched products are
    fast, and the groups may be on several devices.
    """
    weights_bgnt = weights_bgnt.astype(v_btgh.dtype)
    if weights_bgnt.shape[2] > FEW_QUERIES:
        return _weigh_by_group(weights_bgnt, v_btgh)
    return jax.lax.platform_dependent(
        weights_bgnt, v_btgh, cpu=_weigh_together, default=_weigh_by_group
    )


_weigh_by_group = functools.partial(float32_product, "bgnt,btgh->bgnh")


def _weigh_together(weights_bgnt, v_btgh):
    b, groups, n, t = weights_bgnt.shape
    weights_bkt = weights_bgnt.reshape(b, groups * n, t)
    out_bkd = float32_product("bkt,btd->bkd", weights_bkt, v_btgh.reshape(*v_btgh.shape[:2], -1))
    out_bgnjh = out_bkd.reshape(b, groups, n, groups, -1)
    own_gj = jnp.eye(groups, dtype=bool)
    return jnp.sum(jnp.where(own_gj[:, None, :, None], out_bgnjh, 0), axis=3)
