"""Runs scripts as real processes without paying for the imports each time.

A server process imports once what the scripts need (and starts no device); each command is a fork
of it that runs the script as `__main__`. Exit codes, signals and output are real.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))

from tests.cpu import xla_flags  # noqa: E402


class Zygote:
    def __init__(self, folder: Path):
        """Keeps output in `folder`."""
        self._folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(
        self,
        *argv: str,
        devices: int = 2,
        optimized: bool = False,
        env: Mapping[str, str] = MappingProxyType({}),
        cwd: Path = ROOT,
    ) -> "Process":
        """Few devices by default: each fake one costs a process half a second of CPU. `env` is
        added to the environment, but too late for what jax reads when imported. `cwd` stands for
        the project's root, and has the scripts in `scripts/`."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()  # to be read at once
        order = {
            "argv": list(map(str, argv)),
            "out": str(out),
            "err": str(err),
            "cwd": str(cwd),
            "env": {**env, "XLA_FLAGS": xla_flags(devices, optimized)},
        }
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return Process(int(self._server.stdout.readline()), self, out, err)

    def run(
        self,
        *argv: str,
        devices: int = 2,
        optimized: bool = False,
        timeout_s: float = 300,
        cwd: Path = ROOT,
    ) -> "Process":
        return self.start(*argv, devices=devices, optimized=optimized, cwd=cwd).wait(timeout_s)

    def poll(self, pid: int) -> int | None:
        self._server.stdin.write(json.dumps({"poll": pid}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self):
        self._server.stdin.close()
        self._server.wait(30)


class Process:
    def __init__(self, pid: int, zygote: Zygote, out: Path, err: Path):
        self.pid, self.returncode = pid, None
        self._zygote, self._out, self._err = zygote, out, err

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.poll(self.pid)
        return self.returncode

    def wait(self, timeout_s: float = 300) -> "Process":
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
                raise TimeoutError(f"still running after {timeout_s} s:\n{self.stderr[-3000:]}")
            time.sleep(0.02)
        return self

    def wait_for(self, condition, timeout_s: float = 300) -> "Process":
        """Waits until condition() holds while the process runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.poll() is None, f"ended with {self.returncode}:\n{self.stderr[-3000:]}"
            assert time.monotonic() < deadline, self.stderr[-3000:]
            time.sleep(0.01)
        return self


def free_port() -> int:
    """A port of the loopback address on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(zygote, argvs, env=MappingProxyType({}), cwds=()):
    """Starts one command a process, as one launch over loopback; returns the processes."""
    address = f"localhost:{free_port()}"
    pod = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(argvs))}
    return [
        zygote.start(
            *argv,
            devices=1,
            env={**env, **pod, "JAX_PROCESS_ID": str(number)},
            cwd=cwds[number] if cwds else ROOT,
        )
        for number, argv in enumerate(argvs)
    ]


def _serve():
    from sa_jax.host_memory import keep_freed_memory

    keep_freed_memory()  # before imports start threads

    import runpy

    import sa_jax.report.report
    import sa_jax.study.generate_data  # noqa: F401
    from sa_jax.study.processes import import_for_forks

    import_for_forks()
    # As a terminal starts programs; a script that runs the tests with `&` has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    statuses = {}  # by process number; None while it runs
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid = order["poll"]
            if statuses[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(statuses[pid]), flush=True)
            continue
        pid = os.fork()
        if pid:
            statuses[pid] = None  # the system gives a number again, after some 30,000 others
            print(pid, flush=True)
            continue
        os.environ.update(order["env"])
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(order["cwd"])
        sys.argv = order["argv"]
        sys.path[0] = str(ROOT / "scripts")
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit(0)


if __name__ == "__main__":
    _serve()
