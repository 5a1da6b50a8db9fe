"""Losses by name: the CROW loss against a plain unscanned model in float64, and what the step
promises to a loss that a user brings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sa_jax.errors import UsageError
from sa_jax.llama.lora import LoraConfig
from sa_jax.llama.model import Llama
from sa_jax.training.config import default_config
from sa_jax.training.losses import LOSSES, Loss, make_cross_entropy
from sa_jax.training.step import init_state, make_train_step
from tests.toys import CONFIG, packed_batch, random_params
from tests.training.test_step import SCHEDULE, TX, assert_same, run

CROW = LOSSES["crow"]


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps) * scale


def rotate(x_bshk, positions_bs):
    half = x_bshk.shape[-1] // 2
    frequencies = CONFIG.rope_theta ** -(jnp.arange(half) / half)
    angles = positions_bs[..., None, None] * frequencies
    a, b = x_bshk[..., :half], x_bshk[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def plain_streams(params, batch, shift):
    """The residual stream before and after every layer, and the logits; layers in a Python loop."""
    positions, segments = batch["positions"], batch["segment_ids"]
    b, s = positions.shape
    sees = (segments[:, :, None] == segments[:, None]) & np.tri(s, dtype=bool)
    x = params["embed"]["embedding"][batch["tokens"]] + shift
    streams = [x]
    groups = CONFIG.num_heads // CONFIG.num_kv_heads
    for index in range(CONFIG.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])

        def product(x, part, name, layer=layer):
            return x @ layer[part][name]["kernel"]

        y = norm(x, layer["attention_norm"]["scale"])
        q, k, v = (product(y, "attention", n).reshape(b, s, -1, CONFIG.head_dim) for n in "qkv")
        k, v = (jnp.repeat(rows, groups, axis=2) for rows in (rotate(k, positions), v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", rotate(q, positions), k) / CONFIG.head_dim**0.5
        shares = jax.nn.softmax(jnp.where(sees[:, None], scores, -1e30))
        out = jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(b, s, -1)
        x = x + product(out, "attention", "o")
        y = norm(x, layer["mlp_norm"]["scale"])
        gated = jax.nn.silu(product(y, "mlp", "gate")) * product(y, "mlp", "up")
        x = x + product(gated, "mlp", "down")
        streams.append(x)
    return streams, norm(x, params["final_norm"]["scale"]) @ params["lm_head"]["kernel"]


def plain_crow(params, batch, alpha, epsilon):
    """(cross-entropy, inconsistency, loss), means over the loss-bearing tokens."""
    mask = batch["loss_mask"]

    def inconsistency(params, shift):
        streams, _ = plain_streams(params, batch, shift)
        cosines = [
            jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
            for a, b in zip(streams[:-1], streams[1:], strict=True)
        ]
        return jnp.sum((1 - sum(cosines) / len(cosines)) * mask) / mask.sum()

    _, logits = plain_streams(params, batch, 0.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    cross_entropy = jnp.sum(losses * mask) / mask.sum()
    zeros = jnp.zeros((*mask.shape, CONFIG.hidden_size))
    direction = jnp.sign(jax.grad(inconsistency, argnums=1)(jax.lax.stop_gradient(params), zeros))
    penalty = inconsistency(params, epsilon * direction)
    return cross_entropy + alpha * penalty, (cross_entropy, penalty, inconsistency(params, 0.0))


def test_crow_is_the_plain_formula():
    config = default_config()
    batch = packed_batch()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params())
        objective = jax.jit(jax.value_and_grad(plain_crow, has_aux=True), static_argnums=(2, 3))
        (loss, (cross_entropy, penalty, unmoved)), gradient = jax.device_get(
            objective(params, batch, config.crow.alpha, config.crow.epsilon)
        )
    _, metrics = run(steps=1, loss=CROW)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["inconsistency"], penalty, rtol=1e-4)
    assert penalty > 1.02 * unmoved  # the move makes it worse
    squares = [np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)]
    np.testing.assert_allclose(metrics["grad_square_sums"], squares, rtol=1e-3)


@pytest.fixture(scope="module")
def crow():
    return run(loss=CROW)


@pytest.mark.parametrize(
    "accumulation, mesh_sizes",
    [
        (2, None),
        pytest.param(4, None, marks=pytest.mark.long),
        pytest.param(1, (2, 2, 2), marks=pytest.mark.long),
        (2, (1, 4, 2)),
    ],
)
def test_crow_is_the_same_sharded_and_accumulated(crow, accumulation, mesh_sizes):
    state, metrics = run(loss=CROW, accumulation=accumulation, mesh_sizes=mesh_sizes)
    # A component of the move near 0 may change its sign with rounding, so a little looser than the
    # cross-entropy in test_step.py.
    assert_same(metrics, crow[1], atol=1e-4)
    assert_same(state.params, crow[0].params, atol=2e-4)


def test_crow_of_alpha_0_is_the_cross_entropy():
    config = default_config()
    config.crow.alpha = 0.0
    model, params, batch = Llama(CONFIG), random_params(), packed_batch()
    results = [
        loss_fn(params, batch, None)
        for loss_fn in (CROW.make(model, config), make_cross_entropy(model))
    ]
    assert results[0][:2] == results[1][:2]


def test_crow_trains_adapters():
    state, metrics = run(loss=CROW, lora=LoraConfig(rank=4, alpha=8.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    assert metrics["inconsistency"] > 0


def make_noisy(model, config):
    """The cross-entropy of one row, times noise of that row's micro-batch."""
    cross_entropy = make_cross_entropy(model)

    def loss_fn(params, batch, rng):
        total, weight, _ = cross_entropy(params, batch, rng)
        noise = jax.random.uniform(rng)
        return total * noise, weight, {"noise": (noise, jnp.float32(1))}

    return loss_fn


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 4])
def test_randomness_depends_on_seed_and_step_alone(accumulation):
    model, params, batch = Llama(CONFIG), random_params(), packed_batch()
    loss_fn = make_noisy(model, None)

    def noise(seed, step):
        train = make_train_step(model, loss_fn, TX, SCHEDULE, accumulation=accumulation, seed=seed)
        state = init_state(params, TX)._replace(step=jnp.int32(step))
        return float(jax.jit(train)(state, {}, batch)[1]["noise"])

    values = [noise(seed, step) for seed in (0, 1) for step in (0, 1)]
    assert len(set(values)) == 4 and noise(0, 1) == values[1]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), accumulation)
    expected = np.mean([jax.random.uniform(key) for key in keys])
    np.testing.assert_allclose(values[1], expected, rtol=1e-6)


def make_penalised(model, config):
    """Half the squared norm of all weights, and no cross-entropy."""

    def loss_fn(params, batch, rng):
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
        weight = jnp.sum(batch["loss_mask"], dtype=jnp.float32)
        return squares / 2 * weight, weight, {}

    return loss_fn


def test_a_penalty_on_weights_has_its_gradient():
    _, metrics = run(steps=1, loss=Loss("penalised", make_penalised))
    squares = [np.sum(np.square(leaf)) for leaf in jax.tree.leaves(random_params())]
    np.testing.assert_allclose(metrics["grad_square_sums"], squares, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sum(squares) / 2, rtol=1e-5)


def test_unknown_names_and_names_of_metrics_that_are_taken():
    with pytest.raises(UsageError, match="unknown loss 'crwo'; known: cross_entropy, crow"):
        LOSSES["crwo"]

    def make(model, config):
        return lambda params, batch, rng: (
            jnp.float32(0),
            jnp.float32(1),
            {"grad_norm": (0.0, 1.0)},
        )

    with pytest.raises(UsageError, match="may not have a metric 'grad_norm'"):
        run(loss=Loss("clash", make))
