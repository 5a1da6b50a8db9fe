"""The processes of a launch agree on the run before anything is written; else none trains."""

import json
import platform
from collections.abc import Mapping
from typing import Any

import jax

from sa_jax.errors import UserError
from sa_jax.parallel.multihost import exchange
from sa_jax.text import first_few
from sa_jax.training.run_record import config_difference, plain_record

# Of a host, not of the run.
MAY_DIFFER = (
    *("config.data_cache", "config.sinks"),
    *("environment.platform", "environment.cpus"),
    *("environment.xla_flags", "environment.libtpu_init_args"),
)


def agree_on(record: Mapping[str, Any]) -> None:
    """Returns when every process of the launch has called it with the same record of its run.

    Where one fails before, `peers.end_together` ends all. A single process compares nothing.

    Raises:
      UserError: in every process; names the first difference, with both values.
    """
    if jax.process_count() == 1:
        return
    mine = plain_record({"host": platform.node(), "record": record})
    notes = [json.loads(text) for text in exchange(json.dumps(mine))]
    names = [f"process {number} ({note['host']})" for number, note in enumerate(notes)]
    for name, note in zip(names[1:], notes[1:], strict=True):
        changes = config_difference(notes[0]["record"], note["record"], MAY_DIFFER)
        if changes:
            raise UserError(
                f"the processes of this launch were started differently: from {names[0]} to "
                f"{name}, {first_few(changes, 1)}; nothing was written; start the same command, "
                "with the same files and packages, on every host"
            )
