"""The devices of this machine that a process may use, found without starting any."""

import importlib.util
import os
from pathlib import Path


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
