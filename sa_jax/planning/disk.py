"""The disk space of a run's checkpoints, by arithmetic."""

from ml_collections import ConfigDict


def checkpoint_bytes(
    settings: ConfigDict,
    total_steps: int,
    *,
    parameters: int,
    item_bytes: int,
    state_bytes: float,
) -> dict[str, float]:
    """Bytes of the checkpoints that `training.checkpoints.RunCheckpointer` keeps.

    Args:
      settings: the `checkpoint` section of a run's config.
      total_steps: of the run.
      parameters: the number of parameters that train.
      item_bytes: bytes per parameter.
      state_bytes: bytes of the full state per parameter.

    Returns:
      full_state and weights (bytes of one), full_states and weights_alone (how many are kept), and
      total, at the end of the run. During a save, the checkpoint that it replaces still exists.
    """
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
    full_state = round(parameters * state_bytes)
    weights = parameters * (2 if settings.listed == "weights_bf16" else item_bytes)
    return {
        "full_state": full_state,
        "weights": weights,
        "full_states": full_states,
        "weights_alone": weights_alone,
        "total": full_states * full_state + weights_alone * weights,
    }
