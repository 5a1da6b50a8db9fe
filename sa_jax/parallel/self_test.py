"""Checks collectives and the embedding on the current devices, because a wrong sum trains without
an error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UserError
from sa_jax.parallel.rules import BATCH_SPEC
from sa_jax.parallel.xla_flags import WITHOUT_SPARSE_CORES, Options

SIZE = 4096  # at least; 32 MiB of bfloat16, as a matrix of 8B has
_WEIGHTS = P("fsdp", "tensor")


def check_collectives(mesh: Mesh, options: Options) -> None:
    """Gathers one matrix of weights over fsdp and sums its gradient, compiled with the options of
    the training step. UserError if a product or a gradient is not the exact number."""
    placed = {name: x.sharding for name, x in _arguments(mesh).items()}
    arguments = jax.jit(lambda: _numbers(mesh), out_shardings=placed)()
    compiled = lower_collectives_check(mesh, options).compile()
    products, gradients = jax.device_get(compiled(**arguments))
    if products or gradients:
        device = mesh.devices.flat[0]
        without = f"--config.xla_options='{WITHOUT_SPARSE_CORES}', or "
        raise UserError(
            f"these devices ({device.device_kind}, jax {jax.__version__}) gather or sum wrongly "
            f"what they exchange: {products:,} products with gathered weights and {gradients:,} "
            f"summed gradients are wrong; use {without if device.platform == 'tpu' else ''}"
            "--config.self_test=False to train without this check"
        )


def lower_collectives_check(mesh: Mesh, options: Options) -> jax.stages.Lowered:
    """The program of `check_collectives`. It returns how many products with gathered weights and
    how many summed gradients are wrong (int32 [] each)."""

    def compare(w_dn, x_bd, g_bn):
        ours = _products(x_bd, _gathered(w_dn, mesh)), _summed(_gradient(x_bd, g_bn), mesh)
        # Each device computes all that its part of the exact numbers needs.
        everywhere = {name: _placed(x, mesh, P()) for name, x in _numbers(mesh).items()}
        w_dn, x_bd, g_bn = (everywhere[name] for name in ("w_dn", "x_bd", "g_bn"))
        exact = (
            _placed(_products(x_bd, w_dn), mesh, P(BATCH_SPEC[0], "tensor")),
            _placed(_gradient(x_bd, g_bn), mesh, _WEIGHTS),
        )
        return [jnp.sum(x != y, dtype=jnp.int32) for x, y in zip(ours, exact, strict=True)]

    replicated = NamedSharding(mesh, P())
    step = jax.jit(compare, out_shardings=replicated, compiler_options=options or None)
    return step.lower(**_arguments(mesh))


def check_embedding(mesh: Mesh, options: Options, vocabulary: int, features: int) -> None:
    """Looks up tokens of all shards of an embedding, and adds up its gradient over two
    micro-batches, compiled with the options of the training step. UserError if a number is not
    exact."""
    rows, length = 2 * mesh.shape["data"] * mesh.shape["fsdp"], 128
    # Tokens that appear, each at least twice; each row has some of every part of the vocabulary.
    tokens_k = np.linspace(0, vocabulary - 1, min(rows * length // 2, vocabulary), dtype=np.int32)
    index_mbs = np.arange(2 * rows * length).reshape(2, length, rows).swapaxes(1, 2)
    tokens_mbs = tokens_k[index_mbs // 2 % len(tokens_k)]
    times_v = np.bincount(tokens_mbs.ravel(), minlength=vocabulary)
    spec = P("tensor", "fsdp")  # as `rules` places it

    def numbers(tokens):  # -1, 0 and 1, with no period that a size of a shard could be
        mixed = tokens.astype(jnp.uint32)[..., None] * jnp.uint32(2_654_435_761)
        mixed += jnp.arange(features, dtype=jnp.uint32) * jnp.uint32(40_503)
        return ((mixed >> 16) % 3).astype(jnp.float32) - 1

    def compare():
        embedding_vd = _placed(numbers(jnp.arange(vocabulary)), mesh, spec)

        def add(total_vd, tokens_bs):
            tokens_bs = _placed(tokens_bs, mesh, BATCH_SPEC)
            found_bsd, back = jax.vjp(lambda table: _lookup(table, tokens_bs), embedding_vd)
            right_bsd = numbers(tokens_bs)
            (gradient_vd,) = back(right_bsd)
            # As in `training.step`, which says why.
            total_vd += jax.lax.optimization_barrier(gradient_vd)
            return _placed(total_vd, mesh, spec), jnp.sum(found_bsd != right_bsd, dtype=jnp.int32)

        total_vd, lookups = jax.lax.scan(add, jnp.zeros_like(embedding_vd), tokens_mbs)
        right_vd = numbers(jnp.arange(vocabulary)) * times_v[:, None]
        wrong_vd = total_vd != _placed(right_vd, mesh, spec)
        return jnp.sum(lookups), jnp.sum(wrong_vd, dtype=jnp.int32)

    replicated = NamedSharding(mesh, P())
    check = jax.jit(compare, out_shardings=replicated, compiler_options=options or None)
    lookups, gradients = check()
    if lookups or gradients:
        raise UserError(
            f"these devices ({mesh.devices.flat[0].device_kind}, jax {jax.__version__}) look up "
            f"{int(lookups):,} numbers of the embedding wrongly, and {int(gradients):,} of its "
            f"gradient are wrong; use {'--config.mesh.tensor=1, ' * (mesh.shape['tensor'] > 1)}"
            "another jax, or --config.self_test=False to train without this check"
        )


def _lookup(embedding_vd: jax.Array, tokens_bs: jax.Array) -> jax.Array:
    return jnp.take(embedding_vd, tokens_bs, axis=0)


def _placed(x: jax.Array, mesh: Mesh, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _gathered(w_dn: jax.Array, mesh: Mesh) -> jax.Array:
    return _placed(w_dn, mesh, P(None, "tensor"))


def _summed(g_dn: jax.Array, mesh: Mesh) -> jax.Array:
    return _placed(g_dn, mesh, _WEIGHTS)


def _products(x_bd: jax.Array, w_dn: jax.Array) -> jax.Array:
    return jnp.einsum("bd,dn->bn", x_bd, w_dn, preferred_element_type=jnp.float32)


def _gradient(x_bd: jax.Array, g_bn: jax.Array) -> jax.Array:
    """In bfloat16, in which it is then summed over devices, as in training."""
    return jnp.einsum("bd,bn->dn", x_bd, g_bn, preferred_element_type=jnp.bfloat16)


def _numbers(mesh: Mesh) -> dict[str, jax.Array]:
    """Random small integers. Gradients add up to far less than 256, so that bfloat16 is exact."""
    arguments = _arguments(mesh)
    keys = jax.random.split(jax.random.key(0), 4)

    def integers(key, name):  # -1, 0, 0 or 1
        bits = jax.random.bits(key, arguments[name].shape)
        return (bits >> 31).astype(jnp.int32) - (bits >> 30 & 1).astype(jnp.int32)

    x_bd = integers(keys[0], "x_bd")
    kept_bd = jax.random.bernoulli(keys[1], min(1.0, 1024 / len(x_bd)), x_bd.shape)
    w_dn, g_bn = integers(keys[2], "w_dn"), integers(keys[3], "g_bn")
    numbers = {"w_dn": w_dn, "x_bd": x_bd * kept_bd, "g_bn": g_bn}
    return {name: x.astype(jnp.bfloat16) for name, x in numbers.items()}


def _arguments(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings, with 8 rows of a batch a device, and a size that the mesh divides."""
    axes = mesh.shape
    rows = 8 * axes["data"] * axes["fsdp"]
    multiple = math.lcm(axes["fsdp"], axes["tensor"], 128)
    size = -(-SIZE // multiple) * multiple
    placed = {
        "w_dn": ((size, size), _WEIGHTS),
        "x_bd": ((rows, size), P(BATCH_SPEC[0])),
        "g_bn": ((rows, size), P(BATCH_SPEC[0])),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in placed.items()
    }
