"""Checkpoints that a run resumes from: asynchronous, sharded, and digested.

A checkpoint is one Orbax v1 folder, `checkpoints/step_000100`, plus `digests.json`: the SHA-256 and
size of every file in it. Orbax notices a lost file but not a wrong byte in array data, so a
checkpoint counts only once its digests are there (they are written last), and `restore` checks
them. Everything after the copy to host memory, the hashing too, happens in the background.

Orbax's own `training.Checkpointer` is not used, for two reasons, both tried: it asks JAX's
preemption service about the training step behind the caller's back, which makes the processes miss
the step they had agreed to stop at; and it deletes old checkpoints before the new one has digests.
"""

import itertools
import os
import re
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from sa_jax.errors import UserError
from sa_jax.files import disk_full_message, is_disk_full
from sa_jax.optim import may_change_size
from sa_jax.training import state_io
from sa_jax.training.digests import DIGEST_FILE, find_corruption, process_barrier, write_digests
from sa_jax.training.run_record import CHECKPOINT_FOLDER, find_run, read_run_json

_TEMPORARY = ".orbax-checkpoint-tmp"
_SAVES = itertools.count()  # names the barriers; advances alike on all processes


class RunCheckpointer:
    """Saves and restores the state of one run; a context manager. Call it on all processes.

    Args:
      directory: `checkpoints/` of the run folder (local, or any store etils.epath knows).
      steps: steps to save at; these checkpoints are never deleted.
      interval: also save every this many steps; 0: do not.
      keep: how many of the newest other checkpoints to keep; None: all.
      verify: whether `restore` checks the digests.
    """

    def __init__(
        self,
        directory: os.PathLike | str,
        *,
        steps: Collection[int] = (),
        interval: int = 0,
        keep: int | None = None,
        verify: bool = True,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self._directory = epath.Path(directory)
        self._steps = frozenset(steps)
        self._interval = interval
        self._keep = keep
        self._verify = verify
        self._corrupt: set[int] = set()
        self._background: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cleaned = False
        state_io.quiet_orbax()

    def should_save(self, step: int) -> bool:
        """Whether `step` is in the step list or a multiple of the interval (0 is none)."""
        at_interval = self._interval > 0 and step > 0 and step % self._interval == 0
        return step in self._steps or at_interval

    def all_steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, without those found corrupt."""
        return [s for s in saved_steps(self._directory) if s not in self._corrupt]

    def latest_step(self) -> int | None:
        """The newest of `all_steps`; None without any."""
        return max(self.all_steps(), default=None)

    def save(self, step: int, state: Any, *, wait: bool = False) -> bool:
        """Saves `state` at `step` in the background; returns False if it is already there.

        Waits first for the save before it. When it returns, the state has been copied: the arrays
        may be donated.

        Args:
          state: pytree of jax.Array, sharded in any way; typed PRNG keys too.
          wait: return only once the checkpoint is complete.

        Raises:
          UserError: the disk is full (for the save before it, too). Older checkpoints stay good.
        """
        self.wait()
        if step in _from_primary(self.all_steps()):
            return False
        begin = time.monotonic()
        folder = self._directory / step_name(step)
        try:
            self._clean_up()
            if _is_primary():
                self._directory.mkdir(parents=True, exist_ok=True)
            # What may stand there is incomplete or corrupt, and is replaced.
            response = state_io.save_async(folder, state)
        except Exception as error:
            if is_disk_full(error):
                raise self._full_disk(step) from error
            raise
        self._background = threading.Thread(
            target=self._complete,
            args=(step, response, next(_SAVES), begin),
            name=f"checkpoint_{step}",
            daemon=True,
        )
        self._background.start()
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns once the save under way is complete; raises what it failed with."""
        if self._background is not None:
            self._background.join()
            self._background = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finishes the save under way; raises what it failed with."""
        self.wait()

    def __enter__(self) -> "RunCheckpointer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            logging.error("%s", error)  # must not hide the error that ended the block

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any] | None:
        """Restores the newest intact checkpoint, or exactly `step`.

        A corrupt checkpoint is passed over for the one before it, with a warning that names the
        file.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings, on any mesh; the structure,
            shapes and dtypes must be those that were saved.
          step: take this one or fail.

        Returns:
          (step, state), the state with the shardings asked for; None if there is no checkpoint.

        Raises:
          UserError: `step` is absent or corrupt; all checkpoints are corrupt; the checkpoint holds
            other leaves, shapes or dtypes than the state.
        """
        self.wait()
        folder = self._directory
        if step is not None:
            _require_intact(folder, step, self._verify)
            return step, self._load(step, abstract_state)
        if _is_primary():
            _warn_of_incomplete(folder)
        steps = _from_primary(self.all_steps())
        for step in reversed(steps):
            problem = find_corruption(folder / step_name(step), step) if self._verify else None
            if problem is None:
                return step, self._load(step, abstract_state)
            self._corrupt.add(step)
            logging.warning(
                "checkpoint of step %d is corrupt, taking the one before: %s", step, problem
            )
        if steps:
            raise UserError(
                f"{folder}: every checkpoint (steps {', '.join(map(str, steps))}) is corrupt, the "
                f"oldest: {problem}; start again in another --workdir, or restore the files"
            )
        return None

    def _load(self, step: int, abstract_state: Any) -> Any:
        folder = self._directory / step_name(step)
        return state_io.load(folder, abstract_state, resizable=may_change_size)

    def _complete(self, step: int, response: Any, save_number: int, begin: float) -> None:
        """Background: waits for Orbax, writes the digests, deletes what `keep` does not cover."""
        folder = self._directory / step_name(step)
        barrier = process_barrier(f"sa_jax.checkpoint.{save_number}")
        try:
            response.result()
            size = write_digests(folder, step, barrier)
            self._corrupt.discard(step)
            if _is_primary():
                self._prune()
                logging.info(
                    "saved checkpoint of step %d (%.1f MB) in %.1f s",
                    step,
                    size / 1e6,
                    time.monotonic() - begin,
                )
            barrier("complete")  # `wait` ends on all processes with the same checkpoints there
        except BaseException as error:
            self._error = error
            if is_disk_full(error):
                self._error = self._full_disk(step)
                self._error.__cause__ = error

    def _prune(self) -> None:
        if self._keep is None:
            return
        others = [step for step in self.all_steps() if step not in self._steps]
        for step in others[: -self._keep]:
            folder = self._directory / step_name(step)
            (folder / DIGEST_FILE).unlink()  # first: from here on it counts as incomplete
            folder.rmtree()

    def _clean_up(self) -> None:
        """Once, before the first save: removes what saves cut off by a kill have left."""
        if not self._cleaned and _is_primary() and self._directory.exists():
            for path in self._directory.iterdir():
                if _TEMPORARY in path.name:
                    path.rmtree(missing_ok=True)
        self._cleaned = True

    def _full_disk(self, step: int) -> UserError:
        """The error for a save that found the disk full; frees what that save had taken."""
        message = disk_full_message(self._directory, f"saving the checkpoint of step {step}")
        if _is_primary():
            for path in self._directory.glob(f"{step_name(step)}*"):
                path.rmtree(missing_ok=True)
        last = self.latest_step()
        good = "no earlier checkpoint" if last is None else f"last good checkpoint: step {last}"
        return UserError(f"{message} ({good})")


@dataclass(frozen=True)
class ResolvedModel:
    """What a --model or --init_from value means.

    kind is 'run' or 'hf'; for a run, `checkpoints` and `step` say what to load and `record` is its
    run.json.
    """

    kind: str
    path: Path
    checkpoints: Path | None = None
    step: int | None = None
    record: dict[str, Any] | None = None


def resolve_model(path: os.PathLike | str, step: int | None = None) -> ResolvedModel:
    """Finds what a folder given by a user holds: a Hugging Face model, or a run and its step.

    Args:
      step: a step of the run; None: its newest complete checkpoint.

    Raises:
      UserError: neither kind of folder, a run without that step, a step asked of a HF folder.
    """
    path = Path(path)
    if find_run(path) == "hf":
        if step is not None:
            raise UserError(f"{path}: a Hugging Face folder has no step {step}; leave --step out")
        return ResolvedModel("hf", path)
    record = read_run_json(path)
    folder = path / CHECKPOINT_FOLDER
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{path}: the run has no complete checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{path}: no checkpoint of step {step}; there are {_listed(steps)}")
    return ResolvedModel("run", path, folder, steps[-1] if step is None else step, record)


def step_name(step: int) -> str:
    """Name of a step's folder: 'step_000100'."""
    return f"step_{step:06d}"


def saved_steps(directory: os.PathLike | str) -> list[int]:
    """Steps with a complete checkpoint (one that has its digests) in `checkpoints/`, ascending."""
    return [step for step, complete in _scan(directory) if complete]


def load_subtree(
    directory: os.PathLike | str, step: int | None, key: str, abstract: Any, *, verify: bool = True
) -> tuple[int, Any]:
    """Loads one part of a checkpoint, such as the weights alone, on any mesh.

    Args:
      directory: `checkpoints/` of the run folder.
      step: None: the newest complete checkpoint.
      key: path of the part in the state, "params" or "opt_state/0/mu".
      abstract: that part as jax.ShapeDtypeStruct with shardings; may lack leaves that the part
        has, and its dtypes may differ (values are cast on loading).
      verify: check the digests of the checkpoint first.

    Returns:
      (step, subtree).

    Raises:
      UserError: no such step, a corrupt checkpoint, leaves or shapes that are not in it.
    """
    directory = epath.Path(directory)
    steps = saved_steps(directory)
    if step is None and not steps:
        raise UserError(f"{directory}: no checkpoint to load")
    step = steps[-1] if step is None else step
    _require_intact(directory, step, verify)
    return step, state_io.load(directory / step_name(step), abstract, part=key, exact=False)


def _scan(directory: os.PathLike | str) -> list[tuple[int, bool]]:
    """(step, complete) for each step folder, ascending."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    found = []
    for path in directory.iterdir():
        match = re.fullmatch(r"step_(\d{6,})", path.name)
        if match:
            found.append((int(match[1]), (path / DIGEST_FILE).exists()))
    return sorted(found)


def _warn_of_incomplete(directory: epath.Path) -> None:
    for step, complete in _scan(directory):
        if not complete:
            logging.warning(
                "%s has no %s (its save was cut off) and is ignored",
                directory / step_name(step),
                DIGEST_FILE,
            )


def _require_intact(directory: epath.Path, step: int, verify: bool) -> None:
    steps = saved_steps(directory)
    if step not in steps:
        raise UserError(f"{directory}: no checkpoint of step {step}; there are {_listed(steps)}")
    problem = find_corruption(directory / step_name(step), step) if verify else None
    if problem is not None:
        others = _listed([s for s in steps if s != step])
        raise UserError(f"the checkpoint of step {step} is corrupt: {problem}; others: {others}")


def _listed(steps: list[int]) -> str:
    return "steps " + ", ".join(map(str, steps)) if steps else "none"


def _is_primary() -> bool:
    return jax.process_index() == 0


def _from_primary(steps: list[int]) -> list[int]:
    """Process 0's list on all processes: a shared file system may show each another listing."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    if count == 0:
        return []
    padded = np.resize(np.array(steps or [0], np.int32), count)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]
