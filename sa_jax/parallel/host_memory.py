"""The host's memory in runs on a CPU, where it holds what a step computes."""

import ctypes

# mallopt's parameters and what they are set to (glibc's malloc.h, `man mallopt`).
_ONE_ARENA = (-8, 1)  # M_ARENA_MAX: other threads' arenas cannot hold large blocks, and map them
_MAPPED_ABOVE = (-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
_RETURNED_ABOVE = (-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes free at the top of the heap


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed, for the next step, instead of giving it back to the system.

    A training step on CPU frees and asks for hundreds of MB; the system clears each page anew, a
    third of the toy's step. Must run before jax starts its threads. Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (_ONE_ARENA, _MAPPED_ABOVE, _RETURNED_ABOVE):
            mallopt(parameter, value)
