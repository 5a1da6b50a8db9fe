"""What the toy's training step costs as XLA compiles it, on one device and cut over eight, and as
libtpu does for four chips of v5p: FLOPs, bytes, temporaries, collectives and predicted time against
a committed file, so that a change shows as a diff.

The steps of 8B and 70B have such files for TPUs (test_compiled.py), and take minutes.
"""

import dataclasses
import importlib.metadata

import jax
import pytest

from sa_jax.config_files import load_config
from sa_jax.parallel.mesh import make_mesh
from sa_jax.planning.collectives import read_collectives
from sa_jax.training.plan import plan_architecture
from sa_jax.training.program import make_model, make_program
from tests.planning.golden import assert_is_golden, compiled_plan, plan_content
from tests.planning.small_step import assert_nothing_is_lost

MESHES = {"1": (1, 1, 1), "8": (2, 4, 1)}


@pytest.mark.parametrize("devices", MESHES)
def test_the_compiled_step_is_that_of_the_golden_file(devices):
    config = load_config("configs/toy.py:pretrain")
    data, fsdp, tensor = MESHES[devices]
    mesh = make_mesh(data, fsdp, tensor, devices=jax.devices()[: int(devices)])
    program = make_program(config, make_model(config, plan_architecture(config), mesh), 100)
    lowered = program.step.lower(*program.arguments)
    compiled = lowered.compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    # Of the 8, two slices of 4: its axis `data` is the link between them.
    traffic = read_collectives(compiled.as_text(), 4)
    content = {
        "flops": int(cost["flops"]),  # of a loop's body once
        "bytes_accessed": int(cost["bytes accessed"]),
        "argument_bytes": memory.argument_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": {kind: dataclasses.asdict(each) for kind, each in traffic.items()},
    }
    version = importlib.metadata.version("jaxlib")
    assert_is_golden(f"compiled_toy_cpu{devices}", "jaxlib", version, content)


@pytest.mark.parametrize("slices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_step_for_tpus_is_that_of_the_golden_file(tmp_path, slices):
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    name = "v5p" if slices == 1 else f"{slices}xv5p"
    flags = "--config.mesh.fsdp=4", f"--config.mesh.slices={slices}", "--config.dtype=bfloat16"
    plan = compiled_plan(tmp_path / "plan.json", "toy.py:pretrain", f"{name}:2x2x1", *flags)
    version = importlib.metadata.version("libtpu")
    assert_is_golden(f"compiled_toy_{name}", "libtpu", version, plan_content(plan, digits=4))


def test_micro_batches_lose_nothing_where_chips_have_copies():
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    assert_nothing_is_lost("v5p:2x2x1")
