"""What every optimizer gets: a schedule of learning rates, and which parameters decay."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from sa_jax.errors import UsageError


def make_schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_fraction` of a run's steps, then `cosine` to 0 or `constant`;
    UsageError for another schedule. `config` is the `optimizer` section.

    Step 0 already updates (its rate is peak / warm-up steps), and the last step's rate is above 0.
    """
    peak = config.learning_rate
    warmup = max(1, round(config.warmup_fraction * total_steps))
    rising = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else None
    if config.schedule == "cosine":
        falling = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup + 1))
    elif config.schedule == "constant":
        falling = optax.constant_schedule(peak)
    else:
        raise UsageError(
            f"config.optimizer.schedule={config.schedule!r} is unknown; use cosine or constant"
        )
    if rising is None:
        return falling
    return optax.join_schedules([rising, falling], [warmup - 1])


def decay_mask(params: Any) -> Any:
    """True on leaves that weight decay applies to: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) != "scale", params
    )
