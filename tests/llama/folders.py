"""Hugging Face folders for the tests of reading and writing them."""

import functools

import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from sa_jax.llama.config import LlamaConfig, RopeScaling
from tests import toys

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    max_position_embeddings=131_072,
    bos_token_id=1,
    eos_token_ids=(2, 5),
)
TIED = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                   num_kv_heads=4, head_dim=8, tie_word_embeddings=True)  # fmt: skip


@functools.cache
def make_params(config=CONFIG, dtype=jnp.float32):
    return toys.normal_params(config, dtype)


def edit(folder, change):
    """Changes the tensors of a folder of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
