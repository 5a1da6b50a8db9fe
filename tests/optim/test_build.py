import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.errors import UsageError
from sa_jax.optim import make_optimizer, make_schedule
from sa_jax.optim.build import decay_mask
from sa_jax.training.config import default_config
from tests.toys import random_params


def section(**changes):
    config = default_config().optimizer
    config.update(changes)
    return config


def test_cosine_rises_for_a_tenth_and_falls_towards_zero():
    schedule = make_schedule(section(learning_rate=1.0), 100)
    rates = np.array([schedule(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    rest = np.arange(91)
    np.testing.assert_allclose(rates[9:], (1 + np.cos(np.pi * rest / 91)) / 2, atol=1e-6)
    assert 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_very_short_runs_still_move_at_every_step(steps):
    schedule = make_schedule(section(learning_rate=1.0), steps)
    assert all(0 < schedule(step) <= 1 for step in range(steps))


def test_adam_by_hand():
    """Two steps on one number, against the formula, with decay and without clipping."""
    config = section(learning_rate=0.1, schedule="constant", warmup_fraction=0.0, clip_norm=0.0)
    tx = make_optimizer(config, 10)
    params = {"kernel": jnp.array([2.0])}
    state = tx.init(params)
    p, m, v = 2.0, 0.0, 0.0
    for t, g in ((1, 0.3), (2, -0.1)):
        updates, state = tx.update({"kernel": jnp.array([g])}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        p = p - 0.1 * (step + 0.01 * p)
        np.testing.assert_allclose(params["kernel"], [p], rtol=1e-6)


def test_norms_are_not_decayed():
    mask = decay_mask(random_params())
    assert not mask["final_norm"]["scale"] and not mask["layers"]["mlp_norm"]["scale"]
    assert mask["embed"]["embedding"] and mask["layers"]["attention"]["q"]["kernel"]


def test_clipping_bounds_the_global_norm():
    config = section(clip_norm=1.0, weight_decay=0.0)
    gradient = {"a": jnp.full(4, 100.0), "b": jnp.full(5, -100.0)}
    clip = make_optimizer(config, 10)
    state = clip.update(gradient, clip.init(gradient), gradient)[1]
    first_moment = state[1][0].mu
    norm = np.sqrt(sum(np.sum(np.square(m)) for m in jax.tree.leaves(first_moment))) / 0.1
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


@pytest.mark.parametrize("change", [{"name": "adamax"}, {"schedule": "linear"}])
def test_unknown_names_are_refused(change):
    with pytest.raises(UsageError, match="unknown; use"):
        make_optimizer(section(**change), 10)
