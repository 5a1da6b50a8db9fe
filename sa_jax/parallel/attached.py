"""The devices of this machine that a process may use, found without starting any."""

import os
from pathlib import Path


def visible_devices() -> tuple[str, list[str]]:
    """('GPU', 'TPU' or 'CPU', their numbers), without starting any."""
    platforms = os.environ.get("JAX_PLATFORMS", "").split(",")
    if platforms != ["cpu"]:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named not in (None, "", "-1"):  # "" and -1 hide all
            return "GPU", named.split(",")
        gpus = list(Path("/dev").glob("nvidia[0-9]*"))
        if gpus and named is None:  # CUDA counts those that are here, whatever their files' numbers
            return "GPU", [str(number) for number in range(len(gpus))]
        chips = sorted(Path("/dev").glob("accel[0-9]*")) or sorted(Path("/dev/vfio").glob("[0-9]*"))
        if chips:
            return "TPU", [str(i) for i in range(len(chips))]
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))  # macOS
    return "CPU", [str(i) for i in sorted(affinity(0))]
