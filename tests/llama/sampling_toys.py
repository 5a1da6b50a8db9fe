"""A model, prompts and settings for tests of sampling."""

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.sampler import SamplingSettings
from tests.toys import doubled

CONTEXT = 160  # two and a half blocks of the cache
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=CONTEXT,
)
# A short, a bucket-filling, and long prompts among them; ids that are not their indices.
LENGTHS = (1, 5, 16, 17, 9, 30, 100, 2, 12, 148, 7, 21)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CONFIG.vocab_size, n).tolist() for n in LENGTHS]
IDS = [100 + 7 * i for i in range(len(PROMPTS))]
# Prompts of one bucket, for tests that compile a sampler of their own; still more than its slots.
SHORT = tuple(
    [values[i] for i in range(len(PROMPTS)) if LENGTHS[i] <= 16] for values in (PROMPTS, IDS)
)
SAMPLED = SamplingSettings(max_new_tokens=12, temperature=0.9, seed=3, stop_token_ids=(11, 60))
GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0)


def make_params(model, seed=0):
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    return doubled(params)


def tokens_of(completions):
    return [completion.tokens for completion in completions]
