"""Draws the next token from logits: greedy, temperature, top-p; the noise is a pure function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How to sample; UsageError if a value is out of range."""

    max_new_tokens: int  # for a prompt; fewer if the context ends
    temperature: float  # 0 takes the most likely token; otherwise logits are divided by it
    # Samples among the fewest tokens whose probabilities sum to top_p or more (nucleus, arXiv
    # 1904.09751), after the temperature; tokens tied with the last one stay in.
    top_p: float = 1.0
    seed: int = 0  # of the noise, with the prompt's id and the position
    stop_token_ids: tuple[int, ...] = ()  # they end a completion, and are not part of it

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not self.temperature >= 0:
            raise UsageError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} must be in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed={self.seed} must be in 0..{2**32 - 1}")


def noise_arguments(settings: SamplingSettings) -> dict:
    """Arguments of `sample_tokens`; numbers are traced, so only a nucleus compiles again."""
    return {
        "seed": np.uint32(settings.seed),
        "temperature": np.float32(settings.temperature),
        "top_p": np.float32(settings.top_p),
        "nucleus": settings.temperature > 0 and settings.top_p < 1,
    }


def sample_tokens(
    logits_bv: jax.Array,
    prompt_ids_b: jax.Array,
    positions_b: jax.Array,
    *,
    seed: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    nucleus: bool,
) -> tuple[jax.Array, jax.Array]:
    """Draws next tokens by the Gumbel-max trick: tokens int32 [B], and their log-probabilities at
    temperature 1, float32 [B].

    Args:
      logits_bv: float32 [B, V].
      prompt_ids_b, positions_b: [B]; with seed they fix a row's noise.
      seed, temperature, top_p: scalars; temperature 0 takes the most likely tokens.
      nucleus: whether top_p counts.
    """

    def draw(logits_bv):
        scores_bv = logits_bv / temperature
        if nucleus:
            scores_bv = mask_outside_nucleus(scores_bv, top_p)
        key = jax.random.key(seed)

        def gumbel(prompt_id, position):
            row = jax.random.fold_in(jax.random.fold_in(key, prompt_id), position)
            return gumbel_noise(jax.random.bits(row, logits_bv.shape[-1:], jnp.uint32))

        return _argmax(scores_bv + jax.vmap(gumbel)(prompt_ids_b, positions_b))

    # Not a static argument: greedy and sampled evals share the program, which is slow to compile.
    tokens_b = jax.lax.cond(temperature > 0, draw, _argmax, logits_bv)
    chosen_b = jnp.take_along_axis(logits_bv, tokens_b[:, None], axis=-1)[:, 0]
    return tokens_b, chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)


def gumbel_noise(bits: jax.Array) -> jax.Array:
    """Float32 noise that is Gumbel-distributed for uniform uint32 bits, and grows with them.

    `jax.random.gumbel` uses 23 of the bits, so its noise ends at 15.9: it draws a token of
    probability 1e-7 half as often as it should, and one of 3e-8 never. (Its mode "high" draws twice
    as many random numbers.)
    """
    # Uniform in (0, 1): the bits' distance from their end, because float32 is finest near 0, and
    # there the noise is largest.
    rest = ((~bits).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(rest, 1 - 2.0**-24)))


def _argmax(scores_bv: jax.Array) -> jax.Array:
    """`jnp.argmax`, int32, in two plain reductions: on CPU 5 times faster than one over pairs."""
    size = scores_bv.shape[-1]
    is_top_bv = scores_bv == jnp.max(scores_bv, axis=-1, keepdims=True)
    first_b = jnp.min(jnp.where(is_top_bv, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(first_b, size - 1)  # where nothing equals the top, which is then NaN


def mask_outside_nucleus(logits_bv: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets to -inf all but the fewest most likely tokens whose probabilities reach top_p."""
    probabilities_bv = jax.nn.softmax(logits_bv, axis=-1)
    sorted_bv = -jnp.sort(-probabilities_bv, axis=-1)
    before_bv = jnp.cumsum(sorted_bv, axis=-1) - sorted_bv
    smallest_kept_b1 = jnp.min(
        jnp.where(before_bv < top_p, sorted_bv, jnp.inf), axis=-1, keepdims=True
    )
    return jnp.where(probabilities_bv >= smallest_kept_b1, logits_bv, -jnp.inf)
