"""metrics.jsonl: late by one interval, valid JSON, exact after a resume."""

import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.errors import UserError
from sa_jax.training import watch
from sa_jax.training.config import default_config
from sa_jax.training.metrics import MetricsWriter, read_metrics, truncate_after
from tests import toys


def strict(line: str) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_each_line_is_written_one_call_late_and_flush_writes_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, run_id="r1")
    assert writer.log(10, {"loss": jnp.float32(0.1), "tokens": jnp.int32(7)}) is None
    assert path.read_text() == ""
    assert writer.log(20, {"loss": 0.25, "tokens": 8}) == (10, {"loss": 0.1, "tokens": 7})
    assert [strict(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "loss": 0.1, "tokens": 7, "run_id": "r1"}
    ]
    assert writer.flush() == (20, {"loss": 0.25, "tokens": 8}) and writer.flush() is None
    writer.close()
    writer.close()
    assert [row["step"] for row in read_metrics(path)] == [10, 20]


def test_speed_counts_the_steps_done_and_not_those_logged(tmp_path, monkeypatch):
    """Steps of 1 s, logged every 10 and evaluated every 8 as in configs/llama.py: 100 tokens/s."""
    clock = [0.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: clock[0])
    config = default_config()
    config.update(batch_size=1, sequence_length=100)
    meter = watch.Meter(config, toys.CONFIG, {}, total_steps=80)
    with MetricsWriter(tmp_path / "metrics.jsonl", run_id="r1", rates=meter.rates) as writer:
        for step in range(1, 81):
            clock[0] += 1
            if step % 10 == 0:
                writer.log(step, {"loss": 0.0})
            if step % 8 == 0:
                writer.flush(done=step)
                clock[0] += 5
                meter.restart(step)
    speeds = [row["tokens_per_s"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(speeds) == 8 and set(speeds) == {100.0}


def test_log_does_not_wait_for_the_device(tmp_path):
    """When `log` returns, the array it was given is still being computed."""

    @jax.jit
    def slow(x):  # about half a second
        return jax.lax.fori_loop(0, 20, lambda _, y: (y @ y) / 600, x)[0, 0]

    x = jnp.ones((600, 600))
    slow(x).block_until_ready()
    with MetricsWriter(tmp_path / "m.jsonl", run_id="r") as writer:
        first = slow(x)
        assert not first.is_ready()
        writer.log(1, {"x": first})
        assert not first.is_ready()
        second = slow(2 * x)
        assert writer.log(2, {"x": second}) == (1, {"x": 1.0})  # waits for the first alone
        assert first.is_ready() and not second.is_ready()
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2]


def test_float32_reads_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 2000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    with MetricsWriter(tmp_path / "m.jsonl", run_id="r") as writer:
        for i, value in enumerate(values):
            writer.log(i, {"x": value, "b": jnp.bfloat16(1.5)} if i == 0 else {"x": value})
    back = np.array([row["x"] for row in read_metrics(tmp_path / "m.jsonl")], np.float32)
    assert back.tobytes() == values.tobytes()
    assert read_metrics(tmp_path / "m.jsonl")[0]["b"] == 1.5


def test_non_finite_numbers_stay_valid_json_and_read_back(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, run_id="NaN") as writer:
        writer.log(1, {"a": jnp.float32(jnp.nan), "b": jnp.inf, "c": -math.inf, "d": 1.0})
    row = strict(path.read_text())
    assert (row["a"], row["b"], row["c"]) == ("NaN", "Infinity", "-Infinity")
    (row,) = read_metrics(path)
    assert math.isnan(row["a"]) and (row["b"], row["c"]) == (math.inf, -math.inf)
    assert row["run_id"] == "NaN"


def test_only_the_primary_process_writes(tmp_path):
    sink = mock.Mock()
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, run_id="r", primary=False, sinks=[sink]) as writer:
        assert writer.log(1, {"x": 1.0}) is None and writer.log(2, {"x": 1.0}) is None
        assert writer.flush() is None
        writer.log_scores(2, {"x": 1.0})
    assert not path.exists() and sink.mock_calls == []


def test_an_array_is_no_metric(tmp_path):
    writer = MetricsWriter(tmp_path / "m.jsonl", run_id="r")
    writer.log(1, {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"metric x must be one number, not .*\(3,\)"):
        writer.flush()


def test_truncation_removes_what_lies_past_the_restored_step(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, run_id="r") as writer:
        for step in (5, 10, 15, 20):
            writer.log(step, {"x": step / 3})
    whole = path.read_bytes()
    assert truncate_after(path, 20) == 0 and path.read_bytes() == whole
    assert truncate_after(path, 10) == 2
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    with MetricsWriter(path, run_id="r") as writer:
        for step in (15, 20):
            writer.log(step, {"x": step / 3})
    assert path.read_bytes() == whole  # as if never interrupted
    assert truncate_after(path, -1) == 4 and path.read_bytes() == b""
    assert truncate_after(tmp_path / "absent.jsonl", 3) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path, run_id="r") as writer:
        for step in (1, 2):
            writer.log(step, {"x": 0.5})
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:-cut])
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert truncate_after(path, 2) == 0
    assert path.read_bytes() == first


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    for bad in ("{", "[1]", '{"loss": 1}', '{"step": "3"}', ""):
        path.write_text('{"step": 1}\n' + bad + '\n{"step": 2}\n')
        with pytest.raises(UserError, match="line 2 is not a metrics line"):
            read_metrics(path)
        with pytest.raises(UserError, match="line 2"):
            truncate_after(path, 1)
        assert path.read_text().endswith('{"step": 2}\n')


@pytest.mark.parametrize(
    ("step", "loss", "speed", "mfu", "line"),
    [
        (120, 2.34567, 12345.0, 0.4119, "loss 2.3457  12.3k tokens/s  MFU 41.2%  ETA 02:22"),
        (991, math.nan, 512.4, None, "loss nan  512 tokens/s  ETA 00:35"),
        (0, 1.0, 100.0, None, "loss 1.0000  100 tokens/s  ETA 5:33:20"),
        (1, 1.0, None, None, "loss 1.0000"),  # no step since the line before
    ],
)
def test_the_progress_line(monkeypatch, step, loss, speed, mfu, line):
    monkeypatch.setattr(watch.logging, "info", lambda form, text: shown.append(form % text))
    config = default_config()
    config.update(batch_size=2, sequence_length=1000)
    meter, shown = watch.Meter(config, toys.CONFIG, {}, total_steps=1000), []
    meter.show((step, {"loss": loss, "tokens_per_s": speed, "mfu": mfu}))
    assert shown == [f"step {step:4}/1000  {line}"]
    meter.show(None)
    assert len(shown) == 1
