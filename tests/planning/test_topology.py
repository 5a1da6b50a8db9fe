import importlib.util
import os
import subprocess
import sys

import pytest

from sa_jax.errors import UsageError, UserError
from sa_jax.parallel.hardware import CHIPS, GIB, chip_of
from sa_jax.planning.topology import known_shapes, open_topology, parse_topology


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("v5p:4x4x4", "v5p:4x4x4, 64 chips (cloud name v5p-128)"),
        ("v4:2x2x2", "v4:2x2x2, 8 chips (cloud name v4-16)"),
        ("v5e:4x4", "v5e:4x4, 16 chips (cloud name v5litepod-16)"),
        ("v6e:2x4", "v6e:2x4, 8 chips (cloud name v6e-8)"),
        ("tpu7x:2x2x2", "tpu7x:2x2x2, 8 chips, 2 devices each (cloud name tpu7x-16)"),
        ("2xv5p:4x4x4", "2xv5p:4x4x4, 128 chips (2 slices of cloud name v5p-128)"),
        ("h200:64", "h200:64, 64 GPUs on 8 nodes"),
        ("b200:8", "b200:8, 8 GPUs on 1 node"),
        ("v5p:8x8x16", "v5p:8x8x16, 1024 chips (cloud name v5p-2048)"),
    ],
)
def test_a_topology_says_its_number_of_chips_and_its_cloud_name(name, described):
    assert parse_topology(name).describe() == described


@pytest.mark.parametrize(
    "name",
    ["v5p:3x3x3", "v5p:4x4", "v7:2x2", "v5p-129", "v5e-16", "h200-8", "v6e-512", "x\ny"]
    + ["v5p-192", "v5p:5x7x20", "v5p:12x4x4"]
    + ["", "h100:", "h100:0", "v6e:x", "2xh200:8"],
)
def test_an_unknown_topology_lists_the_known(name):
    with pytest.raises(UsageError, match=r"known: v4:2x2x1,.*v5p:2x2x1.*v6e:1x1.*h200:NUMBER"):
        parse_topology(name)


def test_more_gpus_than_a_node_has_are_whole_nodes():
    """A cluster's job gets whole nodes: with 12 GPUs its mesh would have 16"""
    assert [parse_topology(f"h200:{n}").nodes for n in (1, 6, 8, 16, 72)] == [1, 1, 1, 2, 9]
    for name, more in (("h200:9", 16), ("h200:12", 16), ("h100:20", 24)):
        with pytest.raises(UsageError, match=f"{name}: more than 8 GPUs .* nodes of 8; use {more}"):
            parse_topology(name)


@pytest.mark.parametrize(
    ("cloud", "name"),
    [  # v4, v5p and tpu7x count TensorCores, the others chips
        *[("v4-8", "v4:2x2x1"), ("v4-1024", "v4:8x8x8"), ("tpu7x-16", "tpu7x:2x2x2")],
        *[("v5p-8", "v5p:2x2x1"), ("v5p-16", "v5p:2x2x2"), ("v5p-256", "v5p:4x4x8")],
        *[("v5litepod-1", "v5e:1x1"), ("v5litepod-8", "v5e:2x4"), ("v6e-256", "v6e:16x16")],
        *[("2xv5p-128", "2xv5p:4x4x4"), ("v5p-1408", "v5p:4x4x44"), ("v5p-384", "v5p:4x4x12")],
        # of several shapes, that of google/xpk's table
        *[("v5p-512", "v5p:4x8x8"), ("v5p-768", "v5p:4x8x12"), ("v5p-1152", "v5p:4x12x12")],
        *[("v5p-2048", "v5p:8x8x16"), ("v5p-6912", "v5p:12x12x24"), ("v5p-8320", "v5p:4x20x52")],
        *[("v5p-9216", "v5p:12x16x24"), ("v5p-17920", "v5p:16x20x28")],
    ],
)
def test_a_cloud_name_is_the_slice_of_the_documented_shape(cloud, name):
    machine = parse_topology(cloud)
    assert machine == parse_topology(name) and machine.name == name
    assert cloud.endswith(machine.cloud_name)
    assert parse_topology(cloud) is machine  # not looked for again


def test_without_libtpu_the_extra_is_named_and_without_a_cuda_plugin_there_are_no_gpus(monkeypatch):
    find = importlib.util.find_spec
    missing = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name)
    )
    with pytest.raises(UserError, match=r"'\.\[tpu\]'"):
        open_topology("v5p:4x4x4")
    assert open_topology("h200:8").devices == ()


PROGRAM = """
import sys
from sa_jax.planning.topology import open_topology
for name in sys.argv[1:]:
    machine = open_topology(name)
    assert len(machine.devices) == machine.chips * machine.chip.devices, name
"""


def test_libtpu_knows_all_shapes_and_prints_nothing_where_there_is_no_tpu():
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    names = [f"{chip.name}:{shape}" for chip in CHIPS for shape in known_shapes(chip)]
    names += ["v5p:4x4x12", "2xv5p:2x2x2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Device:
    def __init__(self, device_kind):
        self.device_kind = device_kind


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),  # slower than the h100 of a topology
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("cpu", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    chip = chip_of(Device(kind))
    assert (chip and chip.name) == name


def test_gpus_have_the_memory_that_commands_take_of_them():
    """0.92 of what CUDA reports: 79.1, 139.8 and 178.4 GiB."""
    for name, gib in (("a100", 72.68), ("h100", 72.68), ("h200", 127.88), ("b200", 163.76)):
        assert parse_topology(f"{name}:8").chip.hbm_bytes / GIB == pytest.approx(gib)


def test_every_tpu_has_known_shapes_of_its_own_dimensions():
    for chip in CHIPS:
        for shape in known_shapes(chip):
            assert len(shape.split("x")) == chip.torus


@pytest.mark.parametrize(
    ("name", "sizes", "holds"),
    [
        ("v5p:4x4x4", (16, 4), True),
        ("v5p:4x4x4", (8, 8), False),
        ("v5p:4x4x4", (64, 1), True),
        ("v5p:4x4x8", (16, 8), True),
        ("v6e:2x4", (4, 2), True),
        ("v6e:2x4", (1, 8), True),
        ("tpu7x:2x2x1", (4, 2), True),
        ("h200:8", (4, 2), True),
    ],
)
def test_a_mesh_takes_whole_dimensions_of_the_torus(name, sizes, holds):
    assert parse_topology(name).holds(sizes) == holds
