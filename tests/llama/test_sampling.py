"""The sampling distribution, on logits alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sa_jax.llama.sampling import gumbel_noise, mask_outside_nucleus, sample_tokens


def draw(logits, n, **options):
    """Tokens for ids 0..n-1 at one position."""
    options = {"seed": 0, "temperature": 1.0, "top_p": 1.0, "nucleus": False} | options
    ids = jnp.arange(n)
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    return np.asarray(sample_tokens(logits, ids, jnp.full(n, 7), **options)[0])


LOGITS = np.array([2.0, 1.0, 0.5, 0.5, -1.0, -3.0])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature):
    tokens = draw(LOGITS, 20_000, temperature=temperature)
    expected = softmax(LOGITS / temperature) * len(tokens)
    assert stats.chisquare(np.bincount(tokens, minlength=6), expected).pvalue > 1e-3


def test_noise_is_gumbel_s_up_to_its_ends():
    bits = np.array([0, 1, 77, 2**16, 2**31, 2**32 - 2**9, 2**32 - 77, 2**32 - 1], np.uint32)
    rest = np.minimum((2.0**32 - 0.5 - bits) * 2.0**-32, 1 - 2.0**-24)
    exact = -np.log(-np.log1p(-rest))
    assert exact[-1] > 22.8  # jax.random.gumbel ends at 15.9
    np.testing.assert_allclose(gumbel_noise(jnp.asarray(bits)), exact, rtol=1e-4)


def test_noise_is_jax_s_where_23_bits_suffice():
    key = jax.random.key(0)
    noise = gumbel_noise(jax.random.bits(key, (10_000,), jnp.uint32))
    theirs = jax.random.gumbel(key, (10_000,))
    np.testing.assert_allclose(noise[theirs < 5], theirs[theirs < 5], atol=1e-3)


def test_frequencies_over_positions_and_seeds():
    n = 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (n, 6))
    noise = {"temperature": 1.0, "top_p": 1.0, "nucleus": False}
    tokens, _ = sample_tokens(logits, jnp.full(n, 5), jnp.arange(n), seed=1, **noise)
    assert stats.chisquare(np.bincount(tokens, minlength=6), softmax(LOGITS) * n).pvalue > 1e-3
    again, _ = sample_tokens(logits, jnp.full(n, 5), jnp.arange(n), seed=2, **noise)
    agree = np.mean(np.asarray(tokens) == np.asarray(again))
    assert agree == pytest.approx(np.sum(softmax(LOGITS) ** 2), abs=0.02)  # independent draws


def nucleus(logits, top_p):
    """Written out: tokens by falling probability until their sum reaches top_p."""
    probabilities = softmax(np.asarray(logits, np.float64))
    kept, total = set(), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if total >= top_p:
            break
        kept.add(int(token))
        total += probabilities[token]
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.8, 0.95, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    logits = np.random.default_rng(1).normal(size=(50, 40)) * 3
    masked = np.asarray(mask_outside_nucleus(jnp.asarray(logits, jnp.float32), top_p))
    for row, kept in zip(logits, masked, strict=True):
        assert set(np.flatnonzero(np.isfinite(kept))) == nucleus(row, top_p)
        finite = np.isfinite(kept)
        np.testing.assert_array_equal(kept[finite], row.astype(np.float32)[finite])


def test_tied_tokens_stay_in_the_nucleus_together():
    masked = np.asarray(mask_outside_nucleus(jnp.asarray([[1.0, 1.0, 1.0, -9.0]]), 0.4))
    np.testing.assert_array_equal(np.isfinite(masked), [[True, True, True, False]])


def test_top_p_frequencies_after_the_temperature():
    top_p, temperature = 0.8, 1.5
    kept = nucleus(LOGITS / temperature, top_p)
    assert kept != nucleus(LOGITS, top_p)  # the order of the two matters here
    probabilities = softmax(LOGITS / temperature) * [token in kept for token in range(6)]
    tokens = draw(LOGITS, 20_000, temperature=temperature, top_p=top_p, nucleus=True)
    counts = np.bincount(tokens, minlength=6)
    expected = probabilities / probabilities.sum() * len(tokens)
    assert not counts[expected == 0].any()
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3
