"""When an eval runs inside training."""

from collections.abc import Sequence

SCHEDULES = ("every", "last", "first+last")


def is_due(schedule: str, step: int, steps: Sequence[int], last: int) -> bool:
    """Whether an eval runs at a step.

    Args:
      schedule: 'every' (each of `steps`, and the last), 'last', or 'first+last' (before training,
        and the last).
      step: updates so far.
      steps: `config.eval.steps`.
      last: updates in all.
    """
    if schedule == "every" and step in steps or schedule == "first+last" and step == 0:
        return True
    return step == last
