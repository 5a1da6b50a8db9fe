"""When an eval runs inside training."""

from collections.abc import Sequence

# 'every': at each of `config.eval.steps` and at the last step; 'first+last': before training and at
# the last step.
SCHEDULES = ("every", "last", "first+last")


def is_due(schedule: str, step: int, steps: Sequence[int], last: int) -> bool:
    """Whether an eval runs after `step` of `last` updates; `steps` is `config.eval.steps`."""
    first = schedule == "first+last" and step == 0
    return step == last or first or (schedule == "every" and step in steps)
