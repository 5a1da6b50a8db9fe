"""metrics.jsonl: one strictly valid JSON object per logged step, fetched one log interval late.

A metric that has just been dispatched is still being computed. If the host read it, it would wait
for the device, and then the device for the host. So `log` keeps the arrays, and writes those of the
call before, which are computed by then.

JSON has no NaN: non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity",
and `read_metrics` turns them back into numbers.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from absl import logging

from sa_jax.buckets import BucketFile, as_path, in_bucket
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, disk_full_message, is_disk_full, parse_json
from sa_jax.training.sinks import Sink

_NON_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclasses.dataclass(eq=False)
class MetricsWriter:
    """Appends metrics to a file, one log interval late; a context manager.

    After a resume, call `truncate_after(path, restored_step)` before constructing it.
    """

    path: os.PathLike | str  # metrics.jsonl; its folder must exist
    _: dataclasses.KW_ONLY
    run_id: str  # written on every line
    primary: bool = True  # whether this process writes; on the others every method does nothing
    sinks: Sequence[Sink] = ()  # see `sinks.make_sinks`
    # Called with the last step that is known to be done, as soon as a line's arrays are fetched;
    # the values that it returns are added to the line.
    rates: Callable[[int], Mapping[str, float | None]] = lambda step: {}

    def __post_init__(self) -> None:
        self._path = as_path(self.path)
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._file: IO[bytes] | None = None
        if self.primary:
            try:
                remote = in_bucket(self.path)
                self._file = BucketFile(self._path) if remote else open(self.path, "ab")
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{self.path}: cannot be written ({reason})") from error

    def log(
        self, step: int, metrics: Mapping[str, jax.Array | float]
    ) -> tuple[int, dict[str, float | None]] | None:
        """Keeps this step's scalars and writes those of the call before.

        Returns what was written (step, values), for the progress line; None at the first call.
        The arrays must not be donated to a later step.
        """
        if self._file is None:
            return None
        for array in (value for value in metrics.values() if isinstance(value, jax.Array)):
            array.copy_to_host_async()
        written = self._write_pending()
        self._pending = (step, dict(metrics))
        return written

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Passes scores of evals, by name, to the sinks; the evals' own files already have them."""
        if self._file is None:
            return
        for sink in self.sinks:
            sink.write(step, scores)

    def flush(self, done: int | None = None) -> tuple[int, dict[str, float | None]] | None:
        """Writes what is still kept (this waits for the device); returns it, or None. In a bucket,
        everything is uploaded when this returns.

        `done` is the number of steps that the device has completed, if more than were kept.
        """
        written = self._write_pending(done)
        if isinstance(self._file, BucketFile):
            self._file.put()
        return written

    def _write_pending(self, done: int | None = None) -> tuple[int, dict[str, float | None]] | None:
        if self._pending is None or self._file is None:
            return None
        step, metrics = self._pending
        self._pending = None
        values: dict[str, float | None] = {k: _number(k, v) for k, v in metrics.items()}
        values |= self.rates(step if done is None else done)
        line = {"step": step, **{k: _to_json(v) for k, v in values.items()}, "run_id": self.run_id}
        try:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            if is_disk_full(error):
                raise UserError(disk_full_message(self._path, "writing metrics")) from error
            raise
        for sink in self.sinks:
            sink.write(step, {k: v for k, v in values.items() if v is not None})
        return step, values

    def close(self) -> None:
        """Writes what is kept and closes the file and the sinks."""
        if self._file is None:
            return
        try:
            self.flush()
        finally:
            self._file.close()
            self._file = None
            for sink in self.sinks:
                sink.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _number(name: str, value: Any) -> float | int:
    """A Python number; a float32 becomes the shortest decimal that reads back as that float32."""
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name} must be one number, not an array of shape {array.shape}")
    if array.dtype == np.float64 or np.issubdtype(array.dtype, np.integer):
        return array.item()
    return float(str(np.float32(array.item())))


def _to_json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else json.dumps(value)


def _parse(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, object) of every whole line; a last line cut off by a kill is dropped.

    Raises UserError, with the line number, for any other line that is no metrics line.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    *lines, torn = text.split("\n")
    if torn:
        logging.warning("%s: the last line was cut off and is dropped", path)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: line {number} is not a metrics line (a JSON object with an integer "
                "'step'); remove that line"
            ) from error
        rows.append((line, row))
    return rows


def read_metrics(path: os.PathLike | str) -> list[dict[str, Any]]:
    """The logged lines in order, non-finite numbers restored; an absent file reads as no lines."""
    return [
        {k: float(v) if v in _NON_FINITE and k != "run_id" else v for k, v in row.items()}
        for _, row in _parse(as_path(path))
    ]


def truncate_after(path: os.PathLike | str, step: int) -> int:
    """Removes the lines past `step` (and a cut-off last one) atomically; returns how many.

    Call it on one process, with the step that was restored (-1 or 0 for a fresh start).
    """
    path = as_path(path)
    if not path.exists():
        return 0
    rows = _parse(path)
    kept = "".join(line + "\n" for line, row in rows if row["step"] <= step)
    if kept.encode() != path.read_bytes():
        atomic_write(path, kept)
    return sum(row["step"] > step for _, row in rows)
