import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax.training.loss import cross_entropy_sum

N, D, V = 12, 16, 96


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(N, D)).astype(np.float32)
    kernel = rng.normal(size=(D, V)).astype(np.float32)
    return hidden, kernel, rng.integers(0, V, N), rng.integers(0, 2, N).astype(np.float32)


def oracle(hidden, kernel, targets, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets)
    return jnp.sum(losses * weights)


@pytest.mark.parametrize("vocab_shards", [1, 2, 4])
@pytest.mark.parametrize("max_chunk", [V, 32, 7])
def test_value_and_gradients_are_those_of_the_plain_loss(inputs, vocab_shards, max_chunk):
    def ours(*arrays):
        return cross_entropy_sum(*arrays, vocab_shards=vocab_shards, max_chunk=max_chunk)

    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(*inputs)
    expected, expected_gradients = jax.value_and_grad(oracle, argnums=(0, 1))(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_logits_of_the_whole_vocabulary_never_exist(inputs):
    def ours(hidden, kernel):
        return cross_entropy_sum(hidden, kernel, *inputs[2:], max_chunk=32)

    text = str(jax.make_jaxpr(jax.grad(ours, argnums=(0, 1)))(*inputs[:2]))
    assert f"f32[{N},1,32]" in text  # one chunk: [tokens, shards, width]
    for shape in (f"[{N},{V}]", f"[{N},1,{V}]", f"[3,{N},1,32]"):
        assert shape not in text


def test_huge_logits_neither_overflow_nor_vanish(inputs):
    hidden, kernel, targets, weights = inputs
    value, gradient = jax.value_and_grad(cross_entropy_sum)(
        hidden * 1e4, kernel, targets, weights, max_chunk=32
    )
    np.testing.assert_allclose(value, oracle(hidden * 1e4, kernel, targets, weights), rtol=1e-6)
    assert np.all(np.isfinite(gradient))
