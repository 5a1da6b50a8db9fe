r"""Runs a command on all hosts of a Cloud TPU slice, again after each preemption, until it is done.

Asks for the slice (a queued resource) and waits for it, installs this checkout's commit with the
pins of constraints.txt, starts the command on all hosts and prints their logs. The slice is deleted
at the end. Ctrl-C ends only the printing: the same call follows the command again.

Example:
  python scripts/launch_tpu.py --name=sa-jax --zone=us-east5-a --topology=v6e:8x8 --spot \
      --command='python scripts/pretrain.py --config=FILE.py --workdir=/shared/runs/a'
"""

import sa_jax.early_stop  # noqa: F401  (first: it handles signals)

import shlex

from absl import flags

from sa_jax import cli

NAME = flags.DEFINE_string("name", None, "Name of the queued resource and of its node.")
ZONE = flags.DEFINE_string("zone", None, "Zone of Google Cloud, such as us-east5-a.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Slice, as in plan.py: v5p:4x4x4, v6e:8x8, ...")
COMMAND = flags.DEFINE_string("command", None, "Line for bash, run in the project's root.")
SPOT = flags.DEFINE_bool("spot", False, "Take spot capacity, which is cheap and preempted.")
CREATE_FLAGS = flags.DEFINE_string(
    "create_flags", "", "Further flags of `gcloud compute tpus queued-resources create`."
)
SETUP = flags.DEFINE_string(
    "setup", "", "Line for bash on every host before the installation, such as a mount."
)
DELETE = flags.DEFINE_enum(
    "delete",
    "done",
    ["done", "always", "never", "now"],
    "Delete the slice when the command is done, also when it fails, never, or now.",
)
MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "How often to start again.", 0)
POLL_S = flags.DEFINE_float("poll_s", 30, "Seconds between two looks at the slice.", 0.01)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and stop.")
flags.mark_flags_as_required(["name", "zone", "topology", "command"])


def main():
    from sa_jax.study.launch_tpu import Slice, launch

    job = Slice(
        name=NAME.value,
        zone=ZONE.value,
        topology=TOPOLOGY.value,
        command=COMMAND.value,
        spot=SPOT.value,
        create_flags=tuple(shlex.split(CREATE_FLAGS.value)),
        setup=SETUP.value,
    )
    launch(
        job,
        dry_run=DRY_RUN.value,
        delete=DELETE.value,
        max_restarts=MAX_RESTARTS.value,
        poll_s=POLL_S.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
