"""Blockwise and unrolled attention against the oracle: packed rows, grouped heads, cut lengths."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.llama import blockwise
from sa_jax.llama.attention import attention
from sa_jax.llama.model import REMAT_POLICIES

# Documents of one token, of whole blocks, over several blocks, and padding at both ends.
DOCUMENTS = (1, 16, 40, 3)


def packed(length, heads, kv_heads, dtype=np.float32, head_dim=8):
    """Queries, keys, values, a cotangent, and segment ids of three rows of `length` tokens."""
    rng = np.random.default_rng(length)
    shapes = [(3, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    ids = np.zeros((3, length), np.int32)
    starts = np.cumsum((0, *DOCUMENTS))
    for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False), 1):
        ids[0, start:end] = number
    ids[1] = 1
    ids[2, length // 4 : length // 2] = 7  # padding before, and ids in no order
    ids[2, length // 2 : -1] = 3
    return q, k, v, g, jnp.asarray(ids)


def run(implementation, q, k, v, g, ids):
    def attend(q, k, v):
        return attention(q, k, v, ids, implementation=implementation)

    out, back = jax.vjp(attend, q, k, v)
    return out, *back(g)


def both(name, arguments):
    return [
        jax.jit(lambda *a, name=name: run(name, *a))(*arguments) for name in (name, "reference")
    ]


@pytest.fixture(params=["blockwise", "unrolled"])
def implementation(request, monkeypatch):
    """An implementation in blocks, so small that a short row has several."""
    for name in ("BLOCK", "SHORT_BLOCK"):
        monkeypatch.setattr(blockwise, name, 16)
    return request.param


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("length", [17, 64, 100])
def test_it_is_the_oracle(length, heads, kv_heads, implementation):
    arguments = packed(length, heads, kv_heads)
    (out, *gradients), (oracle, *oracles) = both(implementation, arguments)
    assert np.max(np.abs(out - oracle)) <= 1e-6
    for ours, theirs in zip(gradients, oracles, strict=True):
        assert np.all(np.isfinite(ours))
        assert np.max(np.abs(ours - theirs)) <= 1e-5 * np.max(np.abs(theirs))


@pytest.mark.long
@pytest.mark.parametrize("length", [600, 1000, 4096])
@pytest.mark.parametrize("name", ["blockwise", "unrolled"])
def test_long_rows_are_the_oracle(length, name):
    (out, *gradients), (oracle, *oracles) = both(name, packed(length, 4, 2))
    assert np.max(np.abs(out - oracle)) <= 1e-6
    for ours, theirs in zip(gradients, oracles, strict=True):
        assert np.max(np.abs(ours - theirs)) <= 1e-5 * np.max(np.abs(theirs))


def test_bfloat16_is_within_its_epsilon(implementation):
    arguments = packed(64, 4, 2, jnp.bfloat16)
    ours = jax.jit(lambda *a: run(implementation, *a))(*arguments)
    floats = [x.astype(jnp.float32) for x in arguments[:4]]
    oracle = jax.jit(lambda *a: run("reference", *a))(*floats, arguments[4])
    for a, b in zip(ours, oracle, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.max(np.abs(a.astype(np.float32) - b))
        assert error <= float(jnp.finfo(jnp.bfloat16).eps) * np.max(np.abs(b))


def test_no_gradient_crosses_documents_and_it_repeats_bit_for_bit(implementation):
    q, k, v, _, ids = packed(64, 4, 2)
    start, end = sum(DOCUMENTS[:2]), sum(DOCUMENTS[:3])

    def third_document(k, v):
        out = attention(q, k, v, ids, implementation=implementation)
        return jnp.sum(jnp.square(out[0, start:end]))

    compiled = jax.jit(jax.grad(third_document, argnums=(0, 1)))
    for gradient, again in zip(compiled(k, v), compiled(k, v), strict=True):
        assert np.any(gradient[0, start:end])
        assert not np.any(gradient[0, :start]) and not np.any(gradient[0, end:])
        assert not np.any(gradient[1:])
        np.testing.assert_array_equal(gradient, again)


def test_only_blocks_that_share_a_document_are_read():
    ids = jnp.asarray([[1, 1, 2, 2, 2, 3, 4, 0]]).reshape(1, 4, 2).swapaxes(0, 1)
    np.testing.assert_array_equal(blockwise._first_blocks(ids), [0, 1, 1, 3])


def test_memory_grows_with_the_row_not_with_its_square():
    """S = 8,192, 2 rows, 32 heads: forward and backward take a twentieth of the reference's."""
    shapes = [jax.ShapeDtypeStruct((2, 8192, n, 64), jnp.bfloat16) for n in (32, 8, 8, 32)]
    ids = jax.ShapeDtypeStruct((2, 8192), jnp.int32)
    ours, reference = (
        jax.jit(lambda *a, name=name: run(name, *a)).lower(*shapes, ids).compile().memory_analysis()
        for name in ("blockwise", "reference")
    )
    assert ours.temp_size_in_bytes <= reference.temp_size_in_bytes / 20


@pytest.mark.parametrize("remat", ["dots", "minimal"])
def test_remat_keeps_no_scores(remat, capsys):
    q, k, v, _, ids = packed(1024, 4, 2)
    run_again = jax.checkpoint(
        lambda q: jnp.sum(attention(q, k, v, ids, implementation="blockwise")),
        policy=REMAT_POLICIES[remat],
    )
    jax.ad_checkpoint.print_saved_residuals(run_again, q)
    shapes = re.findall(r"^f32\[([\d,]+)\]", capsys.readouterr().out, re.MULTILINE)
    assert shapes and max(math.prod(map(int, s.split(","))) for s in shapes) <= q.size
