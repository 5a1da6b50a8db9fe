"""When the step is compiled: beside the start of a run, but on GPUs when nothing else runs."""

import threading
import types

import jax
import numpy as np
import pytest

from sa_jax.llama.lora import split
from sa_jax.llama.model import with_small_kernels_merged
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import shardings
from sa_jax.training import program as program_lib
from sa_jax.training.config import default_config
from sa_jax.training.program import begin_compiling, make_model, make_program
from sa_jax.training.step import init_state
from tests.toys import CONFIG, normal_params, one_device_mesh, packed_batch, random_params


def test_the_step_that_was_compiled_ahead_is_the_step():
    """On 4 devices: same bits as the jitted step, which is called with arrays and not shapes."""
    config = default_config()
    config.update(
        dtype="float32", batch_size=4, sequence_length=32, steps=10, attention="blockwise"
    )
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    program = make_program(config, make_model(config, CONFIG, mesh), total_steps=10)
    compiled_step = begin_compiling(program, mesh)
    params = random_params(CONFIG)
    shapes = program.arguments[2]
    batch = {
        name: jax.device_put(array, shapes[name].sharding)
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


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 4}], ids=["1", "8"])
def test_merged_adapters_train_as_those_apart(monkeypatch, sizes):
    """Three steps of Adam on an adapter whose rank makes the step merge it, on 1 and 8 devices."""
    config = default_config()
    config.update(dtype="float32", batch_size=4, sequence_length=32, attention="blockwise")
    config.lora.update(rank=16, alpha=32.0)
    # A gradient near zero has no sign that rounding could turn into a whole step.
    config.optimizer.update(learning_rate=1e-2, eps=1e-2)
    mesh = make_mesh(**sizes) if sizes else one_device_mesh()
    model = make_model(config, CONFIG, mesh)
    assert with_small_kernels_merged(model)[0].lora is None
    adapter, base = split(normal_params(CONFIG, lora=model.lora))
    frozen = jax.device_put(base, shardings(mesh, base))

    def trained():
        program = make_program(config, model, total_steps=3)
        init = jax.jit(lambda adapter: init_state(adapter, program.tx))
        state = jax.device_put(init(adapter), program.state_shardings)
        for seed in range(3):
            state, metrics = program.step(state, frozen, packed_batch(4, 32, seed=seed))
        return state.params, metrics["loss"]

    merged, loss = trained()
    monkeypatch.setattr(
        program_lib, "with_small_kernels_merged", lambda model: (model, lambda x: x)
    )
    apart, loss_apart = trained()
    np.testing.assert_allclose(loss, loss_apart, rtol=1e-6)
    for got, wanted in zip(*map(jax.tree.leaves, (merged, apart)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("platform", "at_once", "beside"),
    [("cpu", True, True), ("tpu", True, True), ("gpu", True, False), ("tpu", False, False)],
)
def test_compiling_begins_at_once_but_on_gpus_when_it_is_waited_for(platform, at_once, beside):
    begun, count = threading.Event(), []

    def compile_step():
        begun.set()
        count.append(threading.current_thread())
        return "compiled"

    lowered = types.SimpleNamespace(compile=compile_step)
    step = types.SimpleNamespace(lower=lambda: lowered)
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    program = types.SimpleNamespace(step=step, arguments=())
    compiled_step = begin_compiling(program, mesh, at_once=at_once)
    assert begun.wait(60 if beside else 0.1) == beside
    assert beside or compiled_step(wait=False) is None
    assert [compiled_step(), compiled_step()] == ["compiled"] * 2
    assert compiled_step(wait=False) == "compiled" or not beside
    assert len(count) == 1
    assert (count[0] is threading.current_thread()) == (not beside)
