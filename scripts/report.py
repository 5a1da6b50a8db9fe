"""Writes DIR/report/index.html for a run folder, or for a folder of run folders.

Example:
  python scripts/report.py --workdir=runs/demo
"""

from absl import flags

from sa_jax import cli
from sa_jax.report.report import report

WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, or folder of run folders.")
flags.mark_flag_as_required("workdir")


def main():
    print(f"report: {report(WORKDIR.value)}")


if __name__ == "__main__":
    cli.run(main, __doc__)
