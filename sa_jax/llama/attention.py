"""Causal grouped-query attention over packed documents, behind one signature for every backend."""

import jax
import jax.numpy as jnp

from sa_jax.errors import UsageError

# A finite stand-in for -inf: a row whose keys are all masked (padding) softmaxes to a uniform
# distribution instead of NaN, and its gradient stays finite.
MASKED_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)

IMPLEMENTATIONS = ("reference",)


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
            f"config.attention={implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}"
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
    groups = k_btgh.shape[2]
    q_bsgrh = q_bskh.reshape(b, s, groups, heads // groups, h)
    scores_bgrst = jnp.einsum(
        "bsgrh,btgh->bgrst", q_bsgrh, k_btgh, preferred_element_type=jnp.float32
    )
    scores_bgrst = jnp.where(mask_bst[:, None, None], scores_bgrst * h**-0.5, MASKED_SCORE)
    weights_bgrst = jax.nn.softmax(scores_bgrst, axis=-1).astype(v_btgh.dtype)
    out_bsgrh = jnp.einsum("bgrst,btgh->bsgrh", weights_bgrst, v_btgh)
    return out_bsgrh.reshape(b, s, heads, h)
