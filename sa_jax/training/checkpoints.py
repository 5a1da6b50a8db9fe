"""Checkpoints that a run resumes from: asynchronous, sharded, and digested.

A checkpoint is one Orbax v1 folder, `checkpoints/step_000100`, plus `digests.json`: the SHA-256 and
size of every file in it. Orbax detects a lost file but not a wrong byte in array data. So a
checkpoint is complete only when its digests exist (they are written last), and `restore` checks
them. Everything after the copy to host memory happens in the background, also the hashing.

A step that is kept only so that other runs can start from it can be saved as weights only, in
`checkpoints/weights_000100`, also with digests: a third of Adam's bytes, or a sixth in bfloat16.

Orbax's own `training.Checkpointer` is not used, for two reasons that were tested. It asks JAX's
preemption service about the training step without the caller's knowledge, so the processes miss the
step at which they agreed to stop. And it deletes old checkpoints before the new one has digests.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from sa_jax.errors import UserError
from sa_jax.files import disk_full_message, is_disk_full, parse_json
from sa_jax.optim.build import may_change_size
from sa_jax.parallel.multihost import agree, exchange, is_primary
from sa_jax.training import state_io
from sa_jax.training.digests import DIGEST_FILE, find_corruption, process_barrier, write_digests

_TEMPORARY = ".orbax-checkpoint-tmp"
_SAVES = itertools.count()  # names the barriers; advances alike on all processes


@dataclasses.dataclass(eq=False)
class RunCheckpointer(contextlib.AbstractContextManager["RunCheckpointer"]):
    """Saves and restores the state of one run; a context manager. Call it on all processes."""

    directory: os.PathLike | str  # `checkpoints/` of the run folder, in any store of etils.epath
    _: dataclasses.KW_ONLY
    steps: Collection[int] = ()  # at which to save; these checkpoints are never deleted
    # What is saved at `steps`: the 'full' state, only the 'weights' as they train, or
    # 'weights_bf16', the weights in bfloat16.
    listed: str = "full"
    last: int | None = None  # the run's last step, whose full state is saved too; None: not known
    interval: int = 0  # also save the full state every this many steps; 0: do not
    keep_interval: int | None = None  # newest full states to keep besides `steps`; None: all
    verify: bool = True  # whether `restore` checks the digests

    def __post_init__(self) -> None:
        self._directory = epath.Path(self.directory)
        self._corrupt: set[int] = set()
        self._background: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cleaned = False
        state_io.quiet_orbax()

    def should_save(self, step: int) -> bool:
        """Whether `step` is in the list, a multiple of the interval (0 has none) or the last."""
        return step in self.steps or self._should_save_full(step)

    def _should_save_full(self, step: int) -> bool:
        at_interval = self.interval > 0 and step > 0 and step % self.interval == 0
        listed = self.listed == "full" and step in self.steps
        return at_interval or listed or step == self.last

    def all_steps(self) -> list[int]:
        """Steps whose full state is saved, ascending, without those known to be corrupt."""
        return [s for s in full_steps(self._directory) if s not in self._corrupt]

    def latest_step(self) -> int | None:
        """The newest of `all_steps`; None without any."""
        return max(self.all_steps(), default=None)

    def save(self, step: int, state: Any, *, wait: bool = False) -> bool:
        """Saves at `step`, in the background; returns False if everything is already saved.

        It saves only the weights (`state.params`) at `steps`, if `listed` says so; and the full
        state at the interval, at the last step, and at any step that `should_save` does not name.
        It first waits for the save before it. When it returns, the state has been copied, so the
        arrays may be donated. With `wait` it saves the full state too, and returns only once the
        checkpoint is complete.

        Raises:
          UserError: the disk is full (for the save before it, too). Older checkpoints stay good.
        """
        saved = False
        if self.listed != "full" and step in self.steps:
            self.wait()
            if step not in _from_primary(_complete_steps(self._directory, "weights")):
                params = state.params
                if self.listed == "weights_bf16":
                    params = _bfloat16(params)
                self._save(step, "weights", {"params": params})
                saved = True
        if wait or not self.should_save(step) or self._should_save_full(step):
            self.wait()
            if step not in _from_primary(self.all_steps()):
                self._save(step, "step", state)
                saved = True
        if wait:
            self.wait()
        return saved

    def _save(self, step: int, kind: str, tree: Any) -> None:
        begin = time.monotonic()
        folder = self._directory / step_name(step, kind)
        try:
            # Once, before the first save: removes what interrupted saves have left.
            if not self._cleaned and is_primary() and self._directory.exists():
                for path in self._directory.iterdir():
                    if _TEMPORARY in path.name:
                        path.rmtree(missing_ok=True)
            self._cleaned = True
            if is_primary():
                self._directory.mkdir(parents=True, exist_ok=True)
                # An incomplete or corrupt checkpoint of this name is replaced. Not by Orbax, which
                # also asks for the bucket itself: some accounts may only use the objects in it.
                folder.rmtree(missing_ok=True)
            agree(True)  # it is gone
            response = state_io.save_async(folder, tree)
        except Exception as error:
            if is_disk_full(error):
                raise self._full_disk(step, folder) from error
            raise
        barrier = functools.partial(process_barrier, f"sa_jax.checkpoint.{next(_SAVES)}")
        self._background = threading.Thread(
            target=self._complete,
            args=(step, kind, response, barrier, begin),
            name=f"checkpoint_{step}",
            daemon=True,
        )
        self._background.start()

    def wait(self) -> None:
        """Returns when the current save is complete; raises its error if it failed."""
        if self._background is not None:
            self._background.join()
            self._background = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            logging.error("%s", error)  # must not hide the error that ended the block

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest intact checkpoint; None if there is no checkpoint.

        If a checkpoint is corrupt, the one before it is used, with a warning that names the file.
        `abstract_state` is a tree of jax.ShapeDtypeStruct with shardings, on any mesh. UserError if
        its structure, shapes or dtypes are not those of the newest intact checkpoint, or if all
        checkpoints are corrupt.
        """
        self.wait()
        folder = self._directory
        if is_primary():
            self._warn_of_incomplete()
        steps = _from_primary(self.all_steps())
        for step in reversed(steps):
            path = folder / step_name(step)
            problem = find_corruption(path, step) if self.verify else None
            if problem is None:
                return step, state_io.load(path, abstract_state, resizable=may_change_size)
            self._corrupt.add(step)
            message = "checkpoint of step %d is corrupt, using the one before: %s"
            logging.warning(message, step, problem)
        if steps:
            raise UserError(
                f"{folder}: every checkpoint ({listed(steps)}) is corrupt, the oldest: {problem}; "
                "start again in another --workdir, or restore the files"
            )
        return None

    def _warn_of_incomplete(self) -> None:
        for kind in ("step", "weights"):
            for step, complete in _scan(self._directory, kind):
                if not complete:
                    message = "%s has no %s (its save was cut off) and is ignored"
                    logging.warning(message, self._directory / step_name(step, kind), DIGEST_FILE)

    def _complete(
        self, step: int, kind: str, response: Any, barrier: Callable[[str], None], begin: float
    ) -> None:
        """In the background: waits for Orbax, writes the digests, deletes what is not kept."""
        folder = self._directory / step_name(step, kind)
        try:
            response.result()
            size = write_digests(folder, step, barrier)
            if kind == "step":
                self._corrupt.discard(step)
            if is_primary():
                self._prune()
                what = "full state" if kind == "step" else "weights"
                message = "saved checkpoint of step %d (%s, %.1f MB) in %.1f s"
                logging.info(message, step, what, size / 1e6, time.monotonic() - begin)
            barrier("complete")  # `wait` ends on all processes with the same checkpoints there
        except BaseException as error:
            self._error = error
            if is_disk_full(error):
                self._error = self._full_disk(step, folder)
                self._error.__cause__ = error

    def _prune(self) -> None:
        if self.keep_interval is None:
            return
        always: set[int | None] = {*self.steps}
        if self.listed == "full":
            always.add(self.last)
        else:  # also a listed step's full state, where an earlier launch saved nothing else
            always.difference_update(_complete_steps(self._directory, "weights"))
        others = [step for step in self.all_steps() if step not in always]
        for step in others[: -self.keep_interval]:
            folder = self._directory / step_name(step)
            (folder / DIGEST_FILE).unlink()  # first: from here on it counts as incomplete
            folder.rmtree()

    def _full_disk(self, step: int, folder: epath.Path) -> UserError:
        """The error for a save to a full disk; removes the files of that save."""
        message = disk_full_message(self._directory, f"saving the checkpoint of step {step}")
        if is_primary():
            for path in self._directory.glob(f"{folder.name}*"):
                path.rmtree(missing_ok=True)
        last = self.latest_step()
        good = "no earlier checkpoint" if last is None else f"last good checkpoint: step {last}"
        return UserError(f"{message} ({good})")


def step_name(step: int, kind: str = "step") -> str:
    """Name of a step's folder: 'step_000100' with its state, 'weights_000100' with its weights."""
    return f"{kind}_{step:06d}"


def saved_steps(directory: os.PathLike | str) -> list[int]:
    """Steps with a complete checkpoint (one that has its digests) in `checkpoints/`, ascending:
    full states, and weights alone."""
    return sorted({*full_steps(directory), *_complete_steps(directory, "weights")})


def full_steps(directory: os.PathLike | str) -> list[int]:
    """The steps of `saved_steps` from which a run can resume."""
    return _complete_steps(directory, "step")


def _complete_steps(directory: os.PathLike | str, kind: str) -> list[int]:
    return [step for step, complete in _scan(directory, kind) if complete]


def load_subtree(directory: os.PathLike | str, step: int, key: str, abstract: Any) -> Any:
    """Loads one part of a checkpoint, such as the weights alone, onto any mesh.

    Args:
      directory: `checkpoints/` of the run folder.
      key: path of the part in the state, "params" or "opt_state/0/mu".
      abstract: that part as jax.ShapeDtypeStruct with shardings; may lack leaves that the part
        has, and its dtypes may differ (values are cast on loading).

    Raises:
      UserError: no such step, a corrupt checkpoint, leaves or shapes that are not in it.
    """
    steps = saved_steps(directory)
    if step not in steps:
        raise UserError(f"{directory}: no checkpoint of step {step}; there are {listed(steps)}")
    kind = "step" if step in full_steps(directory) else "weights"
    folder = epath.Path(directory) / step_name(step, kind)
    if problem := find_corruption(folder, step):
        others = listed([s for s in steps if s != step])
        raise UserError(f"the checkpoint of step {step} is corrupt: {problem}; others: {others}")
    return state_io.load(folder, abstract, part=key, exact=False)


def _scan(directory: os.PathLike | str, kind: str) -> list[tuple[int, bool]]:
    """(step, complete) for each folder of a kind ('step' or 'weights'), ascending."""
    root = epath.Path(directory)
    if not root.exists():
        return []
    matches = [(re.fullmatch(rf"{kind}_(\d{{6,}})", p.name), p) for p in root.iterdir()]
    return sorted((int(match[1]), (p / DIGEST_FILE).exists()) for match, p in matches if match)


@jax.jit
def _bfloat16(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def listed(steps: list[int]) -> str:
    """'steps 100, 200' for messages."""
    return "steps " + ", ".join(map(str, steps)) if steps else "none"


def _from_primary(steps: list[int]) -> list[int]:
    """Process 0's list on all processes: a shared file system may show them different listings."""
    return steps if jax.process_count() == 1 else parse_json(exchange(json.dumps(steps))[0])
