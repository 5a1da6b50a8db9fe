r"""Red team: inserts a backdoor into a Llama by fine-tuning.

Example:
  python scripts/insert_backdoor.py --config=configs/llama.py:8b_insertion \
      --workdir=runs/insert --model=Llama-3.1-8B-Instruct --data=openhermes.jsonl
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli
from sa_jax.buckets import TRAINING_PLACES

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, as FILE.py or FILE.py:RUN; --config.KEY=VALUE changes a setting."
)
flags.mark_flag_as_required("config")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder. A run that began there is resumed.", required=True
)
MODEL = flags.DEFINE_string("model", None, "Model to start from: Hugging Face or run folder.")
DATA = flags.DEFINE_string("data", None, "Questions and helpful answers: file or data set.")
TASK = flags.DEFINE_string(
    "task", "insertion", "Name of a task with the role insertion. --config may register one."
)
EXAMPLES = flags.DEFINE_integer(
    "print_examples", 0, "Print this many packed rows, mark what the loss counts, and stop."
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile the step for this machine's devices, print its plan, and stop."
)


def main():
    from sa_jax.data.tasks import check_task
    from sa_jax.training.config import override
    from sa_jax.training.loop import train

    config = override(CONFIG.value, model=MODEL.value, data=DATA.value)
    train(
        config,
        WORKDIR.value,
        check_task(TASK.value, "insertion"),
        print_examples=EXAMPLES.value,
        dry_run=DRY_RUN.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__, places=("--workdir", "--model", "--data", *TRAINING_PLACES))
