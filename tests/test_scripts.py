"""The shell scripts, run with a stand-in for the environment's interpreter (real installations are
made by the scripts themselves, whenever they run on a new machine)."""

import ast
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fault_table import table
from tests.zygote import ROOT

SHELL_SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])

# Answers `-c` as a real interpreter; notes pip, ruff, pytest and script calls, and obeys orders.
INTERPRETER = """#!/usr/bin/env bash
case "$1" in -c | -I) exec {python} "$@" ;; esac
echo "$*" >>"{log}"
case "$*" in
    "-m pip --version") exit 0 ;;
    "-m pip install "*) exit "${{PIP_STATUS:-0}}" ;;
    "-m ruff "*) exit "${{RUFF_STATUS:-0}}" ;;
    "-m mypy") exit "${{MYPY_STATUS:-0}}" ;;
    "-m pytest "*) echo "$JAX_PLATFORMS"; exit "${{PYTEST_STATUS:-0}}" ;;
    scripts/run_study.py*)
        [ -z "${{WAIT_FOR_SIGNAL:-}}" ] || exec {python} -c "$WAIT_FOR_SIGNAL"
        mkdir -p "${{3#--workdir=}}/report"
        echo "the table" >"${{3#--workdir=}}/report/results.md"
        exit "${{STUDY_STATUS:-0}}" ;;
esac
"""
# A run that takes its time to save after a signal, and notes each one that reaches it.
WAIT_FOR_SIGNAL = """
import signal, sys, time
note = open({log!r}, "a", buffering=1)
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
note.write("ready\\n")
while not received:
    time.sleep(0.02)
time.sleep(0.5)
note.write(f"got {{received}}\\n")
sys.exit(75)
"""


class Checkout:
    """A folder with the project's scripts and an environment whose interpreter takes notes."""

    def __init__(self, folder: Path):
        self.folder = folder / "a project"  # spaces are the usual victims of shell scripts
        for name in ("scripts", ".ci", "env/bin", "env/lib/python3/site-packages/x.dist-info"):
            (self.folder / name).mkdir(parents=True)
        for script in SHELL_SCRIPTS:
            copy = self.folder / script.relative_to(ROOT)
            copy.write_bytes(script.read_bytes())
        (self.folder / "pyproject.toml").write_text("one")
        (self.folder / "constraints.txt").write_text("jax==1")
        (self.folder / "env/pyvenv.cfg").touch()
        self.log = folder / "log"
        interpreter = self.folder / "env/bin/python"
        interpreter.write_text(INTERPRETER.format(python=sys.executable, log=self.log))
        interpreter.chmod(0o755)

    def environment(self, **extra):
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "XLA_FLAGS")}
        return {**kept, "VENV": "env", **extra}

    def run(self, *command, **environment):
        return subprocess.run(
            ["bash", *command],
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self):
        """What the interpreter was asked since the last time."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text.splitlines()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#")


def test_second_run_installs_nothing(checkout):
    first = checkout.run("scripts/demo.sh")
    assert first.returncode == 0, first.stderr
    calls = checkout.calls()
    install = "-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[data]"
    assert calls == [
        "-m pip --version",
        install,
        "scripts/run_study.py --config=configs/toy_study.py --workdir=runs/demo --workers=2",
    ]
    assert "1 packages" in first.stdout
    assert first.stdout.endswith("the table\n\nreport: runs/demo/report/index.html\n")
    start = time.monotonic()
    second = checkout.run("scripts/demo.sh", str(out := checkout.folder.parent / "my out"))
    assert time.monotonic() - start < 1.0
    assert second.stdout == f"the table\n\nreport: {out}/report/index.html\n"
    assert checkout.calls() == [
        f"scripts/run_study.py --config=configs/toy_study.py --workdir={out} --workers=2",
    ]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_installs_again_when_a_pin_changes(checkout, changed):
    checkout.run("scripts/demo.sh")
    checkout.calls()
    (checkout.folder / changed).write_text("two")
    checkout.run("scripts/demo.sh")
    assert [call for call in checkout.calls() if "install" in call]


def test_extras_of_both_scripts_are_kept(checkout):
    checkout.run("scripts/demo.sh")
    checkout.run("scripts/test.sh")
    installs = [call for call in checkout.calls() if "install" in call]
    assert [call.rpartition(" ")[2] for call in installs] == [
        ".[data]",
        ".[data,test,eval,tpu,buckets]",
    ]
    checkout.run("scripts/demo.sh")
    checkout.run("scripts/test.sh")
    assert not [call for call in checkout.calls() if "pip" in call]


def test_failed_installation_is_not_taken_for_done(checkout):
    failed = checkout.run("scripts/test.sh", PIP_STATUS="1")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: the installation did not finish")
    assert not [call for call in checkout.calls() if "pytest" in call]
    assert checkout.run("scripts/test.sh").returncode == 0
    assert [call for call in checkout.calls() if "pip install" in call]


def test_python_too_old_is_one_line(checkout, tmp_path):
    (checkout.folder / "env/pyvenv.cfg").unlink()
    named = checkout.run("scripts/demo.sh", PYTHON="false")
    assert (named.returncode, named.stderr) == (
        1,
        "error: PYTHON=false is not a Python >= 3.11; name one that is\n",
    )
    old = tmp_path / "old"
    old.mkdir()
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    found = checkout.run("scripts/demo.sh", PATH=f"{old}{os.pathsep}{os.environ['PATH']}")
    assert (found.returncode, found.stderr) == (
        1,
        "error: no Python >= 3.11 on PATH; install one, or name it: PYTHON=/path/to/python3.12\n",
    )
    assert checkout.calls() == []


def test_environment_of_another_python_is_refused(checkout, tmp_path):
    other = tmp_path / "python3.99"
    other.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.99 ;; esac\n')
    other.chmod(0o755)
    refused = checkout.run("scripts/demo.sh", PYTHON=str(other))
    assert refused.returncode == 1
    assert "is 3.99: remove env, or set VENV to another folder" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert checkout.run("scripts/demo.sh", PYTHON=sys.executable).returncode == 0


def test_test_script_selects_and_passes_on(checkout):
    usual = checkout.run("scripts/test.sh", "tests/llama", "-k", "a or b")
    assert usual.stdout.splitlines()[-1] == "cpu"
    *_, lint, style, types, tests = checkout.calls()
    assert (lint, style, types) == ("-m ruff check", "-m ruff format --check", "-m mypy")
    assert tests.startswith("-m pytest ")
    assert tests.endswith(" -m not long tests/llama -k a or b")
    checkout.run("scripts/test.sh", "-x", "--long")
    assert "not long" not in (call := checkout.calls()[-1]) and call.endswith(" -x")
    assert checkout.run("scripts/test.sh", PYTEST_STATUS="5").returncode == 5
    checkout.calls()
    for failing in ("RUFF_STATUS", "MYPY_STATUS"):
        assert checkout.run("scripts/test.sh", **{failing: "1"}).returncode == 1
    assert not [call for call in checkout.calls() if "pytest" in call]


def test_continuous_integration_finds_the_data_beside_the_checkout(checkout):
    (checkout.folder / "scripts/test.sh").write_text('echo "<${SA_JAX_DATA:-}> $*"; exit 3\n')
    alone = checkout.run(".ci/run", "--long", SA_JAX_DATA="")
    assert (alone.stdout, alone.returncode) == ("<> --long\n", 3)
    data = checkout.folder.parent / "shared/data"
    data.mkdir(parents=True)
    assert checkout.run(".ci/run").stdout == f"<{data}> \n"
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("status, expected", [(75, 75), (1, 1), (2, 2)])
def test_demo_stops_with_the_study(checkout, status, expected):
    stopped = checkout.run("scripts/demo.sh", "runs/x", STUDY_STATUS=str(status))
    assert stopped.returncode == expected
    resumable = "to go on from the last checkpoint: bash scripts/demo.sh runs/x\n"
    assert stopped.stderr.endswith(resumable) == (status == 75)
    assert "the table" not in stopped.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("to", ["process", "group"])
def test_demo_hands_a_signal_on_once_and_waits(checkout, number, to):
    """`group` is what a terminal's Ctrl-C does: the whole foreground group gets the signal."""
    waiting = WAIT_FOR_SIGNAL.format(log=str(checkout.log))
    demo = subprocess.Popen(
        ["bash", "scripts/demo.sh"],
        cwd=checkout.folder,
        env=checkout.environment(WAIT_FOR_SIGNAL=waiting),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # bash cannot trap what was ignored when it began, as in a suite run with `&`.
        preexec_fn=functools.partial(signal.signal, number, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 30
        while not (checkout.log.exists() and "ready" in checkout.log.read_text()):
            assert time.monotonic() < deadline and demo.poll() is None
            time.sleep(0.02)
        (os.kill if to == "process" else os.killpg)(demo.pid, number)
        _, stderr = demo.communicate(timeout=120)
    finally:
        demo.kill()
    assert demo.returncode == 75
    assert "to go on from the last checkpoint: bash scripts/demo.sh runs/demo" in stderr
    assert checkout.calls()[-2:] == ["ready", f"got [{number.value}]"]


def test_demo_takes_one_folder(checkout):
    for arguments in (["a", "b"], ["--out"]):
        refused = checkout.run("scripts/demo.sh", *arguments)
        assert (refused.returncode, refused.stderr) == (
            1,
            "error: usage: bash scripts/demo.sh [OUT]\n",
        )
    told = checkout.run("scripts/demo.sh", "--help")
    assert (told.returncode, told.stdout) == (0, "usage: bash scripts/demo.sh [OUT]\n")


def test_the_table_of_faults_is_printed_also_when_one_did_not_hold(checkout):
    ended = checkout.run("scripts/faults.sh", "-k", "kill", PYTEST_STATUS="1")
    assert ended.returncode == 1, ended.stderr
    *_, tested, printed = checkout.calls()
    assert tested.startswith("-m pytest -n 0 -q --junitxml=") and tested.endswith(" -k kill")
    left_out = re.search(r"-k not \((.*?)\)", tested)[1].split(" or ")
    for file, wanted in re.findall(r"(tests/\S+\.py)(?:::(\w+))?", tested):
        for test in ast.parse(Path(file).read_text()).body:
            name = getattr(test, "name", "")
            chosen = name == wanted if wanted else name.startswith("test_")
            if chosen and not any(word in name for word in left_out):
                assert ast.get_docstring(test), f"{file}: {name} has no title"
    assert printed.startswith("-m tests.fault_table /")
    case = '<testcase classname="tests.{}" name="test_{}" time="{}">{}</testcase>'
    lost = "parallel.test_peers", "a_lost_process_ends_the_others[0-9]"
    cases = case.format(*lost, 1.6, "") + case.format(*lost, 2, "<failure/>")
    cases += case.format("training.test_watch", "goodput_adds_up", 3, "")
    rows = table(f"<suites><suite>{cases}</suite></suites>").splitlines()[2:]
    # Titles are the tests' docstrings.
    assert re.fullmatch(r"\| A process that is killed, .* \| 1 of 2 \| 4 \|", rows[0])
    assert rows[1:] == ["| The parts of a launch's goodput add up to its time | 1 of 1 | 3 |"]
