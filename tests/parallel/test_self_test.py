"""The checks of collectives and of the embedding pass on any mesh, and see what may be wrong."""

import math

import jax
import jax.numpy as jnp
import pytest

from sa_jax.errors import UserError
from sa_jax.parallel import self_test
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.self_test import check_collectives, check_embedding

MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 3, "tensor": 2}, {"fsdp": 6})


def mesh_of(sizes):
    return make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize("sizes", MESHES)
def test_right_collectives_pass_on_any_mesh(sizes, monkeypatch):
    monkeypatch.setattr(self_test, "SIZE", 512)
    check_collectives(mesh_of(sizes), {})


# What arrives, given what is right and the number of rows in a shard.
BREAKS = {
    "one number": lambda x_dn, shard: x_dn.at[16, 0].add(1),
    "a neighbour's shard": lambda x_dn, shard: jnp.roll(x_dn, shard, axis=0),
    "the first shard everywhere": lambda x_dn, shard: jnp.tile(
        x_dn[:shard], (len(x_dn) // shard, 1)
    ),
    "tiles of 16 rows in another order": lambda x_dn, shard: jnp.roll(x_dn, 16, axis=0),
    "zeros": lambda x_dn, shard: jnp.zeros_like(x_dn),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("name", ["_gathered", "_summed"])
def test_wrong_collectives_stop_the_run(name, how, monkeypatch):
    def broken(x_dn, mesh):
        return BREAKS[how](right(x_dn, mesh), len(x_dn) // mesh.shape["fsdp"])

    right = getattr(self_test, name)
    monkeypatch.setattr(self_test, name, broken)
    monkeypatch.setattr(self_test, "SIZE", 512)
    wrong, fine = "[1-9][0-9,]* ", "0 "
    products, gradients = (wrong, fine) if name == "_gathered" else (fine, wrong)
    words = f"exchange: {products}products.* and {gradients}summed.*; use --config.self_test=False"
    with pytest.raises(UserError, match=words):
        check_collectives(make_mesh(fsdp=4, tensor=2), {})


def test_no_gradient_is_too_large_for_bfloat16(monkeypatch):
    """Every integer up to 256 is exact."""
    rows = 8 * 4096
    shapes = {"w_dn": (256, 256), "x_bd": (rows, 256), "g_bn": (rows, 256)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    monkeypatch.setattr(self_test, "_arguments", lambda mesh: shapes)
    numbers = self_test._numbers(None)
    x_bd, g_bn = (numbers[name].astype(jnp.float32) for name in ("x_bd", "g_bn"))
    partial = jnp.cumsum(
        jnp.einsum("bxd,bxn->bdn", *(z.reshape(64, -1, 256) for z in (x_bd, g_bn))), 0
    )
    assert 80 < jnp.max(jnp.abs(partial)) <= 256


@pytest.mark.parametrize("vocabulary", [96, 6144, 12_000])  # fewer, as many and more than tokens
@pytest.mark.parametrize("sizes", MESHES)
def test_a_right_embedding_passes_on_any_mesh(sizes, vocabulary):
    check_embedding(mesh_of(sizes), {}, vocabulary, 48)


def wraps(table, tokens):
    """The last shard's tokens are those of the first."""
    return jnp.take(table, tokens % (len(table) // 2), axis=0)


def zeros_at_the_end(table, tokens):
    found = jnp.take(table, tokens, axis=0)
    return jnp.where((tokens < 3 * len(table) // 4)[..., None], found, 0)


def zeros_in_two_rows(table, tokens):
    """The first rows find nothing in the last shard."""
    first = jnp.arange(len(tokens))[:, None, None] < 2
    return jnp.where(first, zeros_at_the_end(table, tokens), jnp.take(table, tokens, axis=0))


@jax.custom_vjp
def overwrites(table, tokens):
    """Of a token that appears twice, the gradient is that of one place."""
    return jnp.take(table, tokens, axis=0)


overwrites.defvjp(
    lambda table, tokens: (overwrites(table, tokens), (table, tokens)),
    lambda kept, back: (jnp.zeros_like(kept[0]).at[kept[1]].set(back), None),
)


def adds_elsewhere(table, tokens):
    """What is looked up is right, and its gradient also goes to the next token."""
    others = jnp.take(table - jax.lax.stop_gradient(table), tokens + 1, axis=0, mode="wrap")
    return jnp.take(table, tokens, axis=0) + others


@pytest.mark.parametrize(
    ("lookup", "words"),
    [
        (wraps, "look up [1-9][0-9,]* numbers .* wrongly, and [1-9]"),
        (zeros_at_the_end, "look up [1-9][0-9,]* numbers .* wrongly, and [1-9]"),
        (zeros_in_two_rows, "look up [1-9][0-9,]* numbers .* wrongly, and [1-9]"),
        (adds_elsewhere, "look up 0 numbers .* and [1-9][0-9,]* of its gradient are wrong"),
        (overwrites, "look up 0 numbers .* and [1-9][0-9,]* of its gradient are wrong"),
    ],
)
@pytest.mark.parametrize("vocabulary", [512, 1020, 12_000])
def test_a_wrong_embedding_stops_the_run(lookup, words, vocabulary, monkeypatch):
    monkeypatch.setattr(self_test, "_lookup", lookup)
    with pytest.raises(UserError, match=words + ".*; use --config.mesh.tensor=1, another jax"):
        check_embedding(make_mesh(fsdp=2, tensor=4), {}, vocabulary, 48)
