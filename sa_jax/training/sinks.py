"""Sinks that get metrics and scores besides metrics.jsonl: TensorBoard and Weights & Biases.

metrics.jsonl and the eval files have everything that a sink gets. So if a sink fails, the run warns
once, and continues without it.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from sa_jax.buckets import as_path, in_bucket
from sa_jax.errors import UserError


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


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
        if not _is_installed(package):
            raise UserError(
                f"config.sinks: {name!r} needs the package {package}: pip install {package}"
            )


def make_sinks(
    names: Sequence[str],
    workdir: str | os.PathLike,
    *,
    run_id: str,
    config: Mapping[str, Any],
    step: int = 0,
) -> list[Sink]:
    """The sinks named in a config, which `check_sinks` has let pass; process 0 only.

    Args:
      workdir: the run folder. Its name is the run's name, and its parent's name that of the group;
        TensorBoard events go to its `tensorboard/`.
      run_id: resumes the same W&B run.
      config: what the sink shows as the run's config.
      step: the restored step.
    """
    arguments = as_path(workdir), run_id, config, step
    return [_Guarded(name, functools.partial(SINKS[name][1], *arguments)) for name in names]


class _Guarded:
    """A sink that warns once when it fails, and then does nothing."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._guard(lambda: setattr(self, "_sink", make()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        sink = self._sink
        if sink is not None:
            self._guard(lambda: sink.write(step, values))

    def close(self) -> None:
        sink = self._sink
        if sink is not None:
            self._guard(sink.close)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._sink = None
            logging.warning(
                "the sink %r failed and is off for the rest of this launch: %s; metrics.jsonl has "
                "everything",
                self._name,
                " ".join(str(error).split())[:300] or type(error).__name__,
            )


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
        defaults = {
            "project": ("WANDB_PROJECT", "sa_jax"),
            "name": ("WANDB_NAME", workdir.name),
            "group": ("WANDB_RUN_GROUP", workdir.parent.name),
            "dir": ("WANDB_DIR", str(workdir)),
        }
        chosen: dict[str, Any] = {
            key: value for key, (name, value) in defaults.items() if not os.environ.get(name)
        }
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


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # loaded without a spec
        return False
