"""Causal grouped-query attention over packed documents, behind one signature for every backend."""

import jax
import jax.numpy as jnp

from sa_jax.errors import UsageError

# A finite stand-in for -inf: a row whose keys are all masked (padding) softmaxes to a uniform
# distribution instead of NaN, and its gradient stays finite.
MASKED_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)

IMPLEMENTATIONS = ("reference",)

CACHE_BLOCK = 64  # cached tokens read at a time


def attention(
    q_bskh: jax.Array,
    k_bsgh: jax.Array,
    v_bsgh: jax.Array,
    segment_ids_bs: jax.Array,
    *,
    implementation: str = "reference",
) -> jax.Array:
    """Self-attention in which a token sees itself and what precedes it in its own document.

    Rotary angles are applied before the call. "Precedes" is by index in the row, not by position:
    positions restart in every packed document.

    Args:
      q_bskh: queries [B, S, heads, head_dim].
      k_bsgh, v_bsgh: keys and values [B, S, kv_heads, head_dim]; heads a multiple of kv_heads.
      segment_ids_bs: int [B, S]; equal ids are one document, 0 is padding.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      [B, S, heads, head_dim] in the queries' dtype.

    Raises:
      UsageError: an unknown implementation.
    """
    if implementation != "reference":
        raise UsageError(
            f"config.attention={implementation!r} is unknown; use {', '.join(IMPLEMENTATIONS)}"
        )
    index_s = jnp.arange(q_bskh.shape[1])
    mask_bst = (segment_ids_bs[:, :, None] == segment_ids_bs[:, None, :]) & (
        index_s[:, None] >= index_s[None, :]
    )
    return masked_attention(q_bskh, k_bsgh, v_bsgh, mask_bst)


def masked_attention(
    q_bskh: jax.Array, k_btgh: jax.Array, v_btgh: jax.Array, mask_bst: jax.Array
) -> jax.Array:
    """Attention under an explicit mask; float32 scores and softmax. The oracle for every kernel.

    Args:
      q_bskh: queries [B, S, heads, head_dim].
      k_btgh, v_btgh: keys and values [B, T, kv_heads, head_dim].
      mask_bst: bool [B, S, T], True where query s may see key t.

    Returns:
      [B, S, heads, head_dim] in the queries' dtype.
    """
    b, s, heads, h = q_bskh.shape
    t, groups = k_btgh.shape[1:3]
    per_group = heads // groups
    # The heads that share a key are rows (n) of one matrix product, and the softmax's division
    # comes after the product with the values: on CPU half the time of the plain order.
    q_bgrsh = q_bskh.reshape(b, s, groups, per_group, h).transpose(0, 2, 3, 1, 4)
    scores_bgnt = jnp.einsum(
        "bgnh,btgh->bgnt",
        q_bgrsh.reshape(b, groups, per_group * s, h),
        k_btgh,
        preferred_element_type=jnp.float32,
    )
    scores_bgrst = scores_bgnt.reshape(b, groups, per_group, s, t) * h**-0.5
    scores_bgrst = jnp.where(mask_bst[:, None, None], scores_bgrst, MASKED_SCORE)
    top_bgrs1 = jax.lax.stop_gradient(jnp.max(scores_bgrst, axis=-1, keepdims=True))
    weights_bgrst = jnp.exp(scores_bgrst - top_bgrs1)
    out_bgnh = jnp.einsum(
        "bgnt,btgh->bgnh",
        weights_bgrst.astype(v_btgh.dtype).reshape(b, groups, per_group * s, t),
        v_btgh,
        preferred_element_type=jnp.float32,
    )
    out_bgrsh = out_bgnh.reshape(b, groups, per_group, s, h)
    out_bgrsh = (out_bgrsh / jnp.sum(weights_bgrst, axis=-1, keepdims=True)).astype(q_bskh.dtype)
    return out_bgrsh.transpose(0, 3, 1, 2, 4).reshape(b, s, heads, h)


def cached_attention(
    q_bskh: jax.Array,
    k_bsgh: jax.Array,
    v_bsgh: jax.Array,
    cache_k_lbgch: jax.Array,
    cache_v_lbgch: jax.Array,
    layer: jax.Array,
    start_b: jax.Array,
) -> jax.Array:
    """Attention of new tokens to their past in the cache and to each other, causally.

    The past is read in blocks, up to the longest row's last one, with a running softmax
    (FlashAttention's, arXiv 2205.14135): the cost follows the tokens that are there, not the
    capacity. Blocks past a row's own end change its result by not one bit (weights exactly 0), so
    a row does not depend on how long its neighbours are.

    Args:
      q_bskh: queries [B, S, heads, head_dim] at positions start_b + 0..S-1.
      k_bsgh, v_bsgh: their keys and values [B, S, kv_heads, head_dim].
      cache_k_lbgch, cache_v_lbgch: [L, B, kv_heads, capacity, head_dim], the past in 0..start_b-1.
      layer: which L to read.
      start_b: int [B].

    Returns:
      [B, S, heads, head_dim] in the queries' dtype.
    """
    b, s, heads, h = q_bskh.shape
    groups, capacity = cache_k_lbgch.shape[2], cache_k_lbgch.shape[3]
    block = min(CACHE_BLOCK, capacity)
    q_bgrsh = q_bskh.reshape(b, s, groups, heads // groups, h).transpose(0, 2, 3, 1, 4)
    index_s = jnp.arange(s)
    scores_bgrst = jnp.einsum(
        "bgrsh,btgh->bgrst", q_bgrsh, k_bsgh, preferred_element_type=jnp.float32
    )
    causal_st = index_s[:, None] >= index_s[None, :]
    scores_bgrst = jnp.where(causal_st, scores_bgrst * h**-0.5, MASKED_SCORE)
    top_bgrs = jnp.max(scores_bgrst, axis=-1)
    weights_bgrst = jnp.exp(scores_bgrst - top_bgrs[..., None])
    out_bgrsh = jnp.einsum(
        "bgrst,btgh->bgrsh",
        weights_bgrst.astype(v_bsgh.dtype),
        v_bsgh,
        preferred_element_type=jnp.float32,
    )

    def add_block(i, carry):
        top_bgrs, total_bgrs, out_bgrsh = carry
        # The last block may reach back into the one before it; what that one saw is masked.
        first = jnp.minimum(i * block, capacity - block)
        at = (layer, 0, 0, first, 0)
        k_bgth, v_bgth = (
            jax.lax.dynamic_slice(leaf, at, (1, b, groups, block, h))[0]
            for leaf in (cache_k_lbgch, cache_v_lbgch)
        )
        scores_bgrst = jnp.einsum(
            "bgrsh,bgth->bgrst", q_bgrsh, k_bgth, preferred_element_type=jnp.float32
        )
        index_t = first + jnp.arange(block)
        past_bt = (index_t < start_b[:, None]) & (index_t >= i * block)
        scores_bgrst = jnp.where(past_bt[:, None, None, None], scores_bgrst * h**-0.5, MASKED_SCORE)
        new_top_bgrs = jnp.maximum(top_bgrs, jnp.max(scores_bgrst, axis=-1))
        weights_bgrst = jnp.exp(scores_bgrst - new_top_bgrs[..., None])
        shrink_bgrs = jnp.exp(top_bgrs - new_top_bgrs)
        block_out_bgrsh = jnp.einsum(
            "bgrst,bgth->bgrsh",
            weights_bgrst.astype(v_bgth.dtype),
            v_bgth,
            preferred_element_type=jnp.float32,
        )
        return (
            new_top_bgrs,
            total_bgrs * shrink_bgrs + jnp.sum(weights_bgrst, axis=-1),
            out_bgrsh * shrink_bgrs[..., None] + block_out_bgrsh,
        )

    blocks = (jnp.max(start_b) + block - 1) // block
    carry = (top_bgrs, jnp.sum(weights_bgrst, axis=-1), out_bgrsh)
    _, total_bgrs, out_bgrsh = jax.lax.fori_loop(0, blocks, add_block, carry)
    out_bgrsh = (out_bgrsh / total_bgrs[..., None]).astype(q_bskh.dtype)
    return out_bgrsh.transpose(0, 3, 1, 2, 4).reshape(b, s, heads, h)
