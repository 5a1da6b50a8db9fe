"""A small sharded training state, and what compares and damages its checkpoints."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = PartitionSpec


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
SPECS = {"layers": {"kernel": P(None, "fsdp", "tensor")}, "scale": P(), "half": P("fsdp")}


def mesh_of(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def init(seed: jax.Array) -> State:
    params = {
        "layers": {"kernel": jax.random.normal(jax.random.key(seed), (3, 64, 32))},
        "scale": jnp.linspace(-1.0, 1.0, 7),
        "half": jnp.arange(64, dtype=jnp.bfloat16) / 7,
    }
    return State(jnp.int32(0), params, OPTIMIZER.init(params), jax.random.key(seed + 1))


def abstract_state(mesh: jax.sharding.Mesh) -> State:
    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(
            (
                spec
                for key, spec in (("kernel", SPECS["layers"]["kernel"]), ("half", P("fsdp")))
                if name.endswith(key)
            ),
            P(),
        )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def make_state(mesh: jax.sharding.Mesh, seed: int = 0) -> State:
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh))
    return jax.jit(init, out_shardings=shardings)(seed)


def train_step(state: State) -> State:
    def loss(params):
        noise = jax.random.normal(state.key, (64,))
        return sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(params)) + (
            params["half"].astype(jnp.float32) @ noise
        )

    grads = jax.grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    key = jax.random.split(state.key)[0]
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state, key)


def as_bytes(tree: Any) -> list[bytes]:
    def raw(x: jax.Array) -> bytes:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()

    return [raw(x) for x in jax.tree.leaves(tree)]


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
