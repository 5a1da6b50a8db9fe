"""The host's memory in runs on a CPU, where a step's arrays are in it; JAX's share of a GPU's."""

import ctypes
import os

# mallopt's parameters and what they are set to (glibc's malloc.h, `man mallopt`).
_ONE_ARENA = (-8, 1)  # M_ARENA_MAX: other threads' arenas cannot hold large blocks, and map them
_MAPPED_ABOVE = (-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
_MAPPED_ABOVE_AT_MOST = (-3, 1 << 25)  # the most that an older glibc takes; it answers 0 to more
_RETURNED_ABOVE = (-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes free at the top of the heap

GPU_SHARE = 0.92  # the rest is for CUDA, NCCL and cuDNN; JAX's own default is 0.75


def use_most_of_a_gpu() -> None:
    """Lets JAX take 92 % of a GPU's memory, as plans assume, unless the environment names another
    share. Must run before JAX is imported."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX refuses both
    if not any(os.environ.get(name) for name in names):
        os.environ[names[0]] = str(GPU_SHARE)


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for the next step, instead of returning it to the system.

    A training step on CPU frees and allocates hundreds of MB, and the system clears each new page,
    which takes up to a third of the toy's step. Must run before the process, or the one that it is
    a fork of, has a second thread: a thread of XLA may take over that thread's arena. Does nothing
    without glibc, or where JAX_PLATFORMS is not "cpu".
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and os.environ.get("JAX_PLATFORMS") == "cpu":
        mallopt(*_ONE_ARENA)
        if not mallopt(*_MAPPED_ABOVE):
            mallopt(*_MAPPED_ABOVE_AT_MOST)
        mallopt(*_RETURNED_ABOVE)
