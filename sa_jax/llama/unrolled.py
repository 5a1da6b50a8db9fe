"""Attention for short rows, its blocks of queries written out one after the other.

A block meets the keys up to its own end and no others, so about half of a row's scores are
computed. The backward pass keeps the weights of the forward pass, so memory grows with the square
of the row: `blockwise` is for longer ones.
"""

import jax
import jax.numpy as jnp

from sa_jax.llama.blockwise import MASKED_SCORE, by_group, by_token, float32_product

BLOCK = 64  # queries


@jax.custom_vjp
def unrolled_attention(
    q_bskh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, segment_ids_bs: jax.Array
) -> jax.Array:
    """`attention` for any platform and dtype; the fastest on CPU for short rows."""
    return _forward(q_bskh, k_bsgh, v_bsgh, segment_ids_bs)[0]


def _spans(tokens: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _forward(q_bskh, k_bsgh, v_bsgh, segment_ids_bs):
    """The output, and of each block the exponentials of its scores and their sums."""
    b, s, _, h = q_bskh.shape
    groups = k_bsgh.shape[2]
    index_s = jnp.arange(s)
    out, kept = [], []
    for span in _spans(s):
        past, tokens = slice(span.stop), span.stop - span.start
        q_bgnh = by_group(q_bskh[:, span], groups)
        scores_bgnt = float32_product("bgnh,btgh->bgnt", q_bgnh, k_bsgh[:, past])
        sees_bst = (segment_ids_bs[:, span, None] == segment_ids_bs[:, None, past]) & (
            index_s[span, None] >= index_s[past]
        )
        scores_bgrst = scores_bgnt.reshape(b, groups, -1, tokens, span.stop) * h**-0.5
        scores_bgrst = jnp.where(sees_bst[:, None, None], scores_bgrst, MASKED_SCORE)
        scores_bgnt = scores_bgrst.reshape(scores_bgnt.shape)
        weights_bgnt = jnp.exp(scores_bgnt - scores_bgnt.max(-1, keepdims=True))
        total_bgn1 = weights_bgnt.sum(-1, keepdims=True)
        # The division comes after the product, whose result is smaller than the weights.
        out_bgnh = float32_product("bgnt,btgh->bgnh", weights_bgnt, v_bsgh[:, past]) / total_bgn1
        out.append(by_token(out_bgnh, tokens).astype(q_bskh.dtype))
        kept.append((weights_bgnt, total_bgn1))
    return jnp.concatenate(out, axis=1), kept


def _forward_rule(q_bskh, k_bsgh, v_bsgh, segment_ids_bs):
    out_bskh, kept = _forward(q_bskh, k_bsgh, v_bsgh, segment_ids_bs)
    return out_bskh, (q_bskh, k_bsgh, v_bsgh, out_bskh, kept)


def _backward_rule(residuals, d_out_bskh):
    q_bskh, k_bsgh, v_bsgh, out_bskh, kept = residuals
    s, groups, h = k_bsgh.shape[1:]
    dq, dk_bght, dv_bght = [], jnp.float32(0), jnp.float32(0)
    for span, (weights_bgnt, total_bgn1) in zip(_spans(s), kept, strict=True):
        past, tokens = slice(span.stop), span.stop - span.start
        q_bgnh, out_bgnh, d_out_bgnh = (
            by_group(x_bskh[:, span], groups) for x_bskh in (q_bskh, out_bskh, d_out_bskh)
        )
        d_out_bgnh = d_out_bgnh.astype(jnp.float32) / total_bgn1
        # sum over t of weight x its gradient, which the softmax's derivative takes away
        mean_bgn1 = jnp.sum(d_out_bgnh * out_bgnh, axis=-1, keepdims=True)
        d_weights_bgnt = float32_product("bgnh,btgh->bgnt", d_out_bgnh, v_bsgh[:, past])
        d_scores_bgnt = weights_bgnt * (d_weights_bgnt - mean_bgn1)
        dq_bgnh = float32_product("bgnt,btgh->bgnh", d_scores_bgnt, k_bsgh[:, past]) * h**-0.5
        dq.append(by_token(dq_bgnh, tokens).astype(q_bskh.dtype))
        # Tokens last: on CPU half the time of the products with head_dim last.
        later = ((0, 0), (0, 0), (0, 0), (0, s - span.stop))
        dk_bght += jnp.pad(float32_product("bgnh,bgnt->bght", q_bgnh, d_scores_bgnt), later)
        dv_bght += jnp.pad(float32_product("bgnh,bgnt->bght", d_out_bgnh, weights_bgnt), later)
    dk_bsgh, dv_bsgh = (x_bght.transpose(0, 3, 1, 2) for x_bght in (dk_bght * h**-0.5, dv_bght))
    dq_bskh = jnp.concatenate(dq, axis=1)
    return dq_bskh, dk_bsgh.astype(k_bsgh.dtype), dv_bsgh.astype(v_bsgh.dtype), None


unrolled_attention.defvjp(_forward_rule, _backward_rule)
