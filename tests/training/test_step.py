import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from sa_jax.llama.lora import LoraConfig, combine, split
from sa_jax.llama.model import Llama, head_kernel
from sa_jax.parallel import rules
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training.config import default_config
from sa_jax.training.losses import LOSSES
from sa_jax.training.step import init_state, make_train_step
from tests.toys import CONFIG, packed_batch, random_params

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.01))
SCHEDULE = optax.constant_schedule(1e-2)


def train_step(model, accumulation=1, loss=LOSSES["cross_entropy"]):
    return make_train_step(
        model,
        loss.make(model, default_config()),
        TX,
        SCHEDULE,
        accumulation=accumulation,
        only_through_model=loss.only_through_model,
    )


def run(steps=2, mesh_sizes=None, accumulation=1, dtype=jnp.float32, lora=None, length=24, **loss):
    """State and metrics after a few steps; without mesh_sizes unsharded on one device."""
    model = Llama(CONFIG, dtype=dtype, lora=lora)
    params = random_params(lora=lora)
    trainable, frozen = (params, {}) if lora is None else split(params)
    batches = [packed_batch(seed=seed, length=length) for seed in range(steps)]
    if mesh_sizes is None:
        state = init_state(trainable, TX)
        step = jax.jit(train_step(model, accumulation, **loss))
    else:
        mesh = make_mesh(*mesh_sizes[:3], jax.devices()[: math.prod(mesh_sizes)], *mesh_sizes[3:])
        model = model.clone(mesh=mesh)
        shape = jax.eval_shape(lambda p: init_state(p, TX), trainable)
        placed = rules.shardings(mesh, shape)
        state = jax.jit(lambda p: init_state(p, TX), out_shardings=placed)(trainable)
        frozen = jax.device_put(frozen, rules.shardings(mesh, frozen))
        batches = jax.device_put(batches, NamedSharding(mesh, rules.BATCH_SPEC))
        step = jax.jit(train_step(model, accumulation, **loss), out_shardings=(placed, None))
    for batch in batches:
        state, metrics = step(state, frozen, batch)
    return jax.device_get(state), jax.device_get(metrics)


def assert_same(a, b, atol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.fixture(scope="module")
def unsharded():
    return run()


def test_loss_and_gradient_norm_are_those_of_the_plain_formula():
    _, metrics = run(steps=1)
    batch, params = packed_batch(seed=0), random_params()

    def plain(params):
        hidden = Llama(CONFIG).apply(
            {"params": params},
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            method="hidden",
        )
        logits = hidden @ head_kernel(params, CONFIG)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["loss_mask"]) / np.sum(batch["loss_mask"])

    loss, gradient = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert metrics["loss_tokens"] == np.sum(batch["loss_mask"])
    assert metrics["learning_rate"] == np.float32(1e-2)


# 1, 2, 4 and 8 devices; data, fsdp, tensor, and slices.
@pytest.mark.parametrize(
    "mesh_sizes",
    [
        *((1, 1, 1), (2, 1, 2), (1, 2, 2, 2)),
        *(
            pytest.param(sizes, marks=pytest.mark.long)
            for sizes in ((1, 2, 1), (1, 8, 1), (1, 2, 4))
        ),
    ],
)
def test_sharded_is_unsharded(unsharded, mesh_sizes):
    state, metrics = run(mesh_sizes=mesh_sizes)
    assert_same(metrics, unsharded[1], atol=2e-5)
    # Adam divides by the root of the second moment: noise of 1e-7 in a gradient near 0 is seen
    # as up to a share of the learning rate, so parameters are compared at 1 % of it.
    assert_same(state.params, unsharded[0].params, atol=1e-4)


@pytest.mark.parametrize("mesh_sizes", [(1, 2, 2), (2, 1, 4), (2, 4, 1), (1, 4, 2)])
def test_sharded_is_unsharded_with_few_tokens_for_the_features(mesh_sizes):
    """There XLA sends rows to where the weights are."""
    metrics, expected = (run(1, mesh_sizes=sizes, length=8)[1] for sizes in (mesh_sizes, None))
    assert_same(metrics, expected, atol=2e-5)


@pytest.mark.parametrize(
    "accumulation, mesh_sizes",
    [
        (2, None),
        (4, (1, 2, 1)),
        pytest.param(4, None, marks=pytest.mark.long),
        pytest.param(2, (1, 2, 1), marks=pytest.mark.long),
    ],
)
def test_accumulation_does_not_change_the_step(unsharded, accumulation, mesh_sizes):
    # Rows hold different numbers of loss tokens, so a mean of means would be seen.
    state, metrics = run(accumulation=accumulation, mesh_sizes=mesh_sizes)
    assert_same(metrics, unsharded[1], atol=2e-5)
    assert_same(state.params, unsharded[0].params, atol=1e-4)


def test_only_adapters_move_under_lora_and_sharding_does_not_matter():
    lora = LoraConfig(rank=4, alpha=8.0)
    before, frozen = split(random_params(lora=lora))
    state, metrics = run(lora=lora)
    assert jax.tree.structure(state.params) == jax.tree.structure(before)
    # lora_b starts at zero: its gradient moves it first, and lora_a from the second step on.
    moved = [
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
    ]
    assert all(moved)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(before)) + 1
    sharded, _ = run(lora=lora, mesh_sizes=(2, 2, 2))
    assert_same(sharded.params, state.params, atol=1e-4)
    assert jax.tree.structure(combine(state.params, frozen)) == jax.tree.structure(
        random_params(lora=lora)
    )


def test_bfloat16_parameters_keep_float32_moments():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
    state = init_state(params, TX)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    step = jax.jit(train_step(Llama(CONFIG, dtype=jnp.bfloat16)))
    after, metrics = step(state, {}, packed_batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(metrics["loss"], run(steps=1)[1]["loss"], rtol=5e-3)


def test_a_frequent_token_s_gradient_is_summed_in_float32_also_for_bfloat16_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
    batch = packed_batch(rows=64)
    batch["tokens"][:] = 7
    model = Llama(CONFIG, dtype=jnp.bfloat16)
    squares = []
    for dtype in (jnp.float32, jnp.bfloat16):
        state = init_state(jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params), TX)
        _, metrics = jax.jit(train_step(model))(state, {}, batch)
        squares.append(metrics["grad_square_sums"])
    np.testing.assert_allclose(squares[0], squares[1], rtol=2e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_nothing_is_summed_in_bfloat16(family):
    """Products apart, which accumulate in float32."""
    config = dataclasses.replace(CONFIG, family=family)
    model = Llama(config, dtype=jnp.bfloat16)
    state = jax.eval_shape(lambda: init_state(random_params(config), TX))
    batch = jax.eval_shape(packed_batch)
    with jax._src.config.allow_f16_reductions(False):
        jax.jit(train_step(model)).trace(state, {}, batch)
