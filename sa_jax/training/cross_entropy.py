"""Next-token cross-entropy that never builds the logits [tokens, vocabulary].

It runs over the vocabulary in chunks: the forward pass keeps a running log-sum-exp (as in online
softmax, arXiv 1805.02867), and the backward pass computes each chunk's logits again. This costs one
more head matmul, and saves the largest activation of the step: at 8B and 65,536 tokens the logits
alone are 33.6 GB in float32.

A vocabulary that the chunks do not divide is padded, and the padding is masked. A vocabulary that
they divide (128,256 and 32,000 are such) has no such cost.
"""

import functools
import math

import jax
import jax.numpy as jnp

MAX_CHUNK = 16_384  # vocabulary entries whose logits exist at once


def cross_entropy_sum(
    hidden_nd: jax.Array,
    kernel_dv: jax.Array,
    targets_n: jax.Array,
    weights_n: jax.Array,
    *,
    vocab_shards: int = 1,
    max_chunk: int = MAX_CHUNK,
) -> jax.Array:
    """Sum over n of weight times negative log-likelihood of the target, float32 scalar (nats).

    Differentiable in `hidden_nd` and `kernel_dv`.

    Args:
      hidden_nd: final hidden states [N, D]; their dtype is that of the matrix products
        (accumulated in float32).
      kernel_dv: output matrix [D, V].
      targets_n: int [N].
      weights_n: float or bool [N]; 0 drops a token.
      vocab_shards: number of parts into which the mesh shards V. Every chunk takes an equal share
        of each part, so that slicing a chunk moves nothing between devices.
      max_chunk: upper bound on a chunk's vocabulary entries; at least one of each part.
    """
    d, v = kernel_dv.shape
    per_shard = v // vocab_shards
    chunks = math.ceil(per_shard / max(1, max_chunk // vocab_shards))
    width = math.ceil(per_shard / chunks)
    kernel_dtv = kernel_dv.astype(hidden_nd.dtype).reshape(d, vocab_shards, per_shard)
    # Each part at its own end: padding the whole would move columns from one part to the next.
    if padding := chunks * width - per_shard:
        kernel_dtv = jnp.pad(kernel_dtv, ((0, 0), (0, 0), (0, padding)))
    kernel_dtnc = kernel_dtv.reshape(d, vocab_shards, chunks, width)
    weights_n = weights_n.astype(jnp.float32)
    return _cross_entropy_sum(per_shard, hidden_nd, kernel_dtnc, targets_n, weights_n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy_sum(per_shard, hidden_nd, kernel_dtnc, targets_n, weights_n):
    return _forward(per_shard, hidden_nd, kernel_dtnc, targets_n, weights_n)[0]


def _chunk(per_shard, hidden_nd, kernel_dtnc, targets_n, index):
    """Logits of one chunk, float32 [N, T, C]; where its target is; the chunk's kernel.

    `per_shard` counts a part's columns without padding; those after it get a logit whose
    exponential is exactly 0, and are no token's target.
    """
    _, shards, chunks, width = kernel_dtnc.shape
    kernel_dtc = jax.lax.dynamic_index_in_dim(kernel_dtnc, index, axis=2, keepdims=False)
    logits_ntc = jnp.einsum(
        "nd,dtc->ntc", hidden_nd, kernel_dtc, preferred_element_type=jnp.float32
    )
    columns_c = index * width + jnp.arange(width)
    ids_tc = jnp.arange(shards)[:, None] * per_shard + columns_c
    is_target_ntc = targets_n[:, None, None] == ids_tc
    if chunks * width > per_shard:
        real_c = columns_c < per_shard
        # Finite, so that no difference of two of them is a NaN.
        logits_ntc = jnp.where(real_c, logits_ntc, jnp.finfo(jnp.float32).min)
        is_target_ntc &= real_c
    return logits_ntc, is_target_ntc, kernel_dtc


def _forward(per_shard, hidden_nd, kernel_dtnc, targets_n, weights_n):
    def visit(carry, index):
        peak_n, total_n, target_n = carry
        logits_ntc, is_target_ntc, _ = _chunk(per_shard, hidden_nd, kernel_dtnc, targets_n, index)
        new_peak_n = jnp.maximum(peak_n, logits_ntc.max(axis=(1, 2)))
        chunk_n = jnp.exp(logits_ntc - new_peak_n[:, None, None]).sum(axis=(1, 2))
        total_n = total_n * jnp.exp(peak_n - new_peak_n) + chunk_n
        target_n = target_n + jnp.where(is_target_ntc, logits_ntc, 0.0).sum(axis=(1, 2))
        return (new_peak_n, total_n, target_n), None

    n = hidden_nd.shape[0]
    zeros_n = jnp.zeros(n, jnp.float32)
    start = (jnp.full(n, -jnp.inf, jnp.float32), zeros_n, zeros_n)
    (peak_n, total_n, target_n), _ = _scan(visit, start, kernel_dtnc.shape[2])
    log_sum_exp_n = peak_n + jnp.log(total_n)
    loss = jnp.sum((log_sum_exp_n - target_n) * weights_n)
    return loss, (hidden_nd, kernel_dtnc, targets_n, weights_n, log_sum_exp_n, target_n)


def _backward(per_shard, residuals, gradient):
    hidden_nd, kernel_dtnc, targets_n, weights_n, log_sum_exp_n, target_n = residuals
    scale_n = (weights_n * gradient)[:, None, None]

    def visit(dhidden_nd, index):
        logits_ntc, is_target_ntc, kernel_dtc = _chunk(
            per_shard, hidden_nd, kernel_dtnc, targets_n, index
        )
        probability_ntc = jnp.exp(logits_ntc - log_sum_exp_n[:, None, None])
        dlogits_ntc = ((probability_ntc - is_target_ntc) * scale_n).astype(hidden_nd.dtype)
        dhidden_nd = dhidden_nd + jnp.einsum(
            "ntc,dtc->nd", dlogits_ntc, kernel_dtc, preferred_element_type=jnp.float32
        )
        # Complete for its chunk, so it is stored in the dtype that it is returned in.
        return dhidden_nd, jnp.einsum("nd,ntc->dtc", hidden_nd, dlogits_ntc)

    start = jnp.zeros(hidden_nd.shape, jnp.float32)
    dhidden_nd, dkernel_ndtc = _scan(visit, start, kernel_dtnc.shape[2])
    dkernel_dtnc = jnp.moveaxis(dkernel_ndtc, 0, 2)
    dweights_n = (log_sum_exp_n - target_n) * gradient
    return dhidden_nd.astype(hidden_nd.dtype), dkernel_dtnc, None, dweights_n


def _scan(visit, start, length):
    """lax.scan, but a single step is not a loop: a loop would only prevent fusion."""
    if length > 1:
        return jax.lax.scan(visit, start, jnp.arange(length))
    carry, out = visit(start, jnp.int32(0))
    return carry, jax.tree.map(lambda leaf: leaf[None], out)


_cross_entropy_sum.defvjp(_forward, _backward)
