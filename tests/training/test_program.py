"""When the step is compiled: beside the start of a run, but on GPUs when nothing else runs."""

import threading
import types

import jax
import numpy as np
import pytest

from sa_jax.parallel.mesh import make_mesh
from sa_jax.training import program as program_lib
from sa_jax.training.config import default_config
from sa_jax.training.program import begin_compiling, make_model, make_program
from sa_jax.training.step import init_state
from tests.toys import CONFIG, packed_batch, random_params


def test_the_step_that_was_compiled_ahead_is_the_step():
    """On 4 devices: same bits as the jitted step, which is called with arrays and not shapes."""
    config = default_config()
    config.update(
        dtype="float32", batch_size=4, sequence_length=32, steps=10, attention="blockwise"
    )
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    program = make_program(config, make_model(config, CONFIG, mesh), total_steps=10)
    compiled_step = begin_compiling(config, program, mesh)
    params = random_params(CONFIG)
    batch = {
        name: jax.device_put(array, program_lib.abstract_batch(config, mesh)[name].sharding)
        for name, array in packed_batch(4, 32).items()
    }

    def after_a_step(step):
        state = jax.jit(
            lambda params: init_state(params, program.tx), out_shardings=program.state_shardings
        )(params)
        return jax.tree.leaves(step(state, {}, batch))

    for ahead, jitted in zip(
        after_a_step(compiled_step()), after_a_step(program.step), strict=True
    ):
        np.testing.assert_array_equal(ahead, jitted)


@pytest.mark.parametrize(
    ("platform", "at_once", "beside"),
    [("cpu", True, True), ("tpu", True, True), ("gpu", True, False), ("tpu", False, False)],
)
def test_compiling_begins_at_once_but_on_gpus_when_it_is_waited_for(
    monkeypatch, platform, at_once, beside
):
    monkeypatch.setattr(program_lib, "abstract_arguments", lambda *_: ())
    begun, count = threading.Event(), []

    def compile_step():
        begun.set()
        count.append(threading.current_thread())
        return "compiled"

    lowered = types.SimpleNamespace(compile=compile_step)
    step = types.SimpleNamespace(lower=lambda: lowered)
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    program = types.SimpleNamespace(step=step)
    compiled_step = begin_compiling(None, program, mesh, at_once=at_once)
    assert begun.wait(60 if beside else 0.1) == beside
    assert [compiled_step(), compiled_step()] == ["compiled"] * 2
    assert len(count) == 1
    assert (count[0] is threading.current_thread()) == (not beside)
