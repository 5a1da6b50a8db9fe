"""Next-token cross-entropy in which [tokens, vocabulary] never exists.

The vocabulary is visited in chunks: forward keeps a running log-sum-exp (as in online softmax,
arXiv 1805.02867), backward computes each chunk's logits again. One more head matmul buys the
largest activation of the step: at 8B and 65,536 tokens the logits alone are 33.6 GB in float32.
"""

import functools

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
      vocab_shards: into how many mesh parts V is cut. Every chunk takes an equal share of each
        part, so that slicing a chunk moves nothing between devices.
      max_chunk: upper bound on a chunk's vocabulary entries.
    """
    d, v = kernel_dv.shape
    per_shard = v // vocab_shards
    chunks = next(n for n in range(1, per_shard + 1) if per_shard % n == 0 and v // n <= max_chunk)
    kernel_dtnc = kernel_dv.astype(hidden_nd.dtype).reshape(d, vocab_shards, chunks, -1)
    return _cross_entropy_sum(hidden_nd, kernel_dtnc, targets_n, weights_n.astype(jnp.float32))


@jax.custom_vjp
def _cross_entropy_sum(hidden_nd, kernel_dtnc, targets_n, weights_n):
    return _forward(hidden_nd, kernel_dtnc, targets_n, weights_n)[0]


def _chunk(hidden_nd, kernel_dtnc, targets_n, index):
    """Logits of one chunk, float32 [N, T, C]; where its target is; the chunk's kernel."""
    _, shards, chunks, width = kernel_dtnc.shape
    kernel_dtc = jax.lax.dynamic_index_in_dim(kernel_dtnc, index, axis=2, keepdims=False)
    logits_ntc = jnp.einsum(
        "nd,dtc->ntc", hidden_nd, kernel_dtc, preferred_element_type=jnp.float32
    )
    ids_tc = (jnp.arange(shards)[:, None] * chunks + index) * width + jnp.arange(width)
    return logits_ntc, targets_n[:, None, None] == ids_tc, kernel_dtc


def _forward(hidden_nd, kernel_dtnc, targets_n, weights_n):
    def visit(carry, index):
        peak_n, total_n, target_n = carry
        logits_ntc, is_target_ntc, _ = _chunk(hidden_nd, kernel_dtnc, targets_n, index)
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


def _backward(residuals, gradient):
    hidden_nd, kernel_dtnc, targets_n, weights_n, log_sum_exp_n, target_n = residuals
    scale_n = (weights_n * gradient)[:, None, None]

    def visit(dhidden_nd, index):
        logits_ntc, is_target_ntc, kernel_dtc = _chunk(hidden_nd, kernel_dtnc, targets_n, index)
        probability_ntc = jnp.exp(logits_ntc - log_sum_exp_n[:, None, None])
        dlogits_ntc = ((probability_ntc - is_target_ntc) * scale_n).astype(hidden_nd.dtype)
        contract = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dhidden_nd = dhidden_nd + contract("ntc,dtc->nd", dlogits_ntc, kernel_dtc)
        return dhidden_nd, contract("nd,ntc->dtc", hidden_nd, dlogits_ntc)

    start = jnp.zeros(hidden_nd.shape, jnp.float32)
    dhidden_nd, dkernel_ndtc = _scan(visit, start, kernel_dtnc.shape[2])
    dkernel_dtnc = jnp.moveaxis(dkernel_ndtc, 0, 2)
    dweights_n = (log_sum_exp_n - target_n) * gradient
    return (
        dhidden_nd.astype(hidden_nd.dtype),
        dkernel_dtnc.astype(kernel_dtnc.dtype),
        None,
        dweights_n,
    )


def _scan(visit, start, length):
    """lax.scan; a single step is run in line, since a loop of one only hides it from fusion."""
    if length > 1:
        return jax.lax.scan(visit, start, jnp.arange(length))
    carry, out = visit(start, jnp.int32(0))
    return carry, jax.tree.map(lambda leaf: leaf[None], out)


_cross_entropy_sum.defvjp(_forward, _backward)
