"""Monitors a run while it trains: its speed, the use of its time, finite numbers, and stalls."""

import collections
import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import FrozenConfigDict
from tqdm import tqdm

from sa_jax.buckets import size_and_time
from sa_jax.errors import UserError
from sa_jax.llama.config import LlamaConfig
from sa_jax.parallel.hardware import chip_of
from sa_jax.parallel.multihost import is_primary
from sa_jax.parallel.peers import end_all
from sa_jax.parallel.rules import path_string
from sa_jax.text import first_few
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.metrics import Written


class Meter:
    """Speed between two logged steps, without the time of evals and checkpoints."""

    def __init__(
        self, config: FrozenConfigDict, architecture: LlamaConfig, trainable: Any, total_steps: int
    ):
        self._tokens = config.batch_size * config.sequence_length
        count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        flops = architecture.flops_per_token(config.sequence_length, count)
        chip = chip_of(jax.devices()[0])
        chips = jax.device_count() / chip.devices if chip else 0
        self._flops_share = flops / (chip.flops * chips) if chip else None
        self._total_steps = total_steps
        self.restart(0)

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

    def show(self, written: Written | None) -> None:
        """Logs what the metrics writer has just written, where the speed is known as
        'step 120/1000  loss 2.3456  12.3k tokens/s  MFU 41.2%  ETA 03:20'."""
        if written is None:
            return
        step, values = written
        total = self._total_steps
        line = f"step {step:>{len(str(total))}}/{total}  loss {values['loss']:.4f}"
        if rate := values["tokens_per_s"]:
            mfu = "" if values["mfu"] is None else f"  MFU {values['mfu']:.1%}"
            left = tqdm.format_interval((total - step) * self._tokens / rate)
            line += f"  {tqdm.format_sizeof(rate)} tokens/s{mfu}  ETA {left}"
        logging.info("%s", line)


class Goodput(contextlib.AbstractContextManager["Goodput"]):
    """Counts the seconds of a launch by their use; a context manager that logs them at the end."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self.doing, self._since = "start", time.monotonic()
        self._steps = 0
        self.lost_steps = 0  # of an earlier launch, which are repeated

    def switch(self, doing: str) -> None:
        """Counts the time from now on as 'compile', 'data', 'step', 'eval' or 'checkpoint'."""
        now = time.monotonic()
        self._seconds[self.doing] += now - self._since
        self.doing, self._since = doing, now
        self._steps += doing == "step"

    def idle_since(self, file: Path) -> None:
        """Counts the time since an earlier launch last wrote to this file as idle."""
        if file.exists():
            self._seconds["idle"] += max(0.0, time.time() - size_and_time(file)[1] / 1e9)

    def line(self) -> str:
        """'goodput 80 % of 100 s: step 80 s, eval 15 s, start 5 s'. 'lost' is repeated steps."""
        seconds = {"step": 0.0, **self._seconds}
        if self._steps:
            lost = min(1.0, self.lost_steps / self._steps) * seconds["step"]
            seconds["lost"], seconds["step"] = lost, seconds["step"] - lost
        total = sum(seconds.values())
        largest_first = sorted(seconds.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in largest_first if value)
        return f"goodput {seconds['step'] / max(total, 1e-9):.0%} of {total:.1f} s: {parts}"

    def __exit__(self, *_: object) -> None:
        if self._steps and is_primary():
            self.switch("end")
            logging.info("%s", self.line())


class StallWatch(contextlib.AbstractContextManager["StallWatch"]):
    """Ends a stalled process and its peers, with the stacks of their threads, a line and exit 1; a
    context manager.

    After each `beat`, the next must come within `floor_s` seconds, or within ten times the longest
    earlier wait, whichever is longer. During a compilation or a checkpoint it may take ten times as
    long, and that wait is not used later. Seconds in which the process was paused do not count.

    `goodput` knows what the process is doing; without it, the process runs evals.
    """

    def __init__(self, floor_s: float, goodput: Goodput | None = None) -> None:
        self._floor = self._limit = floor_s
        self._goodput = goodput
        self._waited = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Records progress: a step was dispatched, or a batch of an eval is done."""
        if not self._slow():
            self._limit = max(self._limit, 10 * self._waited)
        self._waited = 0.0
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def _slow(self) -> bool:
        return self._goodput is not None and self._goodput.doing in ("compile", "checkpoint")

    def _watch(self) -> None:
        pause = min(1.0, self._floor / 10)
        while not self._closed.wait(pause):
            self._waited += pause
            if self._waited > self._limit * (10 if self._slow() else 1):
                end_all(
                    f"no step, eval batch or checkpoint for {self._waited:.0f} s "
                    f"(config.stall_timeout_s={self._floor:g}, or ten times the longest wait "
                    "before); above is where each thread waits; run the same command again"
                )

    def __exit__(self, *_: object) -> None:
        self._closed.set()


class FiniteWatch:
    """Stops a run whose loss or gradient is not finite, before that state is saved.

    If the optimizer skips such gradients (`skips`), it only logs them. The leaves of `trainable`
    give the gradients' names. Values stay on the device until they are checked, so that a check
    does not wait for the newest step unless the loop waits anyway.
    """

    def __init__(self, trainable: Any, checkpointer: RunCheckpointer, skips: bool):
        with_paths = jax.tree_util.tree_leaves_with_path(trainable)
        self._leaf_names = [path_string(path) for path, _ in with_paths]
        self._skips = skips
        self._checkpointer = checkpointer
        self._pending: list[tuple[int, jax.Array, jax.Array]] = []

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((step, metrics["loss"], metrics["grad_square_sums"]))

    def check(self, all_but: int = 0) -> None:
        """Raises UserError naming the first bad step and value, of all but the newest steps."""
        count = max(0, len(self._pending) - all_but)
        for step, loss, square_sums in jax.device_get(self._pending[:count]):
            bad = [] if np.isfinite(loss) else [f"loss = {loss}"]
            named = zip(self._leaf_names, square_sums, strict=True)
            bad += [f"gradient of {name}" for name, value in named if not np.isfinite(value)]
            shown = first_few(bad, 3)
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
