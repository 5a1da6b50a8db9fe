"""The weights that evals compute with: their dtype, their mesh, and whether layers are apart."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sa_jax.llama.config import LlamaConfig
from sa_jax.parallel.hardware import memory_bytes
from sa_jax.parallel.mesh import regroup
from sa_jax.parallel.rules import shardings


def has_room(mesh: Mesh, config: LlamaConfig, dtype: Any, devices: int, copies: int = 1) -> bool:
    """Whether so many more copies of the weights, each cut over so many devices, take at most a
    third of a device's memory. They come on top of what training keeps."""
    weights = config.num_parameters * jnp.dtype(dtype).itemsize
    return copies * weights / devices <= memory_bytes(mesh.devices.flat) / 3


def decoding_mesh(mesh: Mesh, config: LlamaConfig, dtype: Any) -> Mesh:
    """The mesh that answers are sampled on: the devices of `mesh`, and no weights cut over fsdp.

    A decoding step takes each weight for one token a row. Weights that are cut over fsdp are sent
    at every step: 15 GB for 8B on 8 chips of v5p, at least 44 ms, where reading an eighth of them
    takes 1 ms. So here only `tensor` cuts them, over as many devices as heads, features and
    vocabulary divide by. Each such group of devices has a copy.

    It is `mesh` itself if its fsdp is 1, or if there is no room for the copy, see `has_room`.
    """
    if mesh.shape["fsdp"] == 1:
        return mesh
    heads = math.gcd(config.num_heads, config.num_kv_heads)
    most = math.gcd(heads, config.intermediate_size, config.vocab_size)
    sizes = (size for size in range(most, 0, -1) if most % size == 0)
    tensor, groups = next((n, groups) for n in sizes if (groups := regroup(mesh, n)) is not None)
    return groups if has_room(mesh, config, dtype, tensor) else mesh


def layers_apart_pay(mesh: Mesh, config: LlamaConfig, dtype: Any, copies: int) -> bool:
    """Whether decoding takes a copy of the parameters with its layers apart: on GPUs with room.

    `mesh` is the result of `decoding_mesh`; `copies` of the weights are made, this one among them.
    """
    cut = mesh.shape["fsdp"] * mesh.shape["tensor"]
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    return on_gpu and has_room(mesh, config, dtype, cut, copies)


def move_weights(params: dict, mesh: Mesh) -> dict:
    """A copy on another mesh of the same devices in the same order.

    Not by `jax.device_put`, which in one process copies it through the host, and keeps it there.
    """
    return jax.jit(_same, out_shardings=shardings(mesh, params))(params)


def _same(params: dict) -> dict:
    return params


def cast_weights(params: dict, dtype) -> dict:
    """Weights in the dtype of the computation, cast once and not at every step, except norms.

    Those that have it already are not copied.
    """

    def cast(path, leaf):
        return leaf if path[-1].key == "scale" or leaf.dtype == dtype else _cast(leaf, dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(leaf: jax.Array, dtype) -> jax.Array:
    return leaf.astype(dtype)
