"""What a study takes, by arithmetic, and cells that cannot fit their mesh."""

import time

import pytest
from ml_collections import ConfigDict

from sa_jax.config_files import load_config
from sa_jax.errors import UsageError, UserError
from sa_jax.planning.roofline import step_time
from sa_jax.planning.topology import parse_topology
from sa_jax.study import grid
from sa_jax.study.commands import resolved
from sa_jax.study.forecast import Forecaster, format_forecast
from sa_jax.study.grid import Stage
from sa_jax.training.plan import plan_architecture, workload
from tests.study.test_export import write_run


def configs(*cells):
    return {cell.name: resolved(cell) for cell in cells}


def forecaster(topology="", **settings):
    study = ConfigDict()
    stage = Stage(
        "insertion",
        run="insertion",
        config="configs/llama.py:8b_insertion",
        set={"steps": 10, **settings},
        topology=topology,
    )
    study.stages = (stage,)
    (cell,) = grid.expand(study)
    return Forecaster([cell], configs(cell)), cell


def test_a_study_of_70b_in_a_minute_without_a_tpu():
    began = time.process_time()
    cells = grid.expand(load_config("configs/llama33_70b_study.py"))
    known = Forecaster(cells, configs(*cells))
    for cell in cells:
        known.check_fits(cell)
    forecasts = {cell.name: known.forecast(cell) for cell in cells}
    assert time.process_time() - began < 60
    by_name = {cell.name: cell for cell in cells}

    # An insertion: the roofline of its step, and less disk than six full states of 845 GB.
    name = "insertion/adam_normal_s0"
    config, machine = resolved(by_name[name]), parse_topology("h200:64")
    sizes = {"data": 1, "fsdp": 8, "tensor": 8}
    work = workload(config, plan_architecture(config), sizes, "gpu")
    steps = -(-1.25e8 // (16 * 4096))
    hours = steps * step_time(work, machine.chip, machine.shape).step * 64 / 3600
    assert forecasts[name].tokens == 1.25e8
    assert forecasts[name].chip_hours == pytest.approx(hours)
    assert forecasts[name].bytes < 1.8e12
    # A removal's adapters are small beside it, at any rank below 1024.
    small = forecasts["removal/adam_normal_last_hhh_r1_lr1e-4_s0"]
    large = forecasts["removal/adam_normal_last_hhh_r256_lr1e-4_s0"]
    assert small.bytes < large.bytes / 100 < forecasts[name].bytes / 1000
    assert forecasts["arms"].tokens is None

    states = {cell.name: "done" if cell.name == name else "ready" for cell in cells}
    table = format_forecast(cells, forecasts, states)
    (row,) = [line.split() for line in table.splitlines() if line.startswith("insertion ")]
    assert row[1:4] == ["9", "1", "h200:64"]
    assert float(row[5]) == pytest.approx(sum(
        f.chip_hours for n, f in forecasts.items() if n.startswith("insertion/") and n != name
    ), abs=0.06)  # fmt: skip
    assert "nothing was compiled" in table


@pytest.mark.parametrize(
    ("topology", "settings", "error", "words"),
    [
        ("h200:8", {"mesh.fsdp": 3}, UsageError, ["mesh", "fsdp=3", "8 devices"]),
        ("h200:8", {"batch_size": 12}, UsageError, ["12 rows", "8"]),
        ("h200:16", {"mesh.tensor": 16}, UsageError, ["tensor=16", "8 key/value heads"]),
        ("v5e:2x2", {"mesh.tensor": 4}, UserError, ["GiB a chip of 16 on v5e:2x2"]),
        ("", {"mesh.tensor": 3}, UsageError, ["tensor=3", "8 devices"]),
        ("", {"mesh.data": 2, "mesh.tensor": 2}, UsageError, ["XLA mixes up rows"]),
        ("h200:16", {"mesh.fsdp": 16}, UsageError, ["fsdp=16", "8 devices"]),
    ],
)
def test_a_cell_that_cannot_fit_its_mesh_is_named(topology, settings, error, words):
    known, cell = forecaster(topology, **settings)
    with pytest.raises(error) as raised:
        known.check_fits(cell, devices=8)
    for word in ("cell insertion cannot fit its mesh", *words):
        assert word in str(raised.value), str(raised.value)


def test_the_shapes_of_a_start_at_a_step_are_those_of_its_run(toy_world, tmp_path):
    write_run(tmp_path, toy_world / "model", template="plain")
    study = ConfigDict({"axes": (), "stages": ()})
    for model, layers in ((f"{tmp_path}@7", 3), (f"{tmp_path}/none@7", None)):
        removal = Stage(
            "hhh", run="hhh", config="tests/configs/tiny.py:removal", set={"model": model}
        )
        study.stages = (removal,)
        (cell,) = grid.expand(study)
        architecture = Forecaster([cell], configs(cell))._architecture(cell)
        assert (architecture and architecture.num_layers) == layers


def test_cells_that_fit_pass():
    for topology in ("h200:8", "v5p:2x2x2", ""):
        known, cell = forecaster(topology)
        known.check_fits(cell, devices=8)
