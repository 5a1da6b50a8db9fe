import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax.errors import UsageError
from sa_jax.optim.build import (
    OPTIMIZERS,
    Optimizer,
    decay_mask,
    make_optimizer,
    make_schedule,
)
from sa_jax.optim.soap_shared import flatten
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training.config import default_config
from tests.toys import CONFIG, random_params


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


@pytest.mark.parametrize("change", [{"name": "adma"}, {"schedule": "linear"}])
def test_unknown_names_are_refused(change):
    with pytest.raises(UsageError, match="unknown; use"):
        make_optimizer(section(**change), 10)


def one_update(tx, params):
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f"), params)
    return jax.jit(tx.update)(gradients, tx.init(params), params)[0]


def test_an_optax_name_gets_schedule_decay_and_kwargs():
    config = section(name="lion", learning_rate=0.1, schedule="constant", warmup_fraction=0.0)
    config.clip_norm = 0.0
    config.kwargs.b1 = 0.5
    params = random_params()
    update = one_update(make_optimizer(config, 10), params)
    without = one_update(optax.lion(0.1, b1=0.5, weight_decay=0.0), params)
    decayed = decay_mask(params)
    expected = jax.tree.map(
        lambda step, p, is_decayed: step - 0.1 * 0.01 * np.float64(p) * is_decayed,
        *(without, params, decayed),
    )
    for a, b in zip(*map(jax.tree.leaves, (update, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-7)


@pytest.mark.parametrize(
    "name", ["adamw", "adafactor", "lion", "contrib.muon", "contrib.cocob", "contrib.madgrad"]
)
def test_every_optax_optimizer_decays_by_the_learning_rate(name):
    """Without gradients a step takes learning rate x decay of all weights but norms, no more."""
    config = section(name=name, learning_rate=0.1, schedule="constant", warmup_fraction=0.0)
    config.update(clip_norm=0.0, weight_decay=0.01)
    params = random_params()
    tx = make_optimizer(config, 10)
    update, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for leaf, p, is_decayed in zip(
        *map(jax.tree.leaves, (update, params, decay_mask(params))), strict=True
    ):
        np.testing.assert_allclose(leaf, -1e-3 * p * is_decayed, rtol=1e-6, atol=1e-7)


def test_a_decay_in_kwargs_is_the_only_one():
    config = section(name="lion", learning_rate=0.1, schedule="constant", warmup_fraction=0.0)
    config.update(clip_norm=0.0, weight_decay=0.01)
    config.kwargs.weight_decay = 0.5
    expected = optax.lion(0.1, weight_decay=0.5, mask=decay_mask)
    params = random_params()
    updates = (one_update(make_optimizer(config, 10), params), one_update(expected, params))
    for a, b in zip(*map(jax.tree.leaves, updates), strict=True):
        np.testing.assert_array_equal(a, b)


def test_muon_orthogonalises_every_layer_and_leaves_norms_and_embedding_to_adam():
    config = section(name="contrib.muon", learning_rate=1.0, schedule="constant", weight_decay=0.0)
    config.update(warmup_fraction=0.0, clip_norm=0.0)
    config.kwargs.adam_learning_rate = 1e-3
    updates = one_update(make_optimizer(config, 10), random_params())
    for part, name in (("attention", "q"), ("mlp", "down")):
        for update in np.asarray(updates["layers"][part][name]["kernel"]):
            singular = np.linalg.svd(update, compute_uv=False)
            # Newton-Schulz with Muon's coefficients ends between 0.7 and 1.2, where the optax
            # function then multiplies by a factor of the shape.
            factor = max(1.0, (update.shape[1] / update.shape[0]) ** 0.5)
            assert 0.6 < singular.min() / factor and singular.max() / factor < 1.3
    for leaf in (updates["embed"]["embedding"], updates["layers"]["mlp_norm"]["scale"]):
        # The first step of Muon's Adam, which has Nesterov's momentum.
        first = 0.9 * 0.1 / (1 - 0.9**2) + 1
        np.testing.assert_allclose(np.abs(leaf), first * 1e-3, rtol=1e-2)


def test_unknown_optax_names_and_keywords_say_what_there_is():
    with pytest.raises(UsageError, match=r"'contrib\.moun' is unknown; use .*contrib\.muon.* lion"):
        make_optimizer(section(name="contrib.moun"), 10)
    config = section(name="lion")
    config.kwargs.beta = 0.9
    with pytest.raises(UsageError, match=r"kwargs\.beta: optax\.lion has no such .* b1=0\.9, b2"):
        make_optimizer(config, 10)
    config = section(name="contrib.sophia")
    config.kwargs.beta = 0.9
    with pytest.raises(UsageError, match=r"it takes learning_rate, b1=[^<]*$"):
        make_optimizer(config, 10)
    config = section(name="adam")
    config.kwargs.b1 = 0.9
    with pytest.raises(UsageError, match="adam takes none"):
        make_optimizer(config, 10)
    config = section(name="lion")
    config.kwargs.b1 = "high"
    with pytest.raises(UsageError, match="'lion' does not work with kwargs={'b1': 'high'}"):
        make_optimizer(config, 10)
    with pytest.raises(
        UsageError, match="'lbfgs' does not work .* gets only gradients and parameters"
    ):
        make_optimizer(section(name="lbfgs"), 10)


def test_a_registered_optimizer_gets_the_section_and_the_schedule():
    def make(config, schedule, mesh):
        return optax.sgd(schedule, momentum=config.kwargs.momentum)

    OPTIMIZERS.register(Optimizer("my_sgd", make))
    config = section(name="my_sgd", learning_rate=0.5, schedule="constant", clip_norm=0.0)
    config.kwargs.momentum = 0.25
    config.warmup_fraction = 0.0
    tx = make_optimizer(config, 10)
    params = {"kernel": jnp.array([1.0])}
    state = tx.init(params)
    _, state = tx.update({"kernel": jnp.array([1.0])}, state, params)
    updates, _ = tx.update({"kernel": jnp.array([1.0])}, state, params)
    np.testing.assert_allclose(updates["kernel"], [-0.5 * 1.25])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 0}, "block_size=0: must be at least 1"),
        ({"dense_steps": -1}, "dense_steps=-1: must be at least 0"),
        ({"refresh_slots": 9}, "refresh_slots=9: must be at most precondition_frequency=4"),
    ],
)
def test_a_setting_that_soap_refuses_is_named_as_the_config_has_it(changes, said):
    config = section(name="soap")
    config.soap.update(precondition_frequency=4, **changes)
    with pytest.raises(UsageError, match=f"^config.optimizer.soap.{said}$"):
        make_optimizer(config, 10)


@pytest.mark.parametrize("mode", ["fast", "official"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_soap_trains_biases_and_norms_with_adam(family, mode):
    """The layers' vectors are stacks [L, n], which are no matrices."""
    params = random_params(dataclasses.replace(CONFIG, family=family))
    config = section(name="soap", learning_rate=0.1, schedule="constant", warmup_fraction=0.0)
    config.update(weight_decay=0.0, clip_norm=0.0)
    config.soap.mode = mode
    tx = make_optimizer(config, 10, make_mesh())
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: rng.choice([-1.0, 1.0], x.shape), params)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for _ in range(2):  # the first call builds the bases
        updates, state = update(gradients, state, params)
    updates, gradients = flatten(updates)[0], flatten(gradients)[0]
    vectors = [path for path in updates if path.endswith(("bias", "scale"))]
    assert len(vectors) == {"qwen2": 3 + 3, "qwen3": 3 + 2}[family]
    for path in vectors:  # Adam's first step has the size of the learning rate
        np.testing.assert_allclose(updates[path], -0.1 * gradients[path], rtol=1e-5, err_msg=path)
