"""Training with SOAP: end to end on meshes, checkpoints on the same and other meshes, binaries."""

import functools
import os
import signal

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from sa_jax.errors import UsageError
from sa_jax.llama.model import Llama
from sa_jax.optim.build import make_optimizer, make_schedule
from sa_jax.parallel import rules
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.config import check_config, default_config
from sa_jax.training.losses import make_cross_entropy
from sa_jax.training.metrics import read_metrics
from sa_jax.training.step import TrainState, init_state, make_train_step, state_shardings
from tests.optim.test_soap_sharded import draw
from tests.toys import CONFIG, packed_batch, random_params
from tests.training.test_loop import (
    assert_bit_equal,
    insertion,
    log_without_times,
    stopped_at,
    weights,
)


def optimizer(mesh, **soap):
    """SOAP of a config, with float32 operands and small blocks."""
    config = default_config().optimizer
    config.update(name="soap", learning_rate=3e-3, schedule="constant", warmup_fraction=0.0)
    config.soap.update(matmul_dtype="float32", block_size=16, dense_steps=3, **soap)
    return make_optimizer(config, 100, mesh), make_schedule(config, 100)


@pytest.mark.long
def test_loss_curves_on_a_mesh_and_on_one_device_are_the_same():
    curves = []
    for mesh in (None, make_mesh(1, 4, 2)):
        tx, schedule = optimizer(mesh)
        model = Llama(CONFIG, mesh=mesh)
        step, outputs = make_train_step(model, make_cross_entropy(model), tx, schedule), None
        state = init_state(random_params(), tx)
        if mesh is not None:
            placed = state_shardings(mesh, state)
            state, outputs = jax.device_put(state, placed), (placed, None)
        step, losses = jax.jit(step, out_shardings=outputs), []
        for seed in range(12):
            batch = packed_batch(seed=seed)
            if mesh is not None:
                batch = jax.device_put(batch, NamedSharding(mesh, rules.BATCH_SPEC))
            state, metrics = step(state, {}, batch)
            losses.append(float(metrics["loss"]))
        assert int(metrics["soap_skipped_steps"]) == int(metrics["soap_rejected_bases"]) == 0
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.05
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-3)


class Prescribed:
    """A few parameters on a mesh, updated with prescribed gradients."""

    def __init__(self, *sizes, **soap):
        mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        tx, _ = optimizer(mesh, **soap)
        self.shape = jax.eval_shape(lambda p: init_state(p, tx), draw(0))
        self.placed = state_shardings(mesh, self.shape)
        self.init = jax.jit(lambda: init_state(draw(0), tx), out_shardings=self.placed)

        @functools.partial(jax.jit, out_shardings=self.placed)
        def step(state, gradients):
            updates, opt_state = tx.update(gradients, state.opt_state, state.params)
            return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

        self.step = step

    def run(self, state, seeds):
        for seed in seeds:
            state = self.step(state, jax.device_put(draw(seed), self.placed.params))
        return state

    def restore(self, folder):
        abstract = rules.with_shardings(self.shape, self.placed)
        return RunCheckpointer(folder).restore(abstract)[1]


def assert_close(a, b, atol):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def test_checkpoints_resume_bit_for_bit_and_on_another_mesh(tmp_path):
    """Stacks of 6 matrices are filled up to 8 on eight devices, and cut to 6 on two."""
    sharded = Prescribed(1, 4, 2)
    state = sharded.run(sharded.init(), range(1, 6))
    with RunCheckpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, wait=True)
    end = sharded.run(state, range(6, 9))
    restored = sharded.restore(tmp_path)
    assert_close(restored, state, 0)
    assert_close(sharded.run(restored, range(6, 9)), end, 0)
    for sizes, filled in (((1, 2, 1), 6), ((2, 2, 2), 8)):
        other = Prescribed(*sizes)
        restored = other.restore(tmp_path)
        assert restored.opt_state[1].stacks["6x16x24"].mu_ncr.shape[0] == filled
        assert_close(other.run(restored, range(6, 9)).params, end.params, 1e-5)


def test_official_mode_on_a_mesh():
    """Whole factors on every device, and the numbers of one device.

    The longer sides go without a basis: what it is would be decided by rounding.
    """
    runs = [Prescribed(*s, mode="official", max_precond_dim=16) for s in ((1, 1, 1), (1, 4, 2))]
    ends = [training.run(training.init(), range(1, 5)).params for training in runs]
    assert_close(*ends, 1e-4)


SOAP = (
    "--config.optimizer.name=soap",
    "--config.optimizer.soap.block_size=16",
    "--config.optimizer.soap.dense_steps=3",
    "--config.optimizer.soap.precondition_frequency=4",
    "--config.eval.num_prompts=0",
    "--config.eval.names={}",
    "--config.steps=12",
)


def test_only_the_mode_that_can_skip_a_step_may_be_told_to():
    config = default_config()
    config.optimizer.soap.on_nonfinite = "skip"
    check_config(config)
    config.optimizer.soap.mode = "official"
    with pytest.raises(
        UsageError, match="on_nonfinite='skip': must be 'stop' with mode='official'"
    ):
        check_config(config)


@pytest.mark.long
def test_a_run_stopped_and_resumed_is_a_run_that_was_not(zygote, toy_world, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = zygote.run(*insertion(toy_world, whole, *SOAP))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(whole / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["soap_skipped_steps"] == lines[-1]["soap_rejected_bases"] == 0

    command = insertion(toy_world, run, *SOAP)
    process = zygote.start(*command)
    process.wait_for((run / "checkpoints/step_000003/digests.json").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait().returncode == 75, process.stderr
    assert 3 <= stopped_at(run) < 12
    assert zygote.run(*command).returncode == 0
    assert log_without_times(run) == log_without_times(whole)
    assert_bit_equal(weights(zygote, run, tmp_path / "a"), weights(zygote, whole, tmp_path / "b"))


@pytest.mark.long
def test_gradients_that_are_not_finite_stop_the_run_or_are_skipped_and_counted(
    zygote, toy_world, tmp_path
):
    """The first call builds bases; the second moves by 1e30, after which all gradients are NaN."""
    changes = ("learning_rate=1e30", "warmup_fraction=0", "weight_decay=0")
    wild = (*SOAP, *(f"--config.optimizer.{change}" for change in changes))
    done = zygote.run(*insertion(toy_world, tmp_path / "stop", *wild))
    assert done.returncode == 1
    assert "step 3: not finite: " in done.stderr.splitlines()[-1]

    skip = (*wild, "--config.optimizer.soap.on_nonfinite=skip")
    done = zygote.run(*insertion(toy_world, tmp_path / "skip", *skip))
    assert done.returncode == 0, done.stderr
    assert "step 12: not finite: " in done.stderr and "; skipped" in done.stderr
    assert read_metrics(tmp_path / "skip/metrics.jsonl")[-1]["soap_skipped_steps"] == 10
    last = weights(zygote, tmp_path / "skip", tmp_path / "hf")
    assert all(np.isfinite(leaf).all() for leaf in last.values())
