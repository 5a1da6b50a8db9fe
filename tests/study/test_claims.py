"""Claims of cells: one owner at a time, whoever is paused, killed or slow."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from sa_jax.study.claims import Claims, Process, hold_lock, kill_holder


@pytest.fixture
def claims(tmp_path):
    return Claims(tmp_path, takeover_s=60)


def take(claims, cell="a", newest=None):
    return claims.take(cell, newest or claims.latest(cell), {"x": 1}, {})


def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_claim_is_taken_once_and_ends_with_its_outcome(claims):
    assert claims.latest("a").state == "new"
    claim = take(claims)
    newest = claims.latest("a")
    assert (newest.state, newest.is_free, newest.record) == ("running", False, {"x": 1})
    assert newest.owner == Process.of(os.getpid())
    assert claim.end({"state": "done"})
    assert (claims.latest("a").state, claims.latest("a").is_free) == ("done", True)


def _race(folder, ready, wins):
    claims = Claims(folder, 60)
    newest = claims.latest("a")
    ready.wait()
    if claims.take("a", newest, {}, {}):
        wins.append(os.getpid())


def test_of_many_that_want_a_cell_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        for _ in range(3):  # the first claim, and takeovers
            wins, ready = manager.list(), context.Barrier(8)
            racers = [context.Process(target=_race, args=(tmp_path, ready, wins)) for _ in range(8)]
            for racer in racers:
                racer.start()
            for racer in racers:
                racer.join()
            assert len(wins) == 1
    assert sorted(p.name for p in (tmp_path / "a").glob("*.claim")) == [
        f"{number:06d}.claim" for number in (1, 2, 3)
    ]


def test_a_dead_owner_loses_its_cell_at_once(claims, tmp_path):
    take(claims)
    file = tmp_path / "a/000001.claim"
    claim = json.loads(file.read_text())
    process = sleeper()
    claim["owner"] = Process.of(process.pid).__dict__
    file.write_text(json.dumps(claim))
    assert claims.latest("a").state == "running"
    process.kill()
    process.wait()
    assert (claims.latest("a").state, claims.latest("a").is_free) == ("lost", True)


def test_an_owner_on_another_host_loses_its_cell_when_it_is_silent(tmp_path):
    claims = Claims(tmp_path, takeover_s=0.4)
    claim = take(claims)
    file = tmp_path / "a/000001.claim"
    record = json.loads(file.read_text())
    record["owner"]["host"] = "elsewhere"
    file.write_text(json.dumps(record))
    # Its clock is an hour behind: only whether it beats counts.
    beat = time.time() - 3600
    for _ in range(6):
        beat += 0.1
        os.utime(file, (beat, beat))
        assert claims.latest("a").state == "running"
        time.sleep(0.1)
    time.sleep(0.5)
    assert claims.latest("a").state == "lost"
    # The one that takes it over is told from the one that wakes up later.
    second = take(claims)
    assert claim.is_lost() and not second.is_lost()
    assert not claim.end({"state": "done"})
    assert claims.latest("a").state == "running"
    assert second.end({"state": "done"})
    assert sorted(p.name for p in (tmp_path / "a").glob("*.end")) == ["000002.end"]


def test_a_claim_that_is_being_written_is_not_free(claims, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/000001.claim").touch()
    assert claims.latest("a").state == "running"


def _hold(folder):
    os.setpgid(0, 0)
    hold_lock(folder)
    (folder / "held").touch()
    time.sleep(60)


def test_who_takes_over_kills_the_process_that_still_works_on_the_cell(claims, tmp_path):
    take(claims)
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_hold, args=(tmp_path / "a",))
    worker.start()
    while not (tmp_path / "a/held").exists():
        time.sleep(0.02)
    os.kill(worker.pid, 19)  # SIGSTOP: it cannot even see that it is to end
    assert take(claims, newest=claims.latest("a")) is not None
    worker.join(10)
    assert worker.exitcode == -9
    lock = hold_lock(tmp_path / "a")
    assert lock is not None
    lock.close()


def test_another_process_of_the_same_number_is_left_alone(tmp_path):
    process = sleeper()
    stranger = Process.of(process.pid).__dict__ | {"started": "1"}
    (tmp_path / "lock").write_text(json.dumps(stranger))
    kill_holder(tmp_path)
    assert process.poll() is None
    process.kill()
    process.wait()
