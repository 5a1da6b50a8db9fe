"""A Slurm of this machine alone, and shellcheck, for the tests of what is submitted to it."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.zygote import ROOT

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def check_shell(script: str, *flags: str) -> None:
    """shellcheck has nothing to say of the script."""
    command = [SHELLCHECK, "--shell=bash", *flags, "-"]
    done = subprocess.run(command, cwd=ROOT, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@dataclasses.dataclass(frozen=True)
class Slurm:
    env: Mapping[str, str]

    def queue(self, *flags: str) -> list[str]:
        """What squeue prints of the jobs, an element of an array a line."""
        done = subprocess.run(
            ["squeue", "--noheader", "--array", *flags],
            **{"env": self.env, "capture_output": True, "text": True},
        )
        return done.stdout.split()

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline, self.queue()
            time.sleep(0.1)


@pytest.fixture
def slurm(tmp_path):
    """A cluster of this machine, with Debian's packages slurmctld, slurmd and munge."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root, and Slurm: apt-get install slurmctld slurmd slurm-client munge")
    folder = tmp_path / "slurm"
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    os.chmod(tmp_path, 0o755)
    (folder / "key").write_bytes(os.urandom(1024))
    os.chmod(folder / "key", 0o400)
    host = socket.gethostname().partition(".")[0]
    config = folder / "slurm.conf"
    config.write_text(
        f"ClusterName=test\nSlurmctldHost={host}\nSlurmUser=root\nSlurmdUser=root\n"
        f"AuthInfo=socket={folder}/munge/socket\nStateSaveLocation={folder}/state\n"
        f"SlurmdSpoolDir={folder}/spool\nSlurmctldPidFile={folder}/ctld.pid\n"
        f"SlurmdPidFile={folder}/d.pid\nSlurmctldPort=26817\nSlurmdPort=26818\n"
        "ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nSelectType=select/cons_tres\n"
        "SelectTypeParameters=CR_Core\nJobAcctGatherType=jobacct_gather/none\nMpiDefault=none\n"
        f"ReturnToService=2\nNodeName={host} CPUs={os.cpu_count()}\n"
        f"PartitionName=all Nodes={host} Default=YES State=UP\n"
    )
    munge = [
        *("munged", "--foreground", "--force", f"--key-file={folder}/key"),
        *(f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid"),
        *(f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"),
    ]
    env = {**os.environ, "SLURM_CONF": str(config)}
    daemons = []
    for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
        daemons.append(
            subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        time.sleep(2)
    yield Slurm(env)
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(20)
        daemon.kill()
