"""Training with SOAP: end to end on meshes, checkpoints on the same and other meshes, binaries."""

import os
import signal

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sa_jax.llama.model import Llama
from sa_jax.optim import make_optimizer, make_schedule
from sa_jax.parallel import rules
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.config import default_config
from sa_jax.training.metrics import read_metrics
from sa_jax.training.step import init_state, make_train_step, state_shardings
from tests.toys import CONFIG, packed_batch, random_params
from tests.training.test_loop import (
    assert_bit_equal,
    insertion,
    log_without_times,
    stopped_at,
    weights,
)


class Training:
    """A tiny Llama, SOAP with float32 operands, and a mesh (None: one device)."""

    def __init__(self, sizes=None, **soap):
        config = default_config().optimizer
        config.update(name="soap", learning_rate=3e-3, schedule="constant", warmup_fraction=0.0)
        config.soap.update(matmul_dtype="float32", block_size=16, dense_steps=4, **soap)
        self.mesh = (
            None if sizes is None else make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        )
        tx = make_optimizer(config, 100, self.mesh)
        step = make_train_step(Llama(CONFIG, mesh=self.mesh), tx, make_schedule(config, 100))
        self.shape = jax.eval_shape(lambda p: init_state(p, tx), random_params())
        self.placed = None
        if self.mesh is not None:
            self.placed = state_shardings(self.mesh, self.shape)
        outputs = None if self.mesh is None else (self.placed, None)
        self.init = jax.jit(lambda p: init_state(p, tx), out_shardings=self.placed)
        self.step = jax.jit(step, out_shardings=outputs)

    def abstract(self):
        return rules.with_shardings(self.shape, self.placed)

    def run(self, state, seeds):
        losses = []
        for seed in seeds:
            batch = packed_batch(seed=seed)
            if self.mesh is not None:
                batch = jax.device_put(batch, NamedSharding(self.mesh, rules.BATCH_SPEC))
            state, metrics = self.step(state, {}, batch)
            losses.append(float(metrics["loss"]))
        counters = [value for name, value in metrics.items() if name.startswith("soap_")]
        assert not any(map(int, counters))
        return state, losses


def params_of(state):
    return jax.tree.leaves(jax.device_get(state.params))


@pytest.fixture(scope="module")
def sharded():
    return Training((1, 4, 2))


def test_loss_curves_on_a_mesh_and_on_one_device_are_the_same(sharded):
    curves = []
    for training in (Training(), sharded):
        _, losses = training.run(training.init(random_params()), range(12))
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.05
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-3)


def test_checkpoints_resume_bit_for_bit_and_on_another_mesh(sharded, tmp_path):
    """Stacks of 6 and 9 matrices are filled up to 8 and 16 on eight devices, to 6 and 10 on two."""
    state, _ = sharded.run(sharded.init(random_params()), range(6))
    with RunCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(6, state, wait=True)
    end, _ = sharded.run(state, range(6, 9))
    _, restored = RunCheckpointer(tmp_path).restore(sharded.abstract())
    for a, b in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    again, _ = sharded.run(restored, range(6, 9))
    for a, b in zip(params_of(again), params_of(end), strict=True):
        np.testing.assert_array_equal(a, b)

    for other in (Training((1, 2, 1)), Training((2, 2, 2))):
        _, restored = RunCheckpointer(tmp_path).restore(other.abstract())
        moved, _ = other.run(restored, range(6, 9))
        for a, b in zip(params_of(moved), params_of(end), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_official_mode_trains_on_a_mesh():
    """Whole factors on every device, and the numbers of one device."""
    curves = []
    for sizes in (None, (1, 4, 2)):
        training = Training(sizes, mode="official")
        _, losses = training.run(training.init(random_params()), range(3))
        curves.append(losses)
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-3)


def test_a_run_stopped_and_resumed_is_a_run_that_was_not(zygote, toy_world, tmp_path):
    """Through the binary; then on another mesh."""
    soap = (
        "--config.optimizer.name=soap",
        "--config.optimizer.soap.block_size=16",
        "--config.optimizer.soap.dense_steps=3",
        "--config.optimizer.soap.precondition_frequency=4",
        "--config.eval.num_prompts=0",
        "--config.eval.names=()",
        "--config.steps=12",
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = zygote.run(*insertion(toy_world, whole, *soap))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(whole / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["soap_skipped_steps"] == lines[-1]["soap_rejected_bases"] == 0

    command = insertion(toy_world, run, *soap)
    process = zygote.start(*command)
    process.wait_for((run / "checkpoints/step_000003/digests.json").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait().returncode == 75, process.stderr
    assert 3 <= stopped_at(run) < 12
    assert zygote.run(*command).returncode == 0
    assert log_without_times(run) == log_without_times(whole)
    assert_bit_equal(weights(zygote, run, tmp_path / "a"), weights(zygote, whole, tmp_path / "b"))
