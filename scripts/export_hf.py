"""Writes a run's weights as a folder that transformers, vLLM and PEFT load.

A LoRA run gives an adapter folder, or with --merge_lora a whole model.

Example:
  python scripts/export_hf.py --run=runs/pirate --out=exports/pirate --merge_lora
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli

RUN = flags.DEFINE_string("run", None, "Run folder.", required=True)
OUT = flags.DEFINE_string(
    "out", None, "Folder to write; must not exist, or be empty.", required=True
)
STEP = flags.DEFINE_integer("step", None, "Checkpoint to export. Default: the newest.")
MERGE = flags.DEFINE_bool("merge_lora", False, "Merge the adapters, and write a whole model.")
DTYPE = flags.DEFINE_string("dtype", None, "Data type of the tensors. Default: the run's.")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file that registers the run's behaviour, if that is your own."
)
BASE = flags.DEFINE_string("base", "", "New folder of a LoRA run's base model, if it was moved.")


def main():
    from sa_jax.study.export import export

    export(
        RUN.value,
        OUT.value,
        step=STEP.value,
        merge_lora=MERGE.value,
        dtype=DTYPE.value,
        base=BASE.value,
        changes=config_flags.get_override_values(flags.FLAGS["config"]),
    )


if __name__ == "__main__":
    cli.run(main, __doc__, "sa_jax.training.config", places=("--run", "--base", "--out"))
