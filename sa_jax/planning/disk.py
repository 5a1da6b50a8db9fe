"""The disk space of a run's checkpoints, by arithmetic."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from sa_jax.planning.roofline import Workload


def checkpoint_bytes(config: ConfigDict, total_steps: int, work: Workload) -> dict[str, float]:
    """Bytes of the checkpoints that `training.checkpoints.RunCheckpointer` keeps of a run. Of its
    step, `work`, the number of parameters and their bytes count.

    Returns:
      full_state and weights (bytes of one), full_states and weights_alone (how many are kept), and
      total, at the end of the run. During a save, the checkpoint that it replaces still exists.
    """
    settings = config.checkpoint
    reached = {step for step in settings.steps if step <= total_steps}
    interval = settings.interval
    regular = {*range(interval, total_steps + 1, interval)} if interval else set()
    if settings.listed == "full":
        always = reached | {total_steps}
        full_states = len(always) + min(settings.keep_interval, len(regular - always))
        weights_alone = 0
    else:
        full_states = min(settings.keep_interval, len(regular | {total_steps}))
        weights_alone = len(reached)
    full_state = round(work.trainable * work.state_bytes)
    item_bytes = 2 if settings.listed == "weights_bf16" else jnp.dtype(config.param_dtype).itemsize
    weights = work.trainable * item_bytes
    return {
        "full_state": full_state,
        "weights": weights,
        "full_states": full_states,
        "weights_alone": weights_alone,
        "total": full_states * full_state + weights_alone * weights,
    }
