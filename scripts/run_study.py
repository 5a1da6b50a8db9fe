"""Runs every run of a study in order; skips what is finished, resumes what is not.

Example:
  python scripts/run_study.py --config=configs/toy_study.py --workdir=runs/demo
"""

from absl import flags
from ml_collections import config_flags

from sa_jax import cli
from sa_jax.study.runner import run_study

CONFIG = config_flags.DEFINE_config_file("config", None, "Study; --config.key=value changes one.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study: a run folder below it each.")
flags.mark_flags_as_required(["config", "workdir"])


def main():
    run_study(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, __doc__)
