"""Sharded = unsharded for every attention path that runs on CPU: forward, loss and gradients."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sa_jax.llama.model import Llama
from sa_jax.parallel import rules
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training.losses import make_cross_entropy
from tests.toys import CONFIG, packed_batch, random_params

SMALL = dataclasses.replace(CONFIG, num_layers=2, max_position_embeddings=128)
MESHES = [pytest.param((1, 4, 2), marks=pytest.mark.long), (2, 2, 2), (1, 2, 4)]


def outputs(model, params, batch):
    def loss(params):
        return make_cross_entropy(model)(params, batch, jax.random.key(0))[0]

    logits = model.apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    return logits, *jax.value_and_grad(loss)(params)


@functools.cache
def unsharded():
    run = jax.jit(functools.partial(outputs, Llama(SMALL)))
    return run(random_params(SMALL), packed_batch(length=128))


@pytest.mark.parametrize("attention", ["unrolled", "splash"])
@pytest.mark.parametrize("sizes", MESHES)
def test_sharded_is_unsharded(sizes, attention):
    mesh = make_mesh(*sizes)
    model = Llama(SMALL, attention=attention, mesh=mesh, remat="full")
    params = jax.device_put(random_params(SMALL), rules.shardings(mesh, random_params(SMALL)))
    batch = jax.device_put(packed_batch(length=128), NamedSharding(mesh, rules.BATCH_SPEC))
    logits, loss, gradients = jax.jit(functools.partial(outputs, model))(params, batch)
    expected_logits, expected_loss, expected_gradients = unsharded()
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(logits[real], expected_logits[real], atol=2e-5)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    for ours, theirs in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * largest)
