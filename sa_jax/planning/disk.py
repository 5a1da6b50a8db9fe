"""Disk that the checkpoints of a run take, by arithmetic on shapes."""

from collections.abc import Collection
from typing import Any

import jax


def checkpoint_bytes(
    state: Any,
    total_steps: int,
    *,
    steps: Collection[int],
    listed: str,
    interval: int,
    keep: int,
) -> dict[str, float]:
    """Bytes of disk that a run's checkpoints take.

    Args:
      state: a `TrainState` of arrays or shapes.
      total_steps: of the run.
      Others: as of `training.checkpoints.RunCheckpointer`.

    Returns:
      full_state and weights (bytes of one), full_states and weights_alone (how many are kept), and
      total, when the run has ended. While one is saved, the one that it replaces is still there.
    """
    full = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    weights = sum(
        leaf.size * (2 if listed == "weights_bf16" else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(state.params)
    )
    reached = {step for step in steps if step <= total_steps}
    regular = {*range(interval, total_steps + 1, interval)} if interval else set()
    if listed == "full":
        always = reached | {total_steps}
        full_states, weights_alone = len(always) + min(keep, len(regular - always)), 0
    else:
        full_states, weights_alone = min(keep, len(regular | {total_steps})), len(reached)
    return {
        "full_state": full,
        "weights": weights,
        "full_states": full_states,
        "weights_alone": weights_alone,
        "total": full_states * full + weights_alone * weights,
    }
