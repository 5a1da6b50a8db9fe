"""What is watched while a run trains: its speed, and that its numbers are finite."""

import math
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import FrozenConfigDict

from sa_jax.errors import UserError
from sa_jax.llama.config import LlamaConfig
from sa_jax.parallel.hardware import peak_flops
from sa_jax.training import metrics as metrics_lib
from sa_jax.training.checkpoints import RunCheckpointer


class Meter:
    """Speed between two logged steps, without the time that evals and checkpoints take."""

    def __init__(
        self, config: FrozenConfigDict, architecture: LlamaConfig, trainable: Any, total_steps: int
    ):
        self._tokens = config.batch_size * config.sequence_length
        share = sum(leaf.size for leaf in jax.tree.leaves(trainable)) / architecture.num_parameters
        flops = architecture.flops_per_token(
            config.sequence_length, trainable_fraction=min(1.0, share)
        )
        peak = peak_flops()
        self._flops_share = flops / (peak * jax.device_count()) if peak else None
        self._total_steps = total_steps
        self._step, self._time = 0, time.perf_counter()

    def restart(self, step: int) -> None:
        """The clock starts now, with `step` done."""
        self._step, self._time = step, time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._time

    def rates(self, step: int) -> dict[str, float | None]:
        """tokens_per_s (token slots, padding included) and mfu up to `step`, just done."""
        seconds, steps = self.seconds(), step - self._step
        self.restart(step)
        if steps <= 0:
            return {"tokens_per_s": None, "mfu": None}
        tokens_per_s = steps * self._tokens / seconds
        mfu = None if self._flops_share is None else tokens_per_s * self._flops_share
        return {"tokens_per_s": tokens_per_s, "mfu": mfu}

    def show(self, written: tuple[int, dict[str, Any]] | None) -> None:
        """Logs what the metrics writer has just written."""
        if written is None:
            return
        step, values = written
        rate = values["tokens_per_s"] or math.nan
        line = metrics_lib.progress_line(
            step,
            self._total_steps,
            loss=values["loss"],
            tokens_per_s=rate,
            mfu=values["mfu"],
            seconds_per_step=self._tokens / rate,
        )
        logging.info("%s", line)


class FiniteWatch:
    """Stops a run whose loss or gradient is not finite, before that state is ever saved.

    Where the optimizer skips such gradients, it only says so.

    Values stay on the device until they are looked at, so that a look never waits for the newest
    step except where the loop waits anyway.
    """

    def __init__(self, leaf_names: list[str], checkpointer: RunCheckpointer, skips: bool):
        self._leaf_names = leaf_names
        self._skips = skips
        self._checkpointer = checkpointer
        self._pending: list[tuple[int, jax.Array, jax.Array]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((step, metrics["loss"], metrics["grad_square_sums"]))

    def check_all(self) -> None:
        self.check_all_but(0)

    def check_all_but(self, newest: int) -> None:
        """Raises UserError naming the first bad step and value among all but the newest."""
        count = max(0, len(self._pending) - newest)
        for step, loss, square_sums in jax.device_get(self._pending[:count]):
            bad = [] if np.isfinite(loss) else [f"loss = {loss}"]
            bad += [
                f"gradient of {name}"
                for name, value in zip(self._leaf_names, square_sums, strict=True)
                if not np.isfinite(value)
            ]
            shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if bad[3:] else "")
            if self._skips and not np.all(np.isfinite(square_sums)):
                logging.warning("step %d: not finite: %s; skipped", step, shown)
            elif bad:
                self._checkpointer.wait()
                last = self._checkpointer.latest_step()
                raise UserError(
                    f"step {step}: not finite: {shown}; last good checkpoint: "
                    f"{'none' if last is None else f'step {last}'}. Lower "
                    "config.optimizer.learning_rate or set config.optimizer.clip_norm, "
                    "with a new --workdir"
                )
        del self._pending[:count]
