"""The processes of a launch train one run, or none does: they compare notes before anything is
written."""

import contextlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sa_jax.errors import UserError
from sa_jax.parallel.multihost import exchange
from sa_jax.training.run_record import config_difference, plain_record

# Of a host, not of the run.
MAY_DIFFER = (
    *("config.data_cache", "config.sinks"),
    *("environment.platform", "environment.cpus", "environment.xla_flags"),
)

Agree = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def start_together() -> Iterator[Agree]:
    """Set-up that succeeds in every process of the launch, with the same outcome, or in none.

    Inside, `agree(record)` states what this process is about to train. At the end each process
    learns of the others': an error in one is an error in all, and so is a difference. A process
    that is alone compares nothing.

    Raises:
      UserError: names the process with the error, or the first difference with both values.
    """
    record: dict[str, Any] = {}
    try:
        yield record.update
    except Exception as error:
        if jax.process_count() > 1:
            _compare({"error": f"{error or type(error).__name__}"})
        raise
    if jax.process_count() > 1:
        _compare({"record": record})


def _compare(mine: Mapping[str, Any]) -> None:
    mine = plain_record({"host": platform.node(), **mine})
    notes = [json.loads(text) for text in exchange(json.dumps(mine))]
    names = [f"process {number} ({note['host']})" for number, note in enumerate(notes)]
    if "error" in mine:
        return  # which the caller raises
    for name, note in zip(names, notes, strict=True):
        if "error" in note:
            raise UserError(f"{name} could not start: {note['error']}")
    for name, note in zip(names[1:], notes[1:], strict=True):
        changes = config_difference(notes[0]["record"], note["record"], MAY_DIFFER)
        if changes:
            more = f" (and {len(changes) - 1} more)" if changes[1:] else ""
            raise UserError(
                f"the processes of this launch were started differently: from {names[0]} to "
                f"{name}, {changes[0]}{more}; nothing was written; start the same command, with "
                "the same files and packages, on every host"
            )
