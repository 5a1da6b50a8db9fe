"""From the `optimizer` section of a config to an optax transformation."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from sa_jax.errors import UsageError
from sa_jax.optim.schedules import make_schedule
from sa_jax.optim.soap_views import ELEMENTWISE, TensorView


def decay_mask(params: Any) -> Any:
    """True on leaves that weight decay applies to: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) != "scale", params
    )


def llama_view(path: str, shape: tuple[int, ...]) -> TensorView:
    """Our Llama's parameters as matrices [in, out]: scanned layers are separate ones, attention's
    heads are merged whether kept apart or not, the vocabulary's side never gets a basis.

    Norms get Adam. LoRA's factors are matrices too.
    """
    if path.endswith("scale"):
        return ELEMENTWISE
    if path.endswith("embed/embedding"):
        return TensorView(0, (1, 1), skip=(0,))
    if path.endswith("lm_head/kernel"):
        return TensorView(0, (1, 1), skip=(1,))
    if len(shape) == 4:  # [L, D, heads, head_dim], or [L, heads, head_dim, D] on the way out
        return TensorView(1, (2, 1) if path.endswith("attention/o/kernel") else (1, 2))
    return TensorView(1, (1, 1))


def make_optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer with decoupled weight decay.

    Args:
      config: the `optimizer` section of a run's config.
      total_steps: updates in the whole run, for the schedule.

    Raises:
      UsageError: an unknown optimizer name.
    """
    schedule = make_schedule(config, total_steps)
    if config.name == "adam":
        optimizer = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    else:
        raise UsageError(f"config.optimizer.name={config.name!r} is unknown; use adam")
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer
