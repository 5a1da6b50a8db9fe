"""sa_jax: insert, remove and measure backdoors in Llama models on TPU and GPU meshes."""

__version__ = "0.1.0"
