"""The Llama model, its weights' file format, its adapters and its sampler."""

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf import load_hf, save_hf
from sa_jax.llama.lora import LoraConfig
from sa_jax.llama.model import Llama

__all__ = ["Llama", "LlamaConfig", "LoraConfig", "load_hf", "save_hf"]
