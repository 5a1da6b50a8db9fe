"""Launching on a TPU slice: a `gcloud` that keeps a slice of two hosts in folders of this machine,
runs there what it is told to, and can refuse, preempt and lose connections."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from sa_jax.errors import Preempted, UsageError, UserError
from sa_jax.study import launch_tpu
from sa_jax.study.launch_tpu import Slice, launch

# The state is files: `resource` and `node` hold states, w0 and w1 are the homes of the hosts.
GCLOUD = """#!{python} -SE
import json, os, pathlib, shutil, subprocess, sys, time
world = pathlib.Path({world!r})
with open(world / "log", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
flags = dict(word.partition("=")[::2] for word in sys.argv if word.startswith("--"))
words = [word for word in sys.argv[3:] if not word.startswith("--")]
resource, node = world / "resource", world / "node"

def fail(text):
    sys.exit(f"ERROR: (gcloud.compute.tpus) {{text}}")

def once(name):
    try:
        (world / name).unlink()
        return True
    except FileNotFoundError:
        return False

if (world / "refuse").exists():
    fail((world / "refuse").read_text())
match words[:2]:
    case ["queued-resources", "create"]:
        resource.write_text("WAITING_FOR_RESOURCES")
    case ["queued-resources", "describe"]:
        if not resource.exists():
            fail("NOT_FOUND: Resource 'x' was not found.")
        state = {{"state": resource.read_text()}}
        if state["state"] == "FAILED":
            state["failedData"] = {{"error": {{"message": "Quota limit TPUs has been exceeded"}}}}
        print(json.dumps({{"state": state}}))
        if state["state"] == "WAITING_FOR_RESOURCES":
            if once("fail"):
                resource.write_text("FAILED")
            else:
                resource.write_text("ACTIVE")
                node.write_text("READY")
                for home in ("w0", "w1"):
                    (world / home).mkdir()
    case ["queued-resources", "delete"]:
        resource.unlink()
        node.unlink(missing_ok=True)
        for home in ("w0", "w1"):
            shutil.rmtree(world / home, ignore_errors=True)
    case ["tpu-vm", "describe"]:
        if not node.exists():
            fail("NOT_FOUND: Resource 'x' was not found.")
        ends = [{{"ipAddress": f"10.0.0.{{i}}"}} for i in (1, 2)]
        print(json.dumps({{"state": node.read_text(), "networkEndpoints": ends}}))
    case ["tpu-vm", "scp"]:
        for home in ("w0", "w1"):
            shutil.copy(words[2], world / home / words[3].partition(":")[2])
    case ["tpu-vm", "ssh"]:
        print("tpu-vm ssh: Attempting to connect to worker ...", file=sys.stderr)
        worker = flags["--worker"]
        if worker == "0":
            once("hold")
        for i in "01" if worker == "all" else worker:
            home = world / f"w{{i}}"
            command = ["bash", "-c", flags["--command"]]
            ssh = subprocess.Popen(command, cwd=home, env={{**os.environ, "HOME": str(home)}})
            if worker == "1" and (world / "preempt").exists():
                while not (world / "runs").exists():
                    time.sleep(0.05)
                node.write_text("PREEMPTED")
                resource.write_text("SUSPENDED")
                os.remove(world / "preempt")
            while ssh.poll() is None:
                lost = worker == "0" and (world / "runs").exists() and once("lose")
                if lost or not node.exists() or node.read_text() != "READY":
                    time.sleep(0.2)
                    ssh.kill()
                    sys.exit(255)
                time.sleep(0.02)
            if ssh.returncode:
                sys.exit(ssh.returncode)
"""
# Says which run it is, and ends with that number in the list of statuses of its host.
JOB = """host=$(basename "$(dirname "$PWD")")
echo "$host $JAX_COORDINATOR_ADDRESS" >>{world}/runs
count=$(grep -c "^$host" {world}/runs)
echo "run $count"
sleep 0.3
while [ -e {world}/hold ]; do sleep 0.05; done
exit "$(cut -d ' ' -f "$count" {world}/$host.statuses)"
"""
UV = '#!/bin/sh\nmkdir -p .venv/bin && echo "$*" >.venv/pyvenv.cfg && echo : >.venv/bin/activate\n'


class World:
    def __init__(self, folder):
        self.folder = folder
        for name, text in {"gcloud": GCLOUD, "uv": UV}.items():
            tool = folder / "bin" / name
            tool.parent.mkdir(exist_ok=True)
            tool.write_text(
                text.format(python=sys.executable, world=str(folder)) if name == "gcloud" else text
            )
            tool.chmod(0o755)
        project = folder / "project"
        (project / "scripts").mkdir(parents=True)
        (project / "scripts/setup.sh").write_text('setup() { echo "$1" >installed; }\n')
        (project / "job.sh").write_text(JOB.format(world=folder))
        git = ["git", "-C", project, "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git[:3], "init", "-q"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "one"], check=True)

    def statuses(self, w0: str, w1: str) -> None:
        (self.folder / "w0.statuses").write_text(w0)
        (self.folder / "w1.statuses").write_text(w1)

    @property
    def calls(self) -> list[str]:
        """What gcloud was asked for, without looks at the slice."""
        calls = map(json.loads, (self.folder / "log").read_text().splitlines())
        return [call[3] for call in calls if call[3] != "describe"]

    @property
    def runs(self) -> list[str]:
        return sorted((self.folder / "runs").read_text().splitlines())


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = World(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(launch_tpu, "_PROJECT", tmp_path / "project")
    return made


JOB_OF_TWO = Slice("pod", "us-east5-a", "v6e:4x4", "bash job.sh", spot=True, setup="touch mounted")
FAST = {"dry_run": False, "delete": "done", "max_restarts": 5, "poll_s": 0.02}


def test_a_command_goes_on_after_a_preemption_and_a_checkpoint(world, capsys):
    world.statuses("0 75 0", "0 75 0")
    (world.folder / "preempt").touch()
    launch(JOB_OF_TWO, **FAST)
    assert world.runs == ["w0 10.0.0.1:8476"] * 3 + ["w1 10.0.0.1:8476"] * 3
    round_of_two = ["scp", "ssh", "ssh", "ssh", "ssh"]  # copy, install, start, a log for each host
    assert world.calls == [
        *("create", *round_of_two),
        *("delete", "create", *round_of_two, *round_of_two, "delete"),
    ]
    lines = capsys.readouterr().out.splitlines()
    logs = [line for line in lines if line.startswith("pod-w1: ")]
    assert logs[-2:] == ["pod-w1: run 2", "pod-w1: run 3"]
    assert [line for line in lines if "preempted" in line or "stopped" in line] == [
        "pod: preempted",
        "pod: stopped after a checkpoint",
    ]


def test_a_lost_connection_repeats_no_line_and_starts_nothing(world, capsys):
    world.statuses("0", "0")
    (world.folder / "lose").touch()
    launch(JOB_OF_TWO, **{**FAST, "delete": "never"})
    assert world.calls.count("ssh") == 5 and len(world.runs) == 2
    assert capsys.readouterr().out.count("pod-w0: run 1") == 1
    home = world.folder / "w0"
    assert (home / "mounted").exists()
    assert (home / "sa_jax/installed").read_text() == "tpu,data,eval\n"
    assert (home / "sa_jax/.venv/pyvenv.cfg").read_text() == "venv -q --seed --python 3.12 .venv\n"


@pytest.mark.parametrize(("delete", "kept"), [("done", True), ("always", False)])
def test_a_host_that_fails_is_named(world, delete, kept):
    world.statuses("0", "1")
    with pytest.raises(UserError, match="ended on pod-w1 with 1") as error:
        launch(JOB_OF_TWO, **{**FAST, "delete": delete})
    assert ("--delete=now" in str(error.value)) == kept == ("delete" not in world.calls)


def test_a_command_that_runs_already_is_followed_and_no_other_one_started(world):
    world.statuses("0", "0")
    (world.folder / "hold").touch()  # until a log is followed
    subprocess.run(JOB_OF_TWO.create(), check=True)
    launch_tpu._acquire(JOB_OF_TWO, 0.02)
    launch_tpu._install(JOB_OF_TWO, launch_tpu._git("rev-parse", "HEAD"))
    launch_tpu._call(JOB_OF_TWO.start("10.0.0.1"))
    with pytest.raises(UserError, match="runs another command: bash job.sh"):
        other = Slice("pod", "us-east5-a", "v6e:4x4", "bash other.sh")
        launch(other, **{**FAST, "delete": "always"})  # and the slice stays
    launch(JOB_OF_TWO, **FAST)
    assert len(world.runs) == 2


def test_what_a_host_saves_while_it_is_shut_down_is_waited_for(tmp_path):
    (tmp_path / "sa_jax/.venv/bin").mkdir(parents=True)
    (tmp_path / "sa_jax/.venv/bin/activate").touch()
    saves = "trap 'sleep 0.5; echo saved; exit 75' TERM; touch ../on; while :; do sleep 0.02; done"
    (tmp_path / "sa_jax/job.sh").write_text(saves)
    start = Slice("pod", "z", "v6e:4x4", "bash job.sh").start("10.0.0.1")[-1]
    subprocess.run(["bash", "-c", start.removeprefix("--command=")], cwd=tmp_path, check=True)
    while not (tmp_path / "on").exists():
        time.sleep(0.02)
    os.killpg(int((tmp_path / "launch.pid").read_text()), signal.SIGTERM)
    follow = ["bash", "-c", launch_tpu._FOLLOW]
    done = subprocess.run(follow, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "launch_tpu: ended with 75" and "saved" in done.stdout


@pytest.mark.parametrize(("delete", "kept"), [("done", True), ("always", False)])
def test_restarts_end(world, delete, kept):
    world.statuses("75", "75")
    with pytest.raises(Preempted, match="started 1 times") as error:
        launch(JOB_OF_TWO, **{**FAST, "delete": delete, "max_restarts": 0})
    assert ("--delete=now" in str(error.value)) == kept == ("delete" not in world.calls)


@pytest.mark.parametrize(("delete", "kept"), [("done", True), ("always", False)])
def test_a_failed_installation_leaves_no_slice_unsaid(world, delete, kept):
    job = Slice("pod", "us-east5-a", "v6e:4x4", "bash job.sh", setup="exit 3")
    with pytest.raises(UserError) as error:
        launch(job, **{**FAST, "delete": delete})
    assert ("--delete=now" in str(error.value)) == kept == ("delete" not in world.calls)


def test_what_came_first_is_said_before_what_gcloud_then_refuses(world, monkeypatch):
    refuse = world.folder / "refuse"
    login = (
        r"; and then gcloud failed: gcloud is not logged in: .*\(no active account\); "
        "pod may still exist, and cost money, until --delete=now$"
    )
    setup = f"echo -n 'no active account' >{refuse}; exit 3"
    with pytest.raises(UserError, match=f"^tpu-vm ssh: .*{login}"):
        launch(dataclasses.replace(JOB_OF_TWO, setup=setup), **FAST)
    refuse.unlink()

    async def follow(*_):
        refuse.write_text("no active account")
        return [0, 1]

    monkeypatch.setattr(launch_tpu, "_follow_all", follow)
    with pytest.raises(UserError, match=f"^the command ended on pod-w1 with 1{login}"):
        launch(JOB_OF_TWO, **FAST)


@pytest.mark.parametrize(
    ("gcloud_says", "words"),
    [
        ("You do not currently have an active account selected.", "gcloud auth login"),
        ("Failed to find attribute [project].", "gcloud config set project"),
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUs' has been exceeded.", "iam-admin/quotas"),
        ("PERMISSION_DENIED: Cloud TPU API has not been used", "gcloud services enable"),
        ("INVALID_ARGUMENT: no such zone", "no such zone"),
    ],
)
def test_what_gcloud_refuses_is_one_line_with_the_remedy(world, gcloud_says, words):
    (world.folder / "refuse").write_text(gcloud_says)
    with pytest.raises(UserError) as error:
        launch(JOB_OF_TWO, **FAST)
    assert words in str(error.value) and gcloud_says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_slice_that_cannot_be_provided_is_an_error_and_not_kept(world):
    (world.folder / "fail").touch()
    with pytest.raises(UserError, match="iam-admin/quotas.*has been exceeded"):
        launch(JOB_OF_TWO, **FAST)
    assert world.calls == ["create", "delete"]


def test_changes_that_would_not_reach_the_hosts_are_refused(world):
    (world.folder / "project/job.sh").write_text("true")
    with pytest.raises(UserError, match="not committed .*job.sh"):
        launch(JOB_OF_TWO, **FAST)


def test_a_tpu_that_has_no_tpu_vms_is_refused():
    with pytest.raises(UsageError, match="Google Cloud starts tpu7x in GKE only; .*gke.yaml"):
        launch(Slice("pod", "z", "tpu7x:2x2x1", "true"), **{**FAST, "dry_run": True})


def test_gpus_are_refused():
    with pytest.raises(UsageError, match="h200:8 is no TPU"):
        launch(Slice("pod", "z", "h200:8", "true"), **{**FAST, "dry_run": True})


def test_several_slices_are_refused():
    with pytest.raises(UsageError, match="2xv5e:4x4: for several slices use launch/gke.yaml"):
        launch(Slice("pod", "z", "2xv5e:4x4", "true"), **{**FAST, "dry_run": True})


def test_flags_that_no_shell_can_read_are_refused():
    with pytest.raises(UsageError, match="--create_flags=': No closing quotation"):
        Slice("a", "z", "v6e:8x8", "true", create_flags="'").create()


def test_the_script_prints_the_commands_or_says_that_gcloud_is_missing(zygote, tmp_path):
    script = ["scripts/launch_tpu.py", "--name=pod", "--zone=z", "--topology=v5p:4x4x4"]
    script += ["--command=python scripts/x.py --a='b c'", "--create_flags=--reserved"]
    done = zygote.run(*script, "--dry_run")
    assert done.returncode == 0, done.stderr
    create, *_, delete = re.split(r"\n(?=gcloud|git)", done.stdout.strip())
    assert create == (
        "gcloud compute tpus queued-resources create pod --zone=z --node-id=pod "
        "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --reserved"
    )
    assert delete.endswith("delete pod --zone=z --force --quiet")
    (tmp_path / "git").symlink_to(shutil.which("git"))
    done = zygote.start(*script, "--delete=now", env={"PATH": str(tmp_path)}).wait(60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: gcloud is not on PATH")
