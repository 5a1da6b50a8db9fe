"""Machines by name: `v5p:4x4x4` (also `v5p-128`), `2xv5p:4x4x4` or `h200:64`. To compile for one,
none is needed."""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from sa_jax.errors import UsageError, UserError, install
from sa_jax.parallel.hardware import CHIPS, GPUS_A_NODE, Chip, has_cuda_plugin, has_libtpu
from sa_jax.text import first_line

# Common slices of Google Cloud (https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x).
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_MOST_CHIPS = 16_384
_NUMBER = "[1-9][0-9]{0,5}"

# As XLA describes them (https://github.com/openxla/xla, xla/backends/gpu/target_config/specs/):
# compute capability (major), cores, FPUs a core, memory bandwidth in bytes/s, bytes of L2, GHz,
# bytes of memory, bytes of shared memory a core, name.
_GPU_SPECS = {
    "a100": (8, 108, 64, 2.03904e12, 41943040, 1.41, 85100068864, 167936, "A100-SXM4-80GB"),
    "h100": (9, 132, 128, 3.35232e12, 52428800, 1.98, 84942979072, 233472, "H100 80GB HBM3"),
    "h200": (9, 132, 128, 4.8e12, 52428800, 1.98, 151397597184, 233472, "H200"),
    "b200": (10, 148, 128, 7.67232e12, 132644864, 1.965, 191514411008, 233472, "B200"),
}
_GPU_RESERVED = 1024  # bytes of shared memory that the driver takes of each block


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to run or to compile for."""

    name: str  # of the topology, such as `v5p:4x4x4`
    chip: Chip | None  # None if not known, as for CPUs; there are devices then
    shape: tuple[int, ...]  # chips of a slice along each axis of the torus; (chips,) for GPUs
    devices: Sequence[jax.Device] = ()  # to compile for; () if no compiler for them is installed
    slices: int = 1  # number of such slices of a TPU, connected by the data center's network

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def nodes(self) -> int:
        """Nodes of a cluster of GPUs."""
        return -(-self.chips // GPUS_A_NODE)

    @property
    def platform(self) -> str:
        """As jax names it: 'tpu', 'gpu' or 'cpu'."""
        if self.chip is None:
            return self.devices[0].platform
        return "tpu" if self.chip.torus else "gpu"

    def holds(self, sizes: tuple[int, ...]) -> bool:
        """Whether the axes of a mesh in a slice are whole dimensions of the torus, as required."""
        if self.chip is None or not self.chip.torus:
            return math.prod(sizes) == self.chips
        return _holds(sorted((*self.shape, self.chip.devices)), sizes)

    @property
    def cloud_name(self) -> str:
        """What Google Cloud calls a TPU slice, such as v5p-128 (v4, v5p and tpu7x count cores)."""
        assert self.chip is not None
        units = math.prod(self.shape) * (1 if self.chip.torus == 2 else 2)
        return f"{'v5litepod' if self.chip.name == 'v5e' else self.chip.name}-{units}"

    def describe(self) -> str:
        """Name, number of chips, and what Google Cloud calls it."""
        if self.chip is None:
            return self.name
        if not self.chip.torus:
            plural = "s" if self.nodes > 1 else ""
            return f"{self.name}, {self.chips} GPUs on {self.nodes} node{plural}"
        devices = f", {self.chip.devices} devices each" if self.chip.devices > 1 else ""
        times = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{self.name}, {self.chips} chips{devices} ({times}cloud name {self.cloud_name})"


@dataclasses.dataclass(frozen=True)
class Topology(Machine):
    """A machine whose chips are known, so that it has a roofline."""

    chip: Chip


def _holds(dimensions: Sequence[int], sizes: tuple[int, ...]) -> bool:
    """Whether the dimensions can be grouped so that the products of the groups are the sizes."""
    if not sizes:
        return math.prod(dimensions) == 1
    indices = range(len(dimensions))
    return any(
        math.prod(dimensions[i] for i in chosen) == sizes[0]
        and _holds([d for i, d in enumerate(dimensions) if i not in chosen], sizes[1:])
        for count in range(len(dimensions) + 1)
        for chosen in itertools.combinations(indices, count)
    )


@functools.cache  # a study asks for every cell
def parse_topology(name: str) -> Topology:
    """The machine of a name, without devices; of a cloud name it has the shape of such a slice.

    UsageError for an unknown name; the message lists the known ones.
    """
    name = _of_cloud_name(name)
    kind, _, size = name.partition(":")
    several = re.fullmatch("([1-9][0-9]{0,3})x(.*)", kind)
    slices, kind = (int(several[1]), several[2]) if several else (1, kind)
    chip = next((chip for chip in CHIPS if chip.name == kind), None)
    if chip is not None and re.fullmatch(f"{_NUMBER}(x{_NUMBER})*", size):
        shape = tuple(map(int, size.split("x")))
        if slices * math.prod(shape) > _MOST_CHIPS:
            raise UsageError(f"--topology={name!r}: more than {_MOST_CHIPS:,} chips")
        are_gpus = not chip.torus and len(shape) == 1 and slices == 1
        if are_gpus and shape[0] > GPUS_A_NODE and shape[0] % GPUS_A_NODE:
            raise UsageError(
                f"--topology={name}: more than {GPUS_A_NODE} GPUs must be whole nodes of "
                f"{GPUS_A_NODE}; use {-(-shape[0] // GPUS_A_NODE) * GPUS_A_NODE}"
            )
        if size in _shapes(chip, math.prod(shape)) or are_gpus:
            return Topology(name, chip, shape, slices=slices)
    known = [f"{c.name}:{','.join(known_shapes(c)) or 'NUMBER'}" for c in CHIPS]
    raise UsageError(
        f"--topology={name[:60]!r} is unknown; known: {'; '.join(known)}; several slices of a "
        "TPU, as in 2xv5p:4x4x4; more cubes of 4x4x4, sides in rising order, as v5p:4x4x12; and "
        "the cloud's name of a slice, as v5p-128"
    )


def _of_cloud_name(name: str) -> str:
    """`v5p:4x4x4` of `v5p-128` (see `Machine.cloud_name`); any other name unchanged."""
    match = re.fullmatch(f"([1-9][0-9]{{0,3}}x)?(.+-({_NUMBER}))", name)
    if match is None:
        return name
    slices, cloud, units = match[1] or "", match[2], int(match[3])
    for chip in CHIPS:
        for size in _shapes(chip, units // 2):
            if Topology("", chip, tuple(map(int, size.split("x")))).cloud_name == cloud:
                return f"{slices}{chip.name}:{size}"
    return name


def known_shapes(chip: Chip) -> tuple[str, ...]:
    """Common shapes of the slices of a TPU; () for GPUs, of which any number is possible."""
    return {0: (), 2: _FLAT, 3: _SOLID}[chip.torus]


def _shapes(chip: Chip, chips: int) -> list[str]:
    """`known_shapes`, and in 3D all slices of so many chips in cubes of 4x4x4, the most cube-like
    first: that is the one which a cloud name means, such as 4x8x12 for v5p-768, not 4x4x24
    (google/xpk, system_characteristics.py)."""
    pairs = itertools.combinations_with_replacement(range(4, 65, 4), 2) if chip.torus == 3 else ()
    cubes = ((a, b, chips // (a * b)) for a, b in pairs if chips % (4 * a * b) == 0)
    rising = sorted((shape for shape in cubes if shape[1] <= shape[2]), key=sum)
    return [*known_shapes(chip), *("x".join(map(str, shape)) for shape in rising)]


def open_topology(name: str) -> Topology:
    """`parse_topology` with devices to compile for, if a compiler for them is installed.

    Needs libtpu for TPUs and jax's CUDA plugin for GPUs, but neither TPU nor GPU; without the
    plugin a topology of GPUs has no devices. Google's metadata server is not asked, and other
    processes may use libtpu at the same time.

    Raises:
      UsageError: an unknown name.
      UserError: libtpu is not installed, or a compiler does not know the topology.
    """
    topology = parse_topology(name)
    if not topology.chip.torus:
        devices = _gpus(topology) if has_cuda_plugin() else ()
        return dataclasses.replace(topology, devices=devices)
    if not has_libtpu():
        raise UserError(f"--topology={name} needs libtpu, which is not installed: {install('tpu')}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What libtpu would ask that server for, or print errors without; no topology depends on them.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.cloud_name)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options: dict[str, Any] = {"num_slices": topology.slices}
    if topology.chip.name == "v4":  # its two cores are one device in this mode, which others lack
        options["chip_config_name"] = "megacore"
    if topology.chips == 1:  # libtpu expects four chips a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    slice_name = topology.name.removeprefix(f"{topology.slices}x")
    try:
        devices = tuple(topologies.get_topology_desc(slice_name, "tpu", **options).devices)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"libtpu does not know the topology {name}: {first_line(error)}") from None
    if len(devices) != topology.chips * topology.chip.devices:
        raise UserError(f"libtpu gives {name} {len(devices)} devices, but one per chip is expected")
    return dataclasses.replace(topology, devices=devices)


def _gpus(topology: Topology) -> tuple[jax.Device, ...]:
    shape = f"1x{topology.nodes}x{topology.chips // topology.nodes}"
    target = _target_config(topology.chip.name)
    try:
        described = topologies.get_topology_desc("", "cuda", target_config=target, topology=shape)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"jax's CUDA plugin does not compile for {topology.name}: {first_line(error)}"
        ) from None
    return tuple(described.devices)


def _target_config(chip: str) -> str:
    """A GpuTargetConfigProto in text form, with CUDA 12.8 and cuDNN 9.10; KeyError for a chip that
    is not described here."""
    major, cores, fpus, bandwidth, l2, clock, memory, shared, name = _GPU_SPECS[chip]
    name = f"NVIDIA {name}"
    feature = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.0{"a" if feature else ""}"
  cuda_compute_capability {{ major: {major}{feature} }}
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: {shared} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared - _GPU_RESERVED}
  device_memory_size: {memory} memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2}
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
