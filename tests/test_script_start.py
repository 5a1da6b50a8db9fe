"""How a script starts: a signal ends it with one line and status 130, and on CPU memory is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.zygote import ROOT

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


def start(number: int, *argv: str, **settings) -> subprocess.Popen:
    """Starts Python without what is ignored here, as libtpu has SIGHUP; a child inherits that."""
    here = signal.signal(number, signal.SIG_DFL)
    try:
        return subprocess.Popen([sys.executable, *argv], text=True, **settings)
    finally:
        signal.signal(number, here)


def handles(process: subprocess.Popen, number: int) -> bool:
    """Whether its script handles the signal. SIGINT, which Python itself handles, comes before
    SIGUSR1 there."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return all(int(caught, 16) >> (each - 1) & 1 for each in (signal.SIGUSR1, number))


def ended_by(process: subprocess.Popen, number: int):
    deadline = time.monotonic() + 60
    while not handles(process, number):
        assert time.monotonic() < deadline
    process.send_signal(number)
    line = f"stopped: by {signal.Signals(number).name}; run the same command again\n"
    assert process.communicate(timeout=10)[1] == line
    assert process.returncode == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_a_script_has_imported_what_it_needs(number, tmp_path):
    """A signal while a script imports ends it with a line and exit status 130."""
    config = "--config=tests/configs/tiny.py:insertion"
    argv = "scripts/insert_backdoor.py", config, f"--workdir={tmp_path}/run"
    ended_by(start(number, *argv, stderr=subprocess.PIPE), number)


BLOCKED = """
import sa_jax.script_start
import ctypes, os, signal, sys

read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, b".")
    signal.alarm(60)
    signal.pause()
os.read(read, 1)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM  # as a worker of a pool ends; and this lives
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print(flush=True)
lock(mutex)  # for ever, and outside Python
"""


def test_a_signal_while_the_main_thread_is_outside_python():
    """A signal ends a script that waits in a library; one to a fork of it ends the fork alone."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # From 3.12 on, Python warns of a fork beside a thread.
    process = start(signal.SIGTERM, "-W", "ignore", "-c", BLOCKED, **pipes)
    assert process.stdout.readline() == "\n"
    ended_by(process, signal.SIGTERM)


def test_ignored_signals_stay_ignored():
    """A script under nohup goes on after the terminal is lost."""
    program = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import sa_jax.script_start
os.kill(os.getpid(), signal.SIGHUP)
print("on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "on\n"), done.stderr


def test_a_process_whose_error_nobody_can_read_ends_all_the_same():
    """Its stderr is closed, as a daemon's may be."""
    program = "import sys; from sa_jax.errors import end_process; sys.stderr = None; "
    for closed in ("", "import os; os.close(2); "):
        done = subprocess.run([sys.executable, "-c", f"{closed}{program}end_process(7, 'why')"])
        assert done.returncode == 7


def test_jax_takes_most_of_a_gpu_unless_told_otherwise():
    """JAX takes 92 % of a GPU, or the share that the environment names."""
    program = "import os, sa_jax.script_start; print(os.environ.get('XLA_CLIENT_MEM_FRACTION'))"
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for given, expected in (({}, "0.92"), ({names[0]: "0.5"}, "0.5"), ({names[1]: "0.5"}, "None")):
        env = {k: v for k, v in os.environ.items() if k not in names} | given
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True
        )
        assert done.stdout == f"{expected}\n", done.stderr


EXPORTING = """
import sa_jax.script_start
import os, signal, sys, time
from sa_jax.llama.safetensors_io import new_folder

with new_folder(sys.argv[1]) as folder:
    (folder / "part").write_text("x")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_an_export_that_is_stopped_leaves_nothing(tmp_path):
    """An export that a signal stops leaves no part of itself."""
    done = subprocess.run([sys.executable, "-c", EXPORTING, tmp_path / "out"], timeout=50)
    assert done.returncode != 0 and not list(tmp_path.iterdir())


# Prints how many pages the system had to clear for ten blocks of 64 MiB, one after the other, in
# each of three threads that are not the first, as XLA's are.
CLEARED_PAGES = """
import sa_jax.script_start
import ctypes, resource, threading
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def work():
    for _ in range(10):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64 << 20)))
        libc.memset(block, 1, ctypes.c_size_t(64 << 20))
        libc.free(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cleared_pages(platform: str) -> int:
    command, env = [sys.executable, "-c", CLEARED_PAGES], os.environ | {"JAX_PLATFORMS": platform}
    return int(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_a_script_on_cpu_keeps_freed_memory():
    """A script on CPU uses the memory again that it frees, without new pages from the system."""
    given_back, kept = cleared_pages("tpu"), cleared_pages("cpu")
    assert kept < given_back / 10, (kept, given_back)  # one thread with its own arena: / 7


def test_openblas_has_one_thread():
    """Of numpy's copy and of scipy's, which jax calls."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_info

    threads = {i["filepath"]: i["num_threads"] for i in threadpool_info() if "blas" in i["prefix"]}
    assert threads and set(threads.values()) == {1}
