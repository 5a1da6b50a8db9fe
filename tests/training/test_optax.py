"""Optimizers of optax by name: sharded = unsharded, checkpoints that resume, and the plan."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.llama.model import Llama
from sa_jax.optim.build import make_optimizer, make_schedule
from sa_jax.parallel import rules
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.config import default_config
from sa_jax.training.losses import make_cross_entropy
from sa_jax.training.plan import workload
from sa_jax.training.step import init_state, make_train_step, state_shardings
from tests.toys import CONFIG, packed_batch, random_params

NAMES = [
    "contrib.muon",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("lion", "adafactor")),
]


def section(name):
    config = default_config()
    config.optimizer.update(name=name, learning_rate=1e-3, schedule="constant")
    if name == "adafactor":
        config.optimizer.kwargs.min_dim_size_to_factor = 16  # so that the toy's kernels are
    return config


class Training:
    """A state and a step, on a mesh or (None) on one device."""

    def __init__(self, name, sizes=None):
        config = section(name).optimizer
        mesh = sizes and make_mesh(*sizes)
        tx = make_optimizer(config, 100, mesh)
        model = Llama(CONFIG, mesh=mesh)
        step = make_train_step(model, make_cross_entropy(model), tx, make_schedule(config, 100))
        self.state = jax.jit(lambda p: init_state(p, tx))(random_params())
        self.placed, self.batch_sharding = None, None
        if mesh is not None:
            self.placed = state_shardings(mesh, self.state)
            self.state = jax.device_put(self.state, self.placed)
            self.batch_sharding = NamedSharding(mesh, rules.BATCH_SPEC)
        self.step = jax.jit(step, out_shardings=self.placed and (self.placed, None))

    def run(self, state, seeds):
        for seed in seeds:
            batch = packed_batch(seed=seed)
            if self.batch_sharding is not None:
                batch = jax.device_put(batch, self.batch_sharding)
            state, _ = self.step(state, {}, batch)
        return state


@pytest.mark.parametrize("name", NAMES)
def test_sharded_is_unsharded_and_a_checkpoint_goes_on(name, tmp_path):
    plain, sharded = Training(name), Training(name, (2, 2, 2))
    expected = plain.run(plain.state, range(3))
    middle = sharded.run(sharded.state, range(2))
    with RunCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(2, middle, wait=True)
    end = sharded.run(middle, range(2, 3))
    # Lion's update is a sign, which noise turns where a moment is near 0: two learning rates.
    atol = 2.1e-3 if name == "lion" else 1e-4
    far = [
        np.abs(a - b) > 1e-5
        for a, b in zip(*map(jax.tree.leaves, (end.params, expected.params)), strict=True)
    ]
    assert sum(map(np.sum, far)) <= 0.002 * sum(leaf.size for leaf in far)
    for a, b in zip(*map(jax.tree.leaves, (end.params, expected.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    abstract = rules.with_shardings(sharded.state, sharded.placed)
    restored = RunCheckpointer(tmp_path).restore(abstract)[1]
    resumed = sharded.run(restored, range(2, 3))
    for a, b in zip(*map(jax.tree.leaves, (resumed, end)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_live_with_their_parameters_and_the_rest_on_every_device():
    training = Training("contrib.muon", (2, 2, 2))
    specs = {
        rules.path_string(path): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(training.placed.opt_state)
    }
    by_end = {
        "mu/layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
        "mu/embed/embedding": P("tensor", "fsdp"),
        "ns_coeffs": P(),
    }
    for end, spec in by_end.items():
        matching = [found for path, found in specs.items() if path.endswith(end)]
        assert matching and all(found == spec for found in matching), end


def test_the_plan_counts_the_state_of_muon():
    """One moment for each kernel of the layers, two (Adam's) for the rest, and the coefficients."""
    params = random_params()
    everything = {"data": 1, "fsdp": 8, "tensor": 1}
    work = workload(section("contrib.muon"), CONFIG, everything, "cpu")
    sizes = {
        rules.path_string(path): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    total = sum(sizes.values())
    kernels = sum(n for path, n in sizes.items() if path.startswith("layers/") and "kernel" in path)
    expected = 4 * (total + kernels + 2 * (total - kernels))
    np.testing.assert_allclose(work.state_bytes * total, expected, rtol=2e-3)
