import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax.training.cross_entropy import cross_entropy_sum

N, D, V = 12, 16, 96


def make_inputs(v: int):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(N, D)).astype(np.float32)
    kernel = rng.normal(size=(D, v)).astype(np.float32)
    return hidden, kernel, rng.integers(0, v, N), rng.integers(0, 2, N).astype(np.float32)


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(V)


def oracle(hidden, kernel, targets, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets)
    return jnp.sum(losses * weights)


@pytest.mark.parametrize("vocab_shards", [1, 2, 4])
@pytest.mark.parametrize("max_chunk", [V, 32, 7])
def test_value_and_gradients_are_those_of_the_plain_loss(inputs, vocab_shards, max_chunk):
    assert_is_the_plain_loss(inputs, vocab_shards, max_chunk)


# Prime, so that only 1 and V divide it; and parts that their chunks do not divide.
@pytest.mark.parametrize(
    ("v", "vocab_shards", "max_chunk"),
    [(97, 1, 32), (97, 1, 96), (97, 1, 1), (101, 1, 11), (2 * 47, 2, 32), (4 * 23, 4, 40)],
)
def test_a_vocabulary_that_chunks_do_not_divide_is_padded_without_effect(
    v, vocab_shards, max_chunk
):
    hidden, kernel, targets, weights = make_inputs(v)
    # The last column of each part, beside the padding, and the first of the next.
    targets[: 2 * vocab_shards] = np.arange(1, vocab_shards + 1).repeat(2) * (v // vocab_shards)
    targets[: 2 * vocab_shards : 2] -= 1
    targets[1 : 2 * vocab_shards : 2] %= v
    weights[: 2 * vocab_shards] = 1
    inputs = hidden, kernel, targets, weights
    assert_is_the_plain_loss(inputs, vocab_shards, max_chunk)
    # Logits far below zero: what is padded must not count even then, when a logit of 0 would win.
    low = np.concatenate([hidden, np.ones((N, 1), np.float32)], axis=1)
    lower = np.concatenate([kernel, np.full((1, v), -1e4, np.float32)])
    value = cross_entropy_sum(
        low, lower, targets, weights, vocab_shards=vocab_shards, max_chunk=max_chunk
    )
    np.testing.assert_allclose(value, oracle(low, lower, targets, weights), rtol=1e-6)


def assert_is_the_plain_loss(inputs, vocab_shards, max_chunk):
    def ours(*arrays):
        return cross_entropy_sum(*arrays, vocab_shards=vocab_shards, max_chunk=max_chunk)

    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(*inputs)
    expected, expected_gradients = jax.value_and_grad(oracle, argnums=(0, 1))(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
    ("v", "vocab_shards", "steps", "width", "padded"),
    [
        (128_256, 1, 8, 16_032, False),  # Llama 3
        (128_256, 8, 8, 2_004, False),
        (128_257, 1, 8, 16_033, True),  # a token added to it: 128,257 is prime
        (32_000, 1, 2, 16_000, False),  # Llama 2
        (32_003, 1, 2, 16_002, True),  # prime
    ],
)
def test_the_fewest_chunks_are_taken_and_padding_is_only_where_needed(
    v, vocab_shards, steps, width, padded
):
    def ours(hidden, kernel, targets, weights):
        return cross_entropy_sum(hidden, kernel, targets, weights, vocab_shards=vocab_shards)

    shapes = [((2, 4), "float32"), ((4, v), "float32"), ((2,), "int32"), ((2,), "float32")]
    text = str(
        jax.make_jaxpr(jax.grad(ours, argnums=(0, 1)))(
            *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
        )
    )
    assert text.count(f"length={steps}") == 2 == text.count("scan[")  # forward and backward
    assert f"f32[2,{vocab_shards},{width}]" in text
    assert ("pad[" in text) == padded


def test_logits_of_the_whole_vocabulary_never_exist(inputs):
    def ours(hidden, kernel):
        return cross_entropy_sum(hidden, kernel, *inputs[2:], max_chunk=32)

    text = str(jax.make_jaxpr(jax.grad(ours, argnums=(0, 1)))(*inputs[:2]))
    assert f"f32[{N},1,32]" in text  # one chunk: [tokens, shards, width]
    for shape in (f"[{N},{V}]", f"[{N},1,{V}]", f"[3,{N},1,32]"):
        assert shape not in text


def test_nor_do_those_of_a_padded_one():
    hidden, kernel, targets, weights = make_inputs(97)

    def ours(hidden, kernel):
        return cross_entropy_sum(hidden, kernel, targets, weights, max_chunk=32)

    text = str(jax.make_jaxpr(jax.grad(ours, argnums=(0, 1)))(hidden, kernel))
    assert f"f32[{N},1,25]" in text  # 4 chunks: 100 columns, 3 of them padding
    for shape in (f"[{N},97]", f"[{N},1,97]", f"[{N},100]", f"[{N},1,100]", f"[4,{N},1,25]"):
        assert shape not in text


def test_huge_logits_neither_overflow_nor_vanish(inputs):
    hidden, kernel, targets, weights = inputs
    value, gradient = jax.value_and_grad(cross_entropy_sum)(
        hidden * 1e4, kernel, targets, weights, max_chunk=32
    )
    np.testing.assert_allclose(value, oracle(hidden * 1e4, kernel, targets, weights), rtol=1e-6)
    assert np.all(np.isfinite(gradient))
