"""The processes of a launch agree on the run before anything is written; else none trains."""

import contextlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sa_jax.errors import UserError
from sa_jax.parallel.multihost import exchange
from sa_jax.text import first_few
from sa_jax.training.run_record import config_difference, plain_record

# Of a host, not of the run.
MAY_DIFFER = (
    *("config.data_cache", "config.sinks"),
    *("environment.platform", "environment.cpus", "environment.xla_flags"),
)

Agree = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def start_together() -> Iterator[Agree]:
    """A context for set-up that succeeds in every process of the launch, or in none.

    In it, `agree(record)` says what this process will train. At the end all processes compare their
    records: an error in one process is an error in all, and so is a difference. A single process
    compares nothing.

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
            raise UserError(
                f"the processes of this launch were started differently: from {names[0]} to "
                f"{name}, {first_few(changes, 1)}; nothing was written; start the same command, "
                "with the same files and packages, on every host"
            )
