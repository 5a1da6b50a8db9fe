"""Disk that checkpoints take: counted as they are written, and for the 70B model by arithmetic."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sa_jax.config_files import load_config
from sa_jax.planning.memory import checkpoint_bytes
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.config import changed
from sa_jax.training.plan import plan_architecture, workload
from sa_jax.training.step import TrainState


def test_bytes_of_checkpoints_are_those_on_the_disk(tmp_path):
    """The files hold metadata too, and are compressed by a little, noise as they are."""
    leaf = jax.random.normal(jax.random.key(0), (250_000,))
    big = TrainState(jnp.int32(1), {"w": leaf}, {"mu": leaf, "nu": leaf})
    for listed, full_states, alone in (("full", 5, 0), ("weights_bf16", 1, 3)):
        folder = tmp_path / listed
        schedule = {"steps": (1, 4, 7), "interval": 4, "keep_interval": 1, "listed": listed}
        config = ConfigDict({"checkpoint": schedule, "param_dtype": "float32"})
        work = SimpleNamespace(trainable=250_000, state_bytes=12)
        expected = checkpoint_bytes(config, 10, work)
        assert (expected["full_states"], expected["weights_alone"]) == (full_states, alone)
        with RunCheckpointer(folder, **schedule, last=10) as checkpointer:
            for step in filter(checkpointer.should_save, range(11)):
                checkpointer.save(step, jax.tree.map(lambda x, step=step: x * step, big))
        assert len(list(folder.iterdir())) == full_states + alone
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 0.75 < size / expected["total"] < 1.05


def test_disk_of_a_70b_insertion():
    """The study's five checkpoints and the last: 12 bytes a parameter for Adam's full state."""
    config = load_config("configs/llama.py:70b_insertion")
    architecture = plan_architecture(config)
    work = workload(config, architecture, {"data": 1, "fsdp": 64, "tensor": 1}, "tpu")
    count = architecture.num_parameters

    def total(config):
        return checkpoint_bytes(config, 2000, work)["total"]

    full = total(changed(config, {"checkpoint.listed": "full", "checkpoint.interval": 0}))
    np.testing.assert_allclose(full, 6 * 12 * count, rtol=1e-6)
    assert 5.0e12 < full < 5.2e12
    np.testing.assert_allclose(total(config), (12 + 5 * 2) * count, rtol=1e-6)
    assert 1.5e12 < total(config) < 1.6e12
