"""Memory that a thread frees is used again without asking the system for cleared pages, and
OpenBLAS has one thread."""

import subprocess
import sys

import pytest

from tests.zygote import ROOT

# Prints how many pages the system had to clear for ten blocks of 64 MiB, one after the other, in a
# thread that is not the first, as XLA's are.
PROGRAM = """
import ctypes, resource, sys, threading
from sa_jax.parallel.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def work():
    for _ in range(10):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64 << 20)))
        libc.memset(block, 1, ctypes.c_size_t(64 << 20))
        libc.free(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cleared_pages(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_freed_memory_is_kept():
    given_back, kept = cleared_pages("default"), cleared_pages("keep")
    assert kept < given_back / 5, (kept, given_back)


def test_openblas_has_one_thread():
    """Of numpy's copy and of scipy's, which jax calls."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_info

    threads = {i["filepath"]: i["num_threads"] for i in threadpool_info() if "blas" in i["prefix"]}
    assert threads and set(threads.values()) == {1}
