"""Rotary position embedding (arXiv 2104.09864) with Llama-3's frequency scaling, in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.llama.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair of head channels, float32 [head_dim / 2].

    Llama-3's scaling leaves wavelengths shorter than original/high_freq_factor alone, divides
    the frequency of those longer than original/low_freq_factor by `factor`, and blends between.
    All steps in float32, as transformers does: at position 131,071 one ulp here moves an angle by
    0.01 radians.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # The power is rounded once, from float64: bit for bit torch's (numpy's float32 power is not).
    powers = np.power(np.float64(config.rope_theta), exponents.astype(np.float64))
    frequencies = np.float32(1.0) / powers.astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    original = scaling.original_max_position_embeddings
    wavelengths = np.float32(2 * math.pi) / frequencies
    slowed = frequencies / np.float32(scaling.factor)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    share = (np.float32(original) / wavelengths - low) / (high - low)
    blended = (1 - share) * slowed + share * frequencies
    return np.select(
        [wavelengths > original / low, wavelengths < original / high],
        [slowed, frequencies],
        blended,
    ).astype(np.float32)


def rope_angles(config: LlamaConfig, positions_bs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, S, head_dim / 2], of integer positions [B, S]."""
    angles = positions_bs[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_bskh: jax.Array, cos_bsr: jax.Array, sin_bsr: jax.Array) -> jax.Array:
    """Rotates channel i with channel i + head_dim/2 (Hugging Face's pairing); float32 inside."""
    first, second = jnp.split(x_bskh.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_bsr[:, :, None], sin_bsr[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_bskh.dtype)
