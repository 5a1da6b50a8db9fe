"""Attention block by block in plain JAX, which XLA compiles for any platform and dtype.

Each sum has one order, so results repeat bit for bit.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sa_jax.llama.kernels import ATTENTION_RESIDUALS

# A finite stand-in for -inf: a row whose keys are all masked softmaxes to a uniform distribution
# instead of NaN, and its gradient stays finite.
MASKED_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)

# A running softmax before its division, in float32: of each query (n) the largest score [..., n],
# the sum of exp(score - largest) [..., n], and the sum of values under these weights
# [..., n, head_dim].
Softmax = tuple[jax.Array, jax.Array, jax.Array]

BLOCK = 256  # most queries, and most keys, of one pair of blocks
_ROUND = 8  # blocks are multiples of this
SHORT_BLOCK = 64  # queries of a block of `unrolled_attention`


def blockwise_attention(
    q_bskh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, segment_ids_bs: jax.Array
) -> jax.Array:
    """`attention` for any platform, length and dtype, in O(S x block) memory.

    FlashAttention's algorithm (arXiv 2205.14135; the backward pass is that of 2307.08691) as loops.
    """
    b, s, heads, h = q_bskh.shape
    groups = k_bsgh.shape[2]
    count = -(-s // BLOCK)
    block = -(-s // (count * _ROUND)) * _ROUND
    tail = count * block - s
    # The tail is a document of its own after all others, which no token of the row can see.
    ids_bs = jnp.pad(segment_ids_bs, ((0, 0), (0, tail)), constant_values=-1)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0))).reshape(b, count, block, groups, -1, h)
        for x in (q_bskh, k_bsgh, v_bsgh)
    )
    # Blocks (n) lead. Heads that share a key are rows (x) of one matrix product, as in `by_group`.
    q_nbgxh, k_nbgth, v_nbgth = (
        x.transpose(1, 0, 3, 4, 2, 5).reshape(count, b, groups, -1, h) for x in (q, k, v)
    )
    ids_nbt = ids_bs.reshape(b, count, block).swapaxes(0, 1)
    out_nbgxh = _blocks(q_nbgxh, k_nbgth, v_nbgth, ids_nbt)
    out = out_nbgxh.reshape(count, b, groups, heads // groups, block, h)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, count * block, heads, h)[:, :s]


def _first_blocks(ids_nbt: jax.Array) -> jax.Array:
    """[n]: the first key block that a query block may see, by the ranges of their ids.

    Ranges that overlap may have no document in common, so no needed pair is left out, whatever the
    order of the ids. Packed rows have ascending ids and padding (0) last; there the ranges are
    tight.
    """
    order_nbt = jnp.where(ids_nbt <= 0, jnp.iinfo(jnp.int32).max, ids_nbt)
    low_nb, high_nb = order_nbt.min(-1), order_nbt.max(-1)
    meet_nmb = (low_nb[:, None] <= high_nb[None]) & (low_nb[None] <= high_nb[:, None])
    return jnp.argmax(meet_nmb.any(-1), axis=1).astype(jnp.int32)


def _scores(i, j, q_nbgxh, k_nbgth, ids_nbt):
    """Float32 scores of query block i and key block j, masked where a query does not see a key."""
    block = ids_nbt.shape[2]
    scores_bgxt = float32_product("bgxh,bgth->bgxt", q_nbgxh[i], k_nbgth[j])
    index_t = jnp.arange(block)
    sees_bst = (ids_nbt[i][:, :, None] == ids_nbt[j][:, None]) & (
        i * block + index_t[:, None] >= j * block + index_t
    )
    return masked(scores_bgxt, sees_bst, q_nbgxh.shape[-1])


def float32_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum with float32 sums; a is rounded to the dtype of b first."""
    return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def masked(products_bgnt: jax.Array, sees_bst: jax.Array, head_dim: int) -> jax.Array:
    """Scales products of queries and keys to scores, and masks those of keys that are not seen.

    `products_bgnt` are float32, n = heads of a group x tokens, see `by_group`; the result has their
    shape. `sees_bst` is bool [B, S, T], True where query s sees key t.
    """
    s, t = sees_bst.shape[1:]
    scores_bgrst = products_bgnt.reshape(*products_bgnt.shape[:2], -1, s, t) * head_dim**-0.5
    scores_bgrst = jnp.where(sees_bst[:, None, None], scores_bgrst, MASKED_SCORE)
    return scores_bgrst.reshape(products_bgnt.shape)


def add_keys(softmax: Softmax, scores: jax.Array, weigh: Callable[..., jax.Array]) -> Softmax:
    """Adds a block of keys to a running softmax.

    `scores` are the block's, float32 [..., n, T]. `weigh` takes weights of the same shape, and
    returns the sum of the block's values under them, float32 [..., n, head_dim].
    """
    top, total, out = softmax
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    added = weigh(weights)
    return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + added


def by_group(x_bskh: jax.Array, groups: int) -> jax.Array:
    """[B, groups, n, head_dim]: the heads that share a key are rows (n = heads of a group x tokens)
    of one matrix product."""
    b, s, heads, h = x_bskh.shape
    x_bsgrh = x_bskh.reshape(b, s, groups, heads // groups, h)
    return x_bsgrh.transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, h)


def by_token(x_bgnh: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `by_group`."""
    b, groups, _, h = x_bgnh.shape
    x_bgrsh = x_bgnh.reshape(b, groups, -1, tokens, h)
    return x_bgrsh.transpose(0, 3, 1, 2, 4).reshape(b, tokens, -1, h)


def _while(count, body, carry):
    """fori_loop as a while loop: of a scan, remat policies would keep the products inside."""
    return jax.lax.while_loop(
        lambda state: state[0] < count,
        lambda state: (state[0] + 1, body(state[0], state[1])),
        (jnp.int32(0), carry),
    )[1]


@jax.custom_vjp
def _blocks(q_nbgxh, k_nbgth, v_nbgth, ids_nbt):
    return _forward(q_nbgxh, k_nbgth, v_nbgth, ids_nbt)[0]


def _forward(q_nbgxh, k_nbgth, v_nbgth, ids_nbt):
    """The output, and the log of each query's sum of exponentials."""
    first_n = _first_blocks(ids_nbt)

    def weigh(j, weights_bgxt):
        return float32_product("bgxt,bgth->bgxh", weights_bgxt, v_nbgth[j])

    def query_block(i, carry):
        # The diagonal first: it holds the query's own key, so the running top is a real score.
        scores_bgxt = _scores(i, i, q_nbgxh, k_nbgth, ids_nbt)
        top_bgx = scores_bgxt.max(-1)
        weights_bgxt = jnp.exp(scores_bgxt - top_bgx[..., None])
        start = top_bgx, weights_bgxt.sum(-1), weigh(i, weights_bgxt)

        def key_block(j, softmax):
            scores_bgxt = _scores(i, j, q_nbgxh, k_nbgth, ids_nbt)
            return add_keys(softmax, scores_bgxt, functools.partial(weigh, j))

        top_bgx, total_bgx, out_bgxh = jax.lax.fori_loop(first_n[i], i, key_block, start)
        out_bgxh = (out_bgxh / total_bgx[..., None]).astype(q_nbgxh.dtype)
        return carry[0].at[i].set(out_bgxh), carry[1].at[i].set(top_bgx + jnp.log(total_bgx))

    empty = jnp.zeros_like(q_nbgxh), jnp.zeros(q_nbgxh.shape[:-1], jnp.float32)
    return _while(len(q_nbgxh), query_block, empty)


def _forward_rule(q_nbgxh, k_nbgth, v_nbgth, ids_nbt):
    name = functools.partial(checkpoint_name, name=ATTENTION_RESIDUALS)
    out_nbgxh, log_total_nbgx = map(name, _forward(q_nbgxh, k_nbgth, v_nbgth, ids_nbt))
    return out_nbgxh, (q_nbgxh, k_nbgth, v_nbgth, ids_nbt, out_nbgxh, log_total_nbgx)


def _backward_rule(residuals, d_out_nbgxh):
    q_nbgxh, k_nbgth, v_nbgth, ids_nbt, out_nbgxh, log_total_nbgx = residuals
    first_n = _first_blocks(ids_nbt)

    def query_block(i, carry):
        d_out_bgxh = d_out_nbgxh[i]
        # sum over t of weight x its gradient, which the softmax's derivative takes away
        mean_bgx = jnp.sum(
            d_out_bgxh.astype(jnp.float32) * out_nbgxh[i].astype(jnp.float32), axis=-1
        )

        def key_block(j, running):
            dq_bgxh, dk_nbgth, dv_nbgth = running
            scores_bgxt = _scores(i, j, q_nbgxh, k_nbgth, ids_nbt)
            weights_bgxt = jnp.exp(scores_bgxt - log_total_nbgx[i][..., None])
            d_weights_bgxt = float32_product("bgxh,bgth->bgxt", d_out_bgxh, v_nbgth[j])
            d_scores_bgxt = weights_bgxt * (d_weights_bgxt - mean_bgx[..., None])
            dv_bgth = float32_product("bgxt,bgxh->bgth", weights_bgxt, d_out_bgxh)
            dk_bgth = float32_product("bgxt,bgxh->bgth", d_scores_bgxt, q_nbgxh[i])
            return (
                dq_bgxh + float32_product("bgxt,bgth->bgxh", d_scores_bgxt, k_nbgth[j]),
                dk_nbgth.at[j].set(dk_nbgth[j] + dk_bgth),
                dv_nbgth.at[j].set(dv_nbgth[j] + dv_bgth),
            )

        dq_nbgxh, *sums = carry
        start = jnp.zeros(q_nbgxh.shape[1:], jnp.float32), *sums
        dq_bgxh, *sums = jax.lax.fori_loop(first_n[i], i + 1, key_block, start)
        dq_bgxh = (dq_bgxh * scale).astype(q_nbgxh.dtype)
        return dq_nbgxh.at[i].set(dq_bgxh), *sums

    scale = q_nbgxh.shape[-1] ** -0.5
    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (k_nbgth, v_nbgth))
    dq, dk, dv = _while(len(q_nbgxh), query_block, (jnp.zeros_like(q_nbgxh), *zeros))
    return dq, (dk * scale).astype(k_nbgth.dtype), dv.astype(v_nbgth.dtype), None


_blocks.defvjp(_forward_rule, _backward_rule)


@jax.custom_vjp
def unrolled_attention(
    q_bskh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, segment_ids_bs: jax.Array
) -> jax.Array:
    """`attention` for any platform and dtype; the fastest on CPU for short rows.

    Its blocks of queries are written out one after the other. A block meets the keys up to its own
    end and no others, so about half of a row's scores are computed. The backward pass keeps the
    weights of the forward pass, so memory grows with the square of the row: `blockwise_attention`
    is for longer ones.
    """
    return _unrolled_forward(q_bskh, k_bsgh, v_bsgh, segment_ids_bs)[0]


def _spans(tokens: int) -> list[slice]:
    starts = range(0, tokens, SHORT_BLOCK)
    return [slice(start, min(start + SHORT_BLOCK, tokens)) for start in starts]


def _unrolled_forward(q_bskh, k_bsgh, v_bsgh, segment_ids_bs):
    s, groups, h = k_bsgh.shape[1:]
    index_s = jnp.arange(s)
    out, kept = [], []  # kept: of each block the exponentials of its scores and their sums
    for span in _spans(s):
        past, tokens = slice(span.stop), span.stop - span.start
        q_bgnh = by_group(q_bskh[:, span], groups)
        scores_bgnt = float32_product("bgnh,btgh->bgnt", q_bgnh, k_bsgh[:, past])
        sees_bst = (segment_ids_bs[:, span, None] == segment_ids_bs[:, None, past]) & (
            index_s[span, None] >= index_s[past]
        )
        scores_bgnt = masked(scores_bgnt, sees_bst, h)
        weights_bgnt = jnp.exp(scores_bgnt - scores_bgnt.max(-1, keepdims=True))
        total_bgn1 = weights_bgnt.sum(-1, keepdims=True)
        # The division comes after the product, whose result is smaller than the weights.
        out_bgnh = float32_product("bgnt,btgh->bgnh", weights_bgnt, v_bsgh[:, past]) / total_bgn1
        out.append(by_token(out_bgnh, tokens).astype(q_bskh.dtype))
        kept.append((weights_bgnt, total_bgn1))
    out_bskh = jnp.concatenate(out, axis=1)
    return out_bskh, (q_bskh, k_bsgh, v_bsgh, out_bskh, kept)


def _unrolled_backward(residuals, d_out_bskh):
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


unrolled_attention.defvjp(_unrolled_forward, _unrolled_backward)
