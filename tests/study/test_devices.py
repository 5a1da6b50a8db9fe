import importlib.util
import os
from pathlib import Path

import pytest

from sa_jax.errors import UsageError
from sa_jax.parallel.hardware import visible_devices
from sa_jax.study import devices
from sa_jax.study.devices import Slot, divide
from sa_jax.study.forecast import local_devices


@pytest.fixture
def plugins(monkeypatch):
    """The packages with which jax uses accelerators that seem to be installed."""
    installed = {"jax_cuda12_plugin", "libtpu"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return installed


@pytest.mark.parametrize(
    "cpus,workers,shares",
    [
        (8, 1, [()]),
        (1, 2, [(0,), (0,)]),
        (2, 2, [(0, 1), (0, 1)]),
        (3, 2, [(0, 1), (2, 0)]),
        (4, 4, [(0, 1), (2, 3), (0, 1), (2, 3)]),
        (9, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ],
)
@pytest.mark.parametrize("system", ["linux", "macos"])
def test_workers_share_the_cpus_and_have_two_each(monkeypatch, system, cpus, workers, shares):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    if system == "linux":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert divide(workers) == [Slot(cpus=share) for share in shares]


def test_workers_divide_the_gpus(monkeypatch, plugins):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [slot.env["CUDA_VISIBLE_DEVICES"] for slot in divide(2)] == ["4,5", "6,7"]
    assert local_devices(2) == 2
    for refuses in (divide, local_devices):
        with pytest.raises(UsageError, match="4 GPU devices, which 3 workers cannot share"):
            refuses(3)
        with pytest.raises(UsageError, match="--workers=0: must be at least 1"):
            refuses(0)


def test_launched_cells_have_all_devices_and_a_port_each(monkeypatch):
    """Another command chooses their hosts; jax has one port for all cells of a Slurm job."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    ports = [slot.env["JAX_COORDINATOR_PORT"] for slot in divide(4, launched=True)]
    assert len({*ports}) == 4 and all(61440 <= int(port) <= 65535 for port in ports)
    assert all(slot.env.keys() == {"JAX_COORDINATOR_PORT"} for slot in divide(2, launched=True))
    assert divide(1, launched=True) == [Slot()]


def test_workers_divide_the_chips_of_a_tpu(monkeypatch):
    monkeypatch.setattr(devices, "visible_devices", lambda: ("TPU", list("0123")))
    first, second = (slot.env for slot in divide(2))
    assert (first["TPU_VISIBLE_CHIPS"], second["TPU_VISIBLE_CHIPS"]) == ("0,1", "2,3")
    assert first["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
    # Else jax would join, at one port, what the metadata of the TPU VM names.
    assert first["JAX_NUM_PROCESSES"] == second["JAX_NUM_PROCESSES"] == "1"
    monkeypatch.setattr(devices, "visible_devices", lambda: ("TPU", list("012345")))
    with pytest.raises(UsageError, match="libtpu cannot give a process 3 TPU chips"):
        divide(2)


def test_gpus_of_a_container_are_counted_from_0(monkeypatch, plugins):
    """CUDA counts those that are here, whatever their files are called."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia2"), Path("/dev/nvidia3")])
    )
    assert visible_devices() == ("GPU", ["0", "1"])


@pytest.mark.parametrize("none", ["", "-1"])
def test_gpus_that_are_hidden_are_not_divided(monkeypatch, plugins, none):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    assert visible_devices()[0] != "GPU"


@pytest.mark.parametrize(
    ("installed", "platforms", "kind"),
    [
        ({"jax_cuda12_plugin"}, "", "GPU"),
        ({"jax_cuda13_plugin"}, "cuda,cpu", "GPU"),
        ({"jax_cuda12_plugin", "libtpu"}, "tpu", "TPU"),
        ({"jax_cuda12_plugin"}, "cpu", "CPU"),
        (set(), "", "CPU"),  # a laptop with a GPU, and jax for CPUs
    ],
)
def test_what_jax_cannot_use_does_not_count(monkeypatch, plugins, installed, platforms, kind):
    plugins.clear()
    plugins.update(installed)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / pattern]))  # both are here
    assert visible_devices()[0] == kind
