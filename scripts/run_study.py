"""Runs a study: every cell that is not done yet, each in its own process.

Machines that share the folder divide the cells among them: run this command on each.
Exit status: 1 if cells failed (the others are done), 75 if the study was stopped. The same command
resumes it.

Example:
  python scripts/run_study.py --config=configs/toy_study.py --workdir=runs/demo
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli
from sa_jax.study.claims import TAKEOVER_S

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file of the study; --config.key=value changes a setting."
)
flags.mark_flag_as_required("config")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the study, with a folder for each cell.", required=True
)
ONLY = flags.DEFINE_string("only", "", "Run only cells of these patterns: 'removal/*,probe/*'.")
SHARD = flags.DEFINE_string("shard", "", "i/n: run every n-th cell, and the cells it needs.")
WORKERS = flags.DEFINE_integer("workers", 1, "Cells that run at once. They share the devices.")
LAUNCH = flags.DEFINE_string("launch", "", "Command that starts a cell on several hosts: srun ...")
TAKEOVER = flags.DEFINE_float(
    "takeover_s", TAKEOVER_S, "Seconds of silence after which others take a worker's cells."
)
LIST = flags.DEFINE_bool("list", False, "Print the cells and their states, and stop.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compute and print cells, tokens, chip-hours and disk space, and stop."
)
EMIT = flags.DEFINE_string(
    "emit", "", "Write files that run the study on a cluster: slurm, sky, xpk or shell."
)


def main():
    from sa_jax.study.study import run_study

    flag = flags.FLAGS["config"]
    changes = config_flags.get_override_values(flag).items()
    run_study(
        CONFIG.value,
        WORKDIR.value,
        only=ONLY.value,
        shard=SHARD.value,
        workers=WORKERS.value,
        launch=LAUNCH.value.split(),
        takeover_s=TAKEOVER.value,
        list_cells=LIST.value,
        dry_run=DRY_RUN.value,
        emit=EMIT.value,
        config_flags=[
            f"--config={config_flags.get_config_filename(flag)}",
            *(f"--config.{key}={value}" for key, value in changes),
        ],
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
