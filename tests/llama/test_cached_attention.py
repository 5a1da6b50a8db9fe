import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.llama import decode_kernel
from sa_jax.llama.attention import cached_attention, masked_attention
from sa_jax.llama.cache import CACHE_BLOCK, KVCache
from sa_jax.parallel.mesh import make_mesh

HEADS, GROUPS, HEAD_DIM, LAYERS, LAYER = 4, 2, 8, 3, 1
attend = jax.jit(cached_attention)


@pytest.fixture
def kernel(interpreted_kernel):
    """The kernel of GPUs, one head on each of two devices."""
    return jax.jit(
        functools.partial(
            cached_attention, kernel_mesh=make_mesh(1, 1, 2, devices=jax.devices()[:2])
        )
    )


def random(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


def make(starts, new, capacity, garbage=100.0):
    """q, k, v of `new` tokens, and caches whose slots from a row's start on hold garbage."""
    batch = len(starts)
    q = random((batch, new, HEADS, HEAD_DIM), 0) * 2
    k, v = (random((batch, new, GROUPS, HEAD_DIM), seed) for seed in (1, 2))
    past = (jnp.arange(capacity) < jnp.asarray(starts)[:, None])[..., None, None]
    shape = (LAYERS, batch, capacity, GROUPS, HEAD_DIM)
    rows = (jnp.where(past, random(shape, seed), garbage) for seed in (3, 4))
    return q, k, v, blocks(*rows), jnp.int32(LAYER), jnp.asarray(starts)


def blocks(k_lbsgh, v_lbsgh):
    """Rows of tokens as the cache has them."""
    size = min(CACHE_BLOCK, k_lbsgh.shape[2])
    pad = [(0, 0)] * 5
    pad[2] = (0, -k_lbsgh.shape[2] % size)
    k, v = (
        jnp.pad(leaf, pad).reshape(LAYERS, leaf.shape[1], -1, size, GROUPS, HEAD_DIM)
        for leaf in (k_lbsgh, v_lbsgh)
    )
    return KVCache(k.transpose(0, 2, 1, 4, 5, 3), v.swapaxes(1, 2))


def rows(cache, layer):
    """Keys and values [B, capacity, groups, head_dim] of a layer."""
    k, v = cache.k[layer].transpose(1, 0, 4, 2, 3), cache.v[layer].swapaxes(0, 1)
    return (leaf.reshape(len(leaf), -1, *leaf.shape[-2:]) for leaf in (k, v))


def oracle(q, k, v, cache, layer, start_b):
    """Everything side by side, under one mask."""
    old_k, old_v = rows(cache, layer)
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((old_k, k), (old_v, v)))
    new, capacity = q.shape[1], old_k.shape[1]
    past = jnp.arange(capacity)[None, None] < start_b[:, None, None]
    causal = jnp.tril(jnp.ones((new, new), bool))[None]
    mask = jnp.concatenate(
        [jnp.broadcast_to(past, (len(q), new, capacity)), jnp.repeat(causal, len(q), 0)], axis=-1
    )
    return masked_attention(q, keys, values, mask)


@pytest.mark.parametrize("new", [1, 5, 20])
@pytest.mark.parametrize("capacity", [7, CACHE_BLOCK, 2 * CACHE_BLOCK + 9])
def test_equals_attention_without_blocks(new, capacity):
    starts = [0, 1, capacity // 2, CACHE_BLOCK, capacity - new]
    starts = [min(start, capacity - new) for start in starts]
    arguments = make(starts, new, capacity)
    np.testing.assert_allclose(attend(*arguments), oracle(*arguments), atol=2e-6)


@pytest.mark.parametrize("programs", [1, 10, 512])  # a row has one part, two, and one a block
@pytest.mark.parametrize("capacity", [7, 5 * CACHE_BLOCK])
def test_the_kernel_equals_attention_without_blocks(kernel, monkeypatch, capacity, programs):
    monkeypatch.setattr(decode_kernel, "PROGRAMS", programs)
    starts = [min(s, capacity - 1) for s in (0, 1, CACHE_BLOCK, 3 * CACHE_BLOCK + 9, 10**6)]
    arguments = make(starts, 1, capacity)
    np.testing.assert_allclose(kernel(*arguments), oracle(*arguments), atol=2e-6)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (20, 1), (32, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_takes_any_number_of_heads(interpreted_kernel, heads, groups, dtype):
    rows, capacity, h = 4, 3 * CACHE_BLOCK, 16
    q, k, v = (random((rows, 1, n, h), n).astype(dtype) for n in (heads, groups, groups))
    cache = KVCache(
        random((2, 3, rows, groups, h, CACHE_BLOCK), 3).astype(dtype),
        random((2, 3, rows, CACHE_BLOCK, groups, h), 4).astype(dtype),
    )
    at = jnp.int32(1), jnp.asarray([0, 5, CACHE_BLOCK + 1, capacity - 1])
    ours = cached_attention(
        q, k, v, cache, *at, kernel_mesh=make_mesh(2, 2, 1, devices=jax.devices()[:4])
    )
    assert ours.dtype == dtype
    floats = jax.tree.map(lambda x: x.astype("float32"), (q, k, v, cache))
    error = np.abs(ours.astype("float32") - oracle(*floats, *at))
    assert error.max() <= (2e-6 if dtype == "float32" else 2**-7)


@pytest.mark.parametrize("name", ["products", "kernel"])
def test_a_row_does_not_depend_on_its_neighbours_or_on_what_lies_beyond_it(kernel, name):
    attend = {"products": jax.jit(cached_attention), "kernel": kernel}[name]
    capacity = 3 * CACHE_BLOCK
    short = attend(*make([10, 40, 0], 1, capacity))
    # A neighbour three blocks long; other garbage in the free slots.
    longer = attend(*make([10, 40, 3 * CACHE_BLOCK - 1], 1, capacity, garbage=-7.0))
    np.testing.assert_array_equal(short[:2], longer[:2])
    # The past itself does matter.
    q, k, v, cache, layer, start = make([10, 40, 0], 1, capacity)
    cache = cache._replace(v=cache.v.at[LAYER, 0, 0, 9].add(1.0))
    changed = attend(q, k, v, cache, layer, start)
    assert np.abs(changed[0] - short[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1:], short[1:])


@pytest.mark.parametrize("new", [1, 5, 40])
def test_a_past_of_one_row_is_shared_by_all(new):
    length = CACHE_BLOCK + 20
    q, k, v, cache, layer, start = make([length] * 3, new, length)
    past = KVCache(*(leaf[:, :, :1] for leaf in cache))
    shared = attend(q, k, v, past, layer, start)
    copies = KVCache(*(jnp.repeat(leaf, 3, axis=2) for leaf in past))
    np.testing.assert_allclose(shared, oracle(q, k, v, copies, layer, start), atol=2e-6)
