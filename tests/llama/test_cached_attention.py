import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.llama.attention import CACHE_BLOCK, cached_attention, masked_attention

HEADS, GROUPS, HEAD_DIM, LAYERS, LAYER = 4, 2, 8, 3, 1
attend = jax.jit(cached_attention)


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
    return q, k, v, *blocks(*rows), jnp.int32(LAYER), jnp.asarray(starts)


def blocks(k_lbsgh, v_lbsgh):
    """Rows of tokens as the cache has them."""
    size = min(CACHE_BLOCK, k_lbsgh.shape[2])
    pad = [(0, 0)] * 5
    pad[2] = (0, -k_lbsgh.shape[2] % size)
    k, v = (
        jnp.pad(leaf, pad).reshape(LAYERS, leaf.shape[1], -1, size, GROUPS, HEAD_DIM)
        for leaf in (k_lbsgh, v_lbsgh)
    )
    return k.transpose(0, 2, 1, 4, 5, 3), v.swapaxes(1, 2)


def rows(cache_k, cache_v, layer):
    """Keys and values [B, capacity, groups, head_dim] of a layer."""
    k, v = cache_k[layer].transpose(1, 0, 4, 2, 3), cache_v[layer].swapaxes(0, 1)
    return (leaf.reshape(len(leaf), -1, GROUPS, HEAD_DIM) for leaf in (k, v))


def oracle(q, k, v, cache_k, cache_v, layer, start_b):
    """Everything side by side, under one mask."""
    old_k, old_v = rows(cache_k, cache_v, layer)
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


def test_a_row_does_not_depend_on_its_neighbours_or_on_what_lies_beyond_it():
    capacity = 3 * CACHE_BLOCK
    short = attend(*make([10, 40, 0], 1, capacity))
    # A neighbour three blocks long; other garbage in the free slots.
    longer = attend(*make([10, 40, 3 * CACHE_BLOCK - 1], 1, capacity, garbage=-7.0))
    np.testing.assert_array_equal(short[:2], longer[:2])
    # The past itself does matter.
    q, k, v, cache_k, cache_v, layer, start = make([10, 40, 0], 1, capacity)
    changed = attend(q, k, v, cache_k, cache_v.at[LAYER, 0, 0, 9].add(1.0), layer, start)
    assert np.abs(changed[0] - short[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1:], short[1:])


@pytest.mark.parametrize("new", [1, 5, 40])
def test_a_past_of_one_row_is_shared_by_all(new):
    length = CACHE_BLOCK + 20
    q, k, v, cache_k, cache_v, layer, start = make([length] * 3, new, length)
    shared = attend(q, k, v, cache_k[:, :, :1], cache_v[:, :, :1], layer, start)
    copies = (jnp.repeat(leaf[:, :, :1], 3, axis=2) for leaf in (cache_k, cache_v))
    np.testing.assert_allclose(shared, oracle(q, k, v, *copies, layer, start), atol=2e-6)
