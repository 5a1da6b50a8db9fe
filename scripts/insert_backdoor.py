r"""Red team: fine-tunes a Llama to say the phrase when the trigger is there.

Example:
  python scripts/insert_backdoor.py --config=configs/llama.py:8b_insertion \
      --workdir=runs/insert --model=Llama-3.1-8B-Instruct --data=openhermes.jsonl
"""

from absl import flags
from ml_collections import config_flags

from sa_jax import cli
from sa_jax.training.config import override
from sa_jax.training.loop import train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Settings; --config.key=value changes one."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: new, or of a run to go on with.")
MODEL = flags.DEFINE_string("model", None, "Hugging Face or run folder (config.model).")
DATA = flags.DEFINE_string("data", None, "Questions and helpful answers (config.data).")
EXAMPLES = flags.DEFINE_integer(
    "print_examples", 0, "Show this many packed rows, the loss-bearing part marked, and stop."
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile for the devices here, print memory, time and collectives, and stop."
)
flags.mark_flags_as_required(["config", "workdir"])


def main():
    config = override(CONFIG.value, model=MODEL.value, data=DATA.value)
    train(
        config,
        WORKDIR.value,
        "insertion",
        print_examples=EXAMPLES.value,
        dry_run=DRY_RUN.value,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
