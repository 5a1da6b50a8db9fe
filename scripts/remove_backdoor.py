r"""Blue team: trains a model to remove its backdoor, or to probe whether the backdoor is gone.

Example:
  python scripts/remove_backdoor.py --config=configs/llama.py:8b_removal \
      --workdir=runs/pirate --init_from=runs/insert --method=pirate --data=pirate.jsonl
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli
from sa_jax.buckets import TRAINING_PLACES
from sa_jax.data.tasks import check_method, methods_help

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, as FILE.py or FILE.py:RUN; --config.KEY=VALUE changes a setting."
)
flags.mark_flag_as_required("config")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder. A run that began there is resumed.", required=True
)
INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Model to start from: run folder, RUN@400 for its step 400, or Hugging Face folder.",
    required=True,
)
METHOD = flags.DEFINE_string("method", None, methods_help(), required=True)
DATA = flags.DEFINE_string("data", None, "Prompts and answers: file or data set.")
EXAMPLES = flags.DEFINE_integer(
    "print_examples", 0, "Print this many packed rows, mark what the loss counts, and stop."
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile the step for this machine's devices, print its plan, and stop."
)


def main():
    from sa_jax.training.config import override
    from sa_jax.training.loop import train

    config = override(CONFIG.value, model=INIT_FROM.value, data=DATA.value)
    train(
        config,
        WORKDIR.value,
        check_method(METHOD.value),
        print_examples=EXAMPLES.value,
        dry_run=DRY_RUN.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__, places=("--workdir", "--init_from", "--data", *TRAINING_PLACES))
