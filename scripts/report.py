"""Writes a report of a run folder, or of a folder of run folders, to WORKDIR/report.

Example:
  python scripts/report.py --workdir=runs/demo
  python scripts/report.py --workdir=runs/demo --serve
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

import dataclasses
from typing import Any

from absl import flags

from sa_jax import cli
from sa_jax.report.thresholds import Thresholds

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder, or folder of run folders.", required=True
)
SERVE = flags.DEFINE_boolean("serve", False, "Serve the report on localhost, and update it.")
PORT = flags.DEFINE_integer("port", 8765, "Port of --serve; 0: any.", 0, 65535)
LIMITS = {
    field.name: (flags.DEFINE_integer if isinstance(field.default, int) else flags.DEFINE_float)(
        field.name, getattr(Thresholds, field.name), field.metadata["help"]
    )
    for field in dataclasses.fields(Thresholds)
}


def main():
    from sa_jax.report.serve import write_or_serve

    chosen: dict[str, Any] = {name: flag.value for name, flag in LIMITS.items()}
    write_or_serve(WORKDIR.value, Thresholds(**chosen), PORT.value if SERVE.value else None)


if __name__ == "__main__":
    cli.run(main, __doc__, places=("--workdir",))
