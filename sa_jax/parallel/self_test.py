"""Checks collectives on the current devices, because a wrong sum trains without an error."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UserError
from sa_jax.parallel.rules import BATCH_SPEC
from sa_jax.parallel.xla_flags import Options

SIZE = 4096  # at least, so 32 MiB of bfloat16: libtpu gives small matrices to no SparseCore
WRONG = (
    "collectives are wrong on these devices with the XLA options above: {} products of gathered "
    "weights and {} summed gradients differ ({}, jax {}); on TPUs use config.xla_options="
    "'xla_tpu_enable_sparse_core_collective_offload_all_gather=false "
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=false', or "
    "config.self_test=False to train without this check"
)
_WEIGHTS = P("fsdp", "tensor")


def check_collectives(mesh: Mesh, options: Options) -> None:
    """Gathers a matrix over fsdp and sums its gradient as a step of training does, with the options
    of the step, and compares both with the exact numbers.

    Raises:
      UserError: an element differs.
    """
    place = {name: x.sharding for name, x in _arguments(mesh).items()}
    arguments = jax.jit(lambda: _patterns(mesh), out_shardings=place)()
    compiled = lower_collectives_check(mesh, options).compile()
    gathered, summed = jax.device_get(compiled(**arguments))
    if gathered or summed:
        kind = mesh.devices.flat[0].device_kind
        raise UserError(WRONG.format(gathered, summed, kind, jax.__version__))


def lower_collectives_check(mesh: Mesh, options: Options) -> jax.stages.Lowered:
    """The program of `check_collectives`, which returns how many products of gathered weights and
    how many summed gradients are wrong (int32 [] each)."""

    def compare(w_dn, x_bd, g_bn):
        def place(x, spec):
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        ours = _product(x_bd, place(w_dn, P(None, "tensor"))), _gradient(x_bd, g_bn)
        specs = P(BATCH_SPEC[0], "tensor"), _WEIGHTS
        # Each device computes all that its part needs.
        everywhere = {name: place(x, P()) for name, x in _patterns(mesh).items()}
        w_dn, x_bd, g_bn = (everywhere[name] for name in ("w_dn", "x_bd", "g_bn"))
        exact = _product(x_bd, w_dn), _gradient(x_bd, g_bn)
        return [
            jnp.sum(place(x, spec) != place(y, spec), dtype=jnp.int32)
            for x, y, spec in zip(ours, exact, specs, strict=True)
        ]

    arguments = _arguments(mesh)
    everywhere = NamedSharding(mesh, P())
    return jax.jit(compare, out_shardings=everywhere, compiler_options=options).lower(**arguments)


def _product(x_bd: jax.Array, w_dn: jax.Array) -> jax.Array:
    return jnp.einsum("bd,dn->bn", x_bd, w_dn, preferred_element_type=jnp.float32)


def _gradient(x_bd: jax.Array, g_bn: jax.Array) -> jax.Array:
    """In bfloat16, so that it is summed over devices in bfloat16, as in training."""
    return jnp.einsum("bd,bn->dn", x_bd, g_bn, preferred_element_type=jnp.bfloat16)


def _patterns(mesh: Mesh) -> dict[str, jax.Array]:
    """Small integers, of which no gradient adds up to more than 256, so that bfloat16 is exact."""
    rows, size = _sizes(mesh)
    b, d = jnp.arange(rows)[:, None], jnp.arange(size)
    apart = max(16, rows // 128)
    patterns = {
        "w_dn": (d[:, None] + 5 * d) % 7 - 3,
        "x_bd": jnp.where((b + d) % apart == 0, (b + 3 * d) % 2 + 1, 0),
        "g_bn": (2 * b + d) % 3 - 1,
    }
    return {name: x.astype(jnp.bfloat16) for name, x in patterns.items()}


def _arguments(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    rows, size = _sizes(mesh)
    placed = {
        "w_dn": ((size, size), _WEIGHTS),
        "x_bd": ((rows, size), P(BATCH_SPEC[0])),
        "g_bn": ((rows, size), P(BATCH_SPEC[0])),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in placed.items()
    }


def _sizes(mesh: Mesh) -> tuple[int, int]:
    """Rows of the batch; the side of the square matrix, which the mesh divides."""
    axes = mesh.shape
    multiple = math.lcm(axes["fsdp"], axes["tensor"], 128)
    return 8 * axes["data"] * axes["fsdp"], -(-SIZE // multiple) * multiple
