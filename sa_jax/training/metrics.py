"""metrics.jsonl: one strictly valid JSON object per logged step, fetched one log interval late.

A metric that has just been dispatched is still being computed. If the host read it, it would wait
for the device, and then the device for the host. So `log` keeps the arrays, and writes those of the
call before, which are computed by then.

JSON has no NaN: non-finite numbers are written as the strings "NaN", "Infinity" and "-Infinity",
and `read_metrics` turns them back into numbers.

Sinks (TensorBoard, Weights & Biases) get the same metrics, and the scores of evals. metrics.jsonl
and the eval files have all of it. So if a sink fails, the run warns once, and continues without it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import jax
import numpy as np
from absl import logging

from sa_jax.buckets import BucketFile, as_path, in_bucket
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, disk_full_message, is_disk_full, parse_json

_NON_FINITE = ("NaN", "Infinity", "-Infinity")
Written = tuple[int, dict[str, float | None]]  # a step, and the values of its line


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(eq=False)
class MetricsWriter(contextlib.AbstractContextManager["MetricsWriter"]):
    """Appends metrics to a file, one log interval late; a context manager.

    After a resume, call `truncate_after(path, restored_step)` before constructing it.
    """

    path: os.PathLike | str  # metrics.jsonl; its folder must exist
    _: dataclasses.KW_ONLY
    run_id: str  # written on every line
    primary: bool = True  # whether this process writes; on the others every method does nothing
    sinks: Sequence[Sink] = ()  # see `make_sinks`
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

    def log(self, step: int, metrics: Mapping[str, jax.Array | float]) -> Written | None:
        """Keeps this step's scalars and writes those of the call before.

        Returns what was written, for the progress line; None at the first call. The arrays must
        not be donated to a later step.
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
        if self._file is not None:
            self._send(step, scores)

    def _send(self, step: int, values: Mapping[str, float | None]) -> None:
        for sink in self.sinks:
            sink.write(step, {k: v for k, v in values.items() if v is not None})

    def flush(self, done: int | None = None) -> Written | None:
        """Writes what is still kept (this waits for the device); returns it, or None.

        In a bucket, everything is uploaded when this returns. `done` is the last step that the
        device has completed, if that is later than the step that is kept.
        """
        written = self._write_pending(done)
        if isinstance(self._file, BucketFile):
            self._file.put()
        return written

    def _write_pending(self, done: int | None = None) -> Written | None:
        if self._pending is None or self._file is None:
            return None
        step, metrics = self._pending
        self._pending = None
        values: dict[str, float | None] = {k: _number(k, v) for k, v in metrics.items()}
        values |= self.rates(step if done is None else done)
        json_values = {
            k: v if v is None or math.isfinite(v) else json.dumps(v) for k, v in values.items()
        }
        line = json.dumps({"step": step, **json_values, "run_id": self.run_id}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            if is_disk_full(error):
                raise UserError(disk_full_message(self._path, "writing metrics")) from error
            raise
        self._send(step, values)
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


def check_sinks(names: Sequence[str], workdir: str | os.PathLike) -> None:
    """UserError, before anything is loaded, if the package of a sink is not installed, or the sink
    cannot write to the run folder."""
    for name in names:
        package, _ = SINKS[name]
        if in_bucket(workdir):
            raise UserError(
                f"config.sinks: {name!r} writes local files, and the run folder is in a bucket; "
                "leave it out (metrics.jsonl has everything)"
            )
        try:
            is_installed = importlib.util.find_spec(package) is not None
        except ValueError:  # loaded without a spec
            is_installed = False
        if not is_installed:
            raise UserError(
                f"config.sinks: {name!r} needs the package {package}: pip install {package}"
            )


def make_sinks(
    names: Sequence[str], workdir: Path, *, run_id: str, config: Mapping[str, Any], step: int = 0
) -> list[Sink]:
    """The sinks named in a config, which `check_sinks` has let pass; process 0 only.

    TensorBoard events go to `tensorboard/` in the run folder. The folder's name is the run's name
    in W&B, its parent's name that of the group; `run_id` resumes the same W&B run. `config` is what
    the sink shows as the run's config, `step` the restored step.
    """
    arguments = workdir, run_id, config, step
    return [_Guarded(name, functools.partial(SINKS[name][1], *arguments)) for name in names]


class _Guarded:
    """A sink that warns once when it fails, and then does nothing."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        with self._guarded():
            self._sink = make()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with self._guarded():
            if self._sink is not None:
                self._sink.write(step, values)

    def close(self) -> None:
        with self._guarded():
            if self._sink is not None:
                self._sink.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sink = None
            why = " ".join(str(error).split())[:300] or type(error).__name__
            off = f"the sink {self._name!r} failed and is off for the rest of this launch: {why}"
            logging.warning("%s; metrics.jsonl has everything", off)


class _TensorBoardSink:
    def __init__(self, workdir: Path, run_id: str, config: Mapping[str, Any], step: int) -> None:
        import tensorboardX

        # purge_step hides what an interrupted launch wrote past the restored step.
        self._writer = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1 if step > 0 else None
        )
        if step == 0:
            text = json.dumps({"run_id": run_id, **config}, indent=1)
            self._writer.add_text("config", f"```\n{text}\n```", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    def __init__(self, workdir: Path, run_id: str, config: Mapping[str, Any], step: int) -> None:
        import wandb

        workdir = workdir.absolute()
        # Arguments of `init` beat W&B's own variables, so each is given only where its is not set.
        defaults = (
            ("project", "WANDB_PROJECT", "sa_jax"),
            ("name", "WANDB_NAME", workdir.name),
            ("group", "WANDB_RUN_GROUP", workdir.parent.name),
            ("dir", "WANDB_DIR", str(workdir)),
        )
        chosen: Any = {key: value for key, name, value in defaults if not os.environ.get(name)}
        # W&B drops rows at or below its newest step, so a resume cannot rewrite history there.
        self._run = wandb.init(id=run_id, resume="allow", config=dict(config), **chosen)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, tuple[str, Callable[[Path, str, Mapping[str, Any], int], Sink]]] = {
    "tensorboard": ("tensorboardX", _TensorBoardSink),
    "wandb": ("wandb", _WandbSink),
}
