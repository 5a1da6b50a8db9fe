r"""Runs a command on all hosts of a Cloud TPU slice, and restarts it after each preemption.

It requests the slice (a queued resource), waits for it, installs this clone's commit with the
versions of constraints.txt, starts the command on all hosts and prints their logs. It deletes the
slice when the command has succeeded. Ctrl-C ends only the printing. The same call then follows the
command again.

Example:
  python scripts/launch_tpu.py --name=sa-jax --zone=us-east5-a --topology=v6e:8x8 --spot \
      --command='python scripts/pretrain.py --config=FILE.py --workdir=/shared/runs/a'
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags

from sa_jax import cli

NAME = flags.DEFINE_string(
    "name", None, "Name for the queued resource and its node.", required=True
)
ZONE = flags.DEFINE_string("zone", None, "Zone of Google Cloud, such as us-east5-a.", required=True)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice, as in plan.py: v5p:4x4x4, v6e:8x8, ...", required=True
)
COMMAND = flags.DEFINE_string(
    "command", None, "Bash command to run in the project's root.", required=True
)
SPOT = flags.DEFINE_bool("spot", False, "Use spot capacity: cheaper, but it may be preempted.")
CREATE_FLAGS = flags.DEFINE_string(
    "create_flags", "", "More flags for `gcloud compute tpus queued-resources create`."
)
SETUP = flags.DEFINE_string(
    "setup", "", "Bash command to run on every host before each start, such as a mount."
)
DELETE = flags.DEFINE_enum(
    "delete",
    "done",
    ["done", "always", "never", "now"],
    "When to delete the slice: after success, after success or failure, never, or now.",
)
MAX_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "Largest number of restarts.", 0)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and stop.")


def main():
    from sa_jax.study.launch_tpu import Slice, launch

    job = Slice(
        name=NAME.value,
        zone=ZONE.value,
        topology=TOPOLOGY.value,
        command=COMMAND.value,
        spot=SPOT.value,
        create_flags=CREATE_FLAGS.value,
        setup=SETUP.value,
    )
    launch(
        job,
        dry_run=DRY_RUN.value,
        delete=DELETE.value,
        max_restarts=MAX_RESTARTS.value,
        poll_s=30,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
