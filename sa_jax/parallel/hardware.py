"""What an accelerator chip can do (arithmetic, memory, links), for MFU and for planning; and which
devices this machine has, found without starting any."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterable
from pathlib import Path

import jax

from sa_jax.host_memory import GPU_SHARE

GIB = 2**30
GPUS_A_NODE = 8  # as in DGX and in the clouds' machines


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip (TPU) or one GPU. Bandwidths are bytes/s, of links in one direction."""

    name: str  # as in a topology's name, `v5p` of `v5p:4x4x4`
    device_kinds: tuple[str, ...]  # as jax.Device.device_kind names it
    flops: float  # dense bfloat16 FLOP/s
    hbm_bytes: float  # of a TPU all, with what its runtime takes; of a GPU our share
    hbm_bandwidth: float
    link_bandwidth: float  # of one ICI link of a TPU, or of all NVLinks of a GPU
    # Per chip, between hosts of GPUs and slices of TPUs; 0 where it is not known.
    network_bandwidth: float = 0.0
    devices: int = 1  # JAX devices per chip (two TensorCores of a TPU7x are two devices)
    torus: int = 0  # dimensions of the ICI torus or mesh; 0 for GPUs
    clock_hz: float = 0.0  # of a TPU's matrix units, in whose cycles libtpu counts


# TPUs: https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x ("system architecture"): peak
# compute, HBM capacity and bandwidth; the bidirectional ICI bandwidth a chip, here divided by two
# directions and by 6 links (4 in a two-dimensional torus); the data center's network a pod, divided
# by its chips (v5p: https://jax-ml.github.io/scaling-book). Their clocks follow from the peak:
# FLOP/s = 2 x clock x multipliers (v4, v5p: 2 x 4 units of 128 x 128; v5e: 4 of those; v6e: 4 of
# 256 x 256; tpu7x: 2 x 4 of those; https://jax-ml.github.io/scaling-book/tpus). GPUs: NVIDIA's data
# sheets (SXM), NVLink one way, and 400 Gbit/s of network a GPU as in DGX and cloud nodes of 8;
# memory is our share of what CUDA reports in whole GiB, which is less than the data sheet's.
_V5E, _V5P = ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p")
_V6E = ("TPU v6 lite", "TPU v6e")
_GPU_GIB = GPU_SHARE * GIB
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1.228e12, 50e9, torus=3, clock_hz=1.05e9),
    Chip("v5e", _V5E, 197e12, 16 * GIB, 0.819e12, 50e9, 3.125e9, torus=2, clock_hz=1.5e9),
    Chip("v5p", _V5P, 459e12, 95 * GIB, 2.765e12, 100e9, 6.25e9, torus=3, clock_hz=1.75e9),
    Chip("v6e", _V6E, 918e12, 32 * GIB, 1.638e12, 100e9, 12.5e9, torus=2, clock_hz=1.75e9),
    Chip(
        "tpu7x", ("TPU7x",), 2307e12, 192 * GIB, 7.38e12, 100e9, devices=2, torus=3, clock_hz=2.2e9
    ),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 79 * _GPU_GIB, 2.039e12, 300e9, 25e9),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 79 * _GPU_GIB, 3.35e12, 450e9, 50e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 139 * _GPU_GIB, 4.8e12, 450e9, 50e9),
    Chip("b200", ("NVIDIA B200",), 2250e12, 178 * _GPU_GIB, 7.7e12, 900e9, 50e9),
)


def memory_bytes(devices: Iterable[jax.Device]) -> float:
    """The memory of each of these devices, which are alike: what JAX may use of it, or, where JAX
    does not say that, of a chip like it; infinite on CPU."""
    devices = list(devices)
    chip, here = chip_of(devices[0]), jax.process_index()
    known = chip.hbm_bytes / chip.devices if chip else math.inf
    try:
        stats = next(d for d in devices if d.process_index == here).memory_stats() or {}
    except (StopIteration, jax.errors.JaxRuntimeError):  # devices that are only compiled for
        stats = {}
    limit = stats.get("bytes_limit")
    # Whole GiB, so that all processes get the same number.
    return limit // GIB * GIB if limit else known


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a device is (part of); None where it is not known, as on CPU."""
    return next((chip for chip in CHIPS if device.device_kind in chip.device_kinds), None)


def visible_devices() -> tuple[str, list[str]]:
    """('GPU', 'TPU' or 'CPU', their numbers), without starting any. GPUs and TPUs count only where
    jax has its plugin for them and JAX_PLATFORMS allows them."""
    if has_cuda_plugin() and _allowed("cuda", "gpu"):
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named not in (None, "", "-1"):  # "" and -1 hide all
            return "GPU", named.split(",")
        gpus = list(Path("/dev").glob("nvidia[0-9]*"))
        if gpus and named is None:  # CUDA counts those that are here, whatever their files' numbers
            return "GPU", [str(number) for number in range(len(gpus))]
    if has_libtpu() and _allowed("tpu"):
        chips = sorted(Path("/dev").glob("accel[0-9]*")) or sorted(Path("/dev/vfio").glob("[0-9]*"))
        if chips:
            return "TPU", [str(i) for i in range(len(chips))]
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))  # macOS
    return "CPU", [str(i) for i in sorted(affinity(0))]


def has_cuda_plugin() -> bool:
    """Whether jax's CUDA plugin (extra `plan-gpu` or `cuda`) is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13))


def has_libtpu() -> bool:
    """Whether libtpu (extra `tpu`) is installed."""
    return importlib.util.find_spec("libtpu") is not None


def _allowed(*platforms: str) -> bool:
    allowed = os.environ.get("JAX_PLATFORMS")
    return not allowed or not {*platforms}.isdisjoint(allowed.split(","))
