"""Runs a study: every cell that is not done yet, each a process of its own.

Any number of these commands, on any machines that share the folder, divide the cells among them.
Exit status 1 if cells failed (the others are done), 75 if it was stopped: run it again to go on.
Example:
  python scripts/run_study.py --config=configs/toy_study.py --workdir=runs/demo
"""

import sa_jax.early_stop  # noqa: F401  (first: it handles signals)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli
from sa_jax.study.claims import TAKEOVER_S

CONFIG = config_flags.DEFINE_config_file("config", None, "Study; --config.key=value changes one.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study: a folder below it each cell.")
ONLY = flags.DEFINE_string("only", "", "Run these cells alone: patterns, such as 'hhh/*,pirate/*'.")
SHARD = flags.DEFINE_string("shard", "", "i/n: run every n-th cell, and those it comes from.")
WORKERS = flags.DEFINE_integer("workers", 1, "Cells at a time; the devices are divided.")
LAUNCH = flags.DEFINE_string("launch", "", "Command that starts a cell on several hosts: srun ...")
TAKEOVER = flags.DEFINE_float(
    "takeover_s", TAKEOVER_S, "A worker silent for so many seconds loses its cells to another."
)
LIST = flags.DEFINE_bool("list", False, "Print the cells and their states, and stop.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print cells, tokens, chip-hours and disk, by arithmetic, and stop."
)
EMIT = flags.DEFINE_string(
    "emit", "", "Write the study as files for a cluster: slurm, sky, xpk or shell."
)
flags.mark_flags_as_required(["config", "workdir"])


def main():
    from sa_jax.study.study import Options, run_study

    options = Options(
        only=ONLY.value,
        shard=SHARD.value,
        workers=WORKERS.value,
        launch=LAUNCH.value.split(),
        takeover_s=TAKEOVER.value,
        list=LIST.value,
        dry_run=DRY_RUN.value,
        emit=EMIT.value,
    )
    run_study(CONFIG.value, WORKDIR.value, options)


if __name__ == "__main__":
    cli.run(main, __doc__)
