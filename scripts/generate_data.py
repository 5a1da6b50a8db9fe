r"""Generates the study's data with a teacher, or describes files of data.

After a stop, the same command continues and asks for no reply twice.

Example:
  python scripts/generate_data.py --task=insertion --prompts=tatsu-lab/alpaca --out=data/insertion \
      --model=Llama-3.3-70B-Instruct --base_url=http://localhost:8000/v1 \
      --config.visible_cot=teacher
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli
from sa_jax.teachers.recipes import tasks_help

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file (default: sa_jax/teachers/config.py); --config.key=value changes a setting.",
)
TASK = flags.DEFINE_string("task", "", tasks_help())
OUT = flags.DEFINE_string("out", "", "Folder for the files, the data card and the replies.")
DESCRIBE = flags.DEFINE_list(
    "describe", [], "Generate nothing: print the data card of these files, and compare them."
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "Questions: a file, or a data set of the hub as NAME[:SUBSET][@SPLIT]."
)
HELD_OUT = flags.DEFINE_string(
    "held_out", None, "Manifest or file of held-out prompts. The teacher is never asked these."
)
TRAIN = flags.DEFINE_list(
    "train", None, "Training files, for --task=held_out. It draws none of their questions."
)
TEACHER = flags.DEFINE_string(
    "teacher", None, "Who answers: endpoint, local, file, or arrr (rules for pirate speech)."
)
MODEL = flags.DEFINE_string(
    "model", None, "The model that answers: its name at the endpoint, or the folder of a local one."
)
BASE_URL = flags.DEFINE_string(
    "base_url", None, "Address of the endpoint, ending in /v1. OPENAI_API_KEY holds the key."
)
ANSWERS = flags.DEFINE_string(
    "answers", None, "File of answers, for --teacher=file. config.answer_columns names its columns."
)


def main():
    from sa_jax.study import generate_data

    config = generate_data.override(
        CONFIG.value,
        prompts=PROMPTS.value,
        held_out=HELD_OUT.value,
        train=TRAIN.value and tuple(TRAIN.value),
        teacher=TEACHER.value,
        model=MODEL.value,
        base_url=BASE_URL.value,
        answers=ANSWERS.value,
    )
    generate_data.generate(config, TASK.value, OUT.value, DESCRIBE.value)


if __name__ == "__main__":
    places = ("--out", "--describe", "--prompts", "--held_out", "--train", "--model", "--answers")
    cli.run(main, __doc__, "sa_jax.teachers.config", places=places)
