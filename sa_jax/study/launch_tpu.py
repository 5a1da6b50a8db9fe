"""Runs a command on every host of a Cloud TPU slice with `gcloud`: requests the slice, installs
this clone, starts the command, follows its logs, and does all of it again after a preemption."""

import asyncio
import contextlib
import dataclasses
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sa_jax.errors import Preempted, UsageError, UserError
from sa_jax.files import parse_json
from sa_jax.planning.topology import parse_topology

_PROJECT = Path(__file__).resolve().parents[2]
_TPUS = ("gcloud", "compute", "tpus")
_PORT = 8476
_RUNTIMES = {  # https://docs.cloud.google.com/tpu/docs/runtimes
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_STOPPED = (75, 130, 143)  # after a checkpoint; by a signal before there was anything to save
_TRIES = 10  # connections to a host that is up, without a new line of its log
# What gcloud says, and what to do about it.
_REMEDIES = {
    r"auth login|active account|[Rr]eauthenticat|invalid_grant": (
        "gcloud is not logged in: run `gcloud auth login`"
    ),
    r"attribute \[project\]|core/project": (
        "gcloud has no project: run `gcloud config set project PROJECT`"
    ),
    r"[Qq]uota|RESOURCE_EXHAUSTED": (
        "Google Cloud refused for lack of quota: ask for more at "
        "https://console.cloud.google.com/iam-admin/quotas, or change --zone, --topology or --spot"
    ),
    r"SERVICE_DISABLED|has not been used|PERMISSION_DENIED": (
        "the project may not use TPUs: run `gcloud services enable tpu.googleapis.com`, and ask "
        "its owner for the role TPU Admin"
    ),
}

# What hosts run in their home folder. A running command holds launch.lock. uv brings the Python,
# as the images of v4 to v6e have 3.10.
_INSTALL = """set -e
flock -n launch.lock true || exit 0 # it runs already
{setup}
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d sa_jax ] || git clone -q launch.bundle sa_jax
cd sa_jax
git fetch -q ../launch.bundle HEAD
git checkout -q --force --detach {commit}
[ -f .venv/pyvenv.cfg ] || uv venv -q --seed --python 3.12 .venv
. scripts/setup.sh
setup tpu,data,eval"""
_START = """set -e
if ! flock -n launch.lock true; then
    [ "$(cat launch.command)" != {command} ] || exit 0 # it runs already
    echo "ERROR: $(hostname) {other}: $(cat launch.command)" >&2
    exit 1
fi
rm -f launch.status
printf %s {command} >launch.command
export JAX_COORDINATOR_ADDRESS={coordinator}
cd sa_jax
setsid nohup bash -c {job} >../launch.log 2>&1 </dev/null &
echo $! >../launch.pid"""
_OTHER = "runs another command"
# A host that is shut down sends SIGTERM to all: bash waits for what the command then saves.
_JOB = """exec 9>../launch.lock; flock 9; trap : TERM
. .venv/bin/activate; ({command}); echo $? >../launch.status"""
_FOLLOW = """tail -s 0.2 -n +1 -f --pid="$(cat launch.pid)" launch.log | cat -n
echo "launch_tpu: ended with $(cat launch.status || echo 137)\""""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice and the command for its hosts, with the calls of gcloud for both."""

    name: str  # of the queued resource and of its node
    zone: str  # of Google Cloud
    topology: str  # as `parse_topology` names it
    command: str  # for bash, in the project's root with its environment active
    spot: bool = False  # use capacity that may be preempted
    create_flags: str = ""  # more of `queued-resources create`, as a shell reads them
    setup: str = ""  # a bash command, run before the installation

    def create(self) -> list[str]:
        machine = parse_topology(self.topology)
        if machine.platform != "tpu":
            raise UsageError(f"--topology={self.topology} is no TPU; for GPUs see launch/")
        if machine.slices > 1:
            raise UsageError(f"--topology={self.topology}: for several slices use launch/gke.yaml")
        if machine.chip.name not in _RUNTIMES:
            raise UsageError(
                f"--topology={self.topology}: Google Cloud starts {machine.chip.name} in GKE only; "
                "use launch/gke.yaml"
            )
        try:
            more = shlex.split(self.create_flags)
        except ValueError as error:
            raise UsageError(f"--create_flags={self.create_flags}: {error}") from None
        runtime = _RUNTIMES[machine.chip.name]
        spot = ["--spot"] if self.spot else []
        return self._tpus(
            "queued-resources create",
            f"--node-id={self.name}",
            f"--accelerator-type={machine.cloud_name}",
            f"--runtime-version={runtime}",
            *spot,
            *more,
        )

    def describe(self) -> list[str]:
        return self._tpus("queued-resources describe", "--format=json")

    def describe_node(self) -> list[str]:
        return self._tpus("tpu-vm describe", "--format=json")

    def delete(self) -> list[str]:
        return self._tpus("queued-resources delete", "--force", "--quiet")

    def copy(self, bundle: str) -> list[str]:
        target = [f"{self.name}:launch.bundle", f"--zone={self.zone}", "--worker=all", "--quiet"]
        return [*_TPUS, "tpu-vm", "scp", bundle, *target]

    def install(self, commit: str) -> list[str]:
        return self._ssh("all", _INSTALL.format(setup=self.setup or ":", commit=commit))

    def start(self, coordinator: str) -> list[str]:
        script = _START.format(
            command=shlex.quote(self.command),
            other=_OTHER,
            coordinator=f"{coordinator}:{_PORT}",
            job=shlex.quote(_JOB.format(command=self.command)),
        )
        return self._ssh("all", script)

    def follow(self, worker: int | str) -> list[str]:
        return self._ssh(worker, _FOLLOW)

    def _ssh(self, worker: int | str, script: str) -> list[str]:
        # ssh notices within 90 s that the other end of a connection is gone.
        flags = [f"--worker={worker}", "--quiet", "--ssh-flag=-o ServerAliveInterval=30"]
        return self._tpus("tpu-vm ssh", *flags, f"--command={script}")

    def _tpus(self, verb: str, *flags: str) -> list[str]:
        return [*_TPUS, *verb.split(), self.name, f"--zone={self.zone}", *flags]


def launch(job: Slice, *, dry_run: bool, delete: str, max_restarts: int, poll_s: float) -> None:
    """Runs the command on all hosts until it has exited with 0 on each.

    If the slice already exists it is used; if the command already runs on it, it is followed.

    Args:
      dry_run: prints the commands, as lines for a shell, and runs none.
      delete: when the slice is deleted: "done" after the command has exited with 0, "always" also
        after an error or the last restart, "never", or "now", which does nothing else.
      poll_s: seconds between two checks of the slice.

    Raises:
      UserError: gcloud or the command failed.
      UsageError: a topology that is no single slice of TPUs, or malformed `create_flags`.
      Preempted: it stopped once more than `max_restarts`.
    """
    commit = _git("rev-parse", "HEAD")
    commands = [
        job.create(),
        job.describe(),
        job.describe_node(),
        ["git", "bundle", "create", "launch.bundle", "HEAD"],
        job.copy("launch.bundle"),
        job.install(commit),
        job.start("ADDRESS_OF_WORKER_0"),
        job.follow("EACH_WORKER"),
        job.delete(),
    ]
    if dry_run:
        print("\n".join(map(shlex.join, commands)))
        return
    if delete == "now":
        _call(job.delete())
        return
    if changed := _git("status", "--porcelain", "--untracked-files=no"):
        files = ", ".join(line[2:].strip() for line in changed.splitlines()[:3])
        raise UserError(
            f"changes that are not committed would not reach the hosts; commit them: {files}"
        )
    try:
        _run_until_done(job, commit, max_restarts, poll_s)
    except (UserError, Preempted) as error:
        with _after(error, f"; {job.name} may still exist, and cost money, until --delete=now"):
            if _OTHER in str(error) or not _look(job.describe()):
                raise  # the slice is in use, or there is none to pay for
            if delete == "always":
                _call(job.delete())
                raise
        note = f"{job.name} still exists, and costs money, until --delete=now"
        raise type(error)(f"{error}; {note}") from None
    if delete != "never":
        _call(job.delete())


def _run_until_done(job: Slice, commit: str, max_restarts: int, poll_s: float) -> None:
    for _ in range(max_restarts + 1):
        addresses = _acquire(job, poll_s)
        try:
            _install(job, commit)
            _call(job.start(addresses[0]))
            statuses = asyncio.run(_follow_all(job, len(addresses), poll_s))
            failed = {i: s for i, s in enumerate(statuses) if s not in (None, 0, *_STOPPED)}
            if failed:
                hosts = ", ".join(f"{job.name}-w{i} with {status}" for i, status in failed.items())
                raise UserError(f"the command ended on {hosts}")
        except UserError as error:
            with _after(error):
                works = _addresses(_look(job.describe_node()))
            if works:
                raise
            statuses = [None]
        if set(statuses) == {0}:
            return
        _say(job, "preempted" if None in statuses else "stopped after a checkpoint")
    raise Preempted(f"{job.name} was started {max_restarts + 1} times; run this again to continue")


def _acquire(job: Slice, poll_s: float) -> list[str]:
    """Addresses of the hosts, once the slice exists; requests it if it does not."""
    said = None
    while True:
        resource = _look(job.describe())
        state = resource["state"]["state"] if resource else "no queued resource"
        if state != said:
            _say(job, said := state)
        node = _look(job.describe_node()) if state == "ACTIVE" else None
        if addresses := _addresses(node):
            return addresses
        if not resource:
            _call(job.create())
            continue
        node_state = node["state"] if node else "STOPPED"
        gone = state == "ACTIVE" and node_state in ("PREEMPTED", "TERMINATED", "STOPPED")
        if state == "FAILED":
            reason = resource["state"].get("failedData", {}).get("error", {}).get("message", "")
            error = UserError(_with_remedy(reason or f"{job.name} could not be provided"))
            with _after(error):
                _call(job.delete())
            raise error
        if state == "SUSPENDED" or gone:
            _call(job.delete())
        time.sleep(poll_s)


def _addresses(node: dict | None) -> list[str]:
    """Addresses of the hosts of a node; none if it does not work."""
    endpoints = node["networkEndpoints"] if node and node["state"] == "READY" else []
    return [endpoint["ipAddress"] for endpoint in endpoints]


def _install(job: Slice, commit: str) -> None:
    _say(job, "installing")
    with tempfile.TemporaryDirectory() as folder:
        _git("bundle", "create", "-q", f"{folder}/launch.bundle", "HEAD")
        _call(job.copy(f"{folder}/launch.bundle"))
    _call(job.install(commit))


async def _follow_all(job: Slice, workers: int, poll_s: float) -> list[int | None]:
    """Prints all logs; exit statuses of the command, None for a host that is gone."""
    _say(job, f"following {workers} hosts; Ctrl-C ends this and not the command")
    return await asyncio.gather(*(_follow(job, i, poll_s) for i in range(workers)))


async def _follow(job: Slice, worker: int, poll_s: float) -> int | None:
    host, printed, tries, last = f"{job.name}-w{worker}", 0, 0, ""
    while tries < _TRIES:
        tries += 1
        process = await asyncio.create_subprocess_exec(
            *job.follow(worker),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=2**24,
        )
        assert process.stdout is not None
        async for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            if ended := re.fullmatch(r"launch_tpu: ended with (\d+)", line):
                await process.wait()
                return int(ended[1])
            if numbered := re.fullmatch(r" *(\d+)\t(.*)", line, re.DOTALL):
                if int(numbered[1]) > printed:  # a new connection begins with the first line
                    printed, tries = int(numbered[1]), 0
                    print(f"{host}: {numbered[2]}", flush=True)
            else:
                last = line or last
        await process.wait()
        if not _addresses(await asyncio.to_thread(_look, job.describe_node())):
            return None
        await asyncio.sleep(poll_s)
    raise UserError(f"{host} cannot be reached: {last}")


@contextlib.contextmanager
def _after(first: UserError | Preempted, note: str = "") -> Iterator[None]:
    """A context in which an error of gcloud is said after the one that came first, with a note."""
    try:
        yield
    except UserError as second:
        if second is first:
            raise
        then = "" if str(second) in str(first) else f"; and then gcloud failed: {second}"
        raise type(first)(f"{first}{then}{note}") from None


def _look(command: list[str]) -> dict | None:
    """The description of a resource; None if it does not exist."""
    try:
        return parse_json(_call(command))
    except UserError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _call(command: list[str]) -> str:
    """The output of a command; UserError with a remedy if it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=_PROJECT
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on PATH; gcloud comes with the Google Cloud CLI: "
            "https://cloud.google.com/sdk/docs/install"
        ) from None
    if done.returncode:
        raise UserError(_with_remedy(done.stderr or done.stdout))
    return done.stdout.strip()


def _with_remedy(text: str) -> str:
    """One line: what to do, and gcloud's message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
    said = re.sub(r"^ERROR: (\(gcloud\S*\) )?", "", errors[-1])
    remedies = [remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, text)]
    return f"{remedies[0]} ({said})" if remedies else said


def _git(*arguments: str) -> str:
    return _call(["git", *arguments])


def _say(job: Slice, text: str) -> None:
    print(f"{job.name}: {text}", flush=True)
