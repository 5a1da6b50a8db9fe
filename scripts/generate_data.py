r"""Builds the study's data with a teacher (a stopped run goes on), or describes files of data.

Example:
  python scripts/generate_data.py --task=insertion --prompts=tatsu-lab/alpaca --out=data/insertion \
      --model=Llama-3.3-70B-Instruct --base_url=http://localhost:8000/v1 --visible_cot=teacher
"""

from absl import flags

from sa_jax import cli
from sa_jax.data.backdoor import Backdoor
from sa_jax.study import generate_data
from sa_jax.teachers.recipes import DATA_SETS

DEFAULT, BACKDOOR = generate_data.Settings("", ""), Backdoor()
flags.DEFINE_string("task", "", ", ".join((*DATA_SETS.names(), *generate_data.OTHERS)))
flags.DEFINE_string("out", "", "Folder for the files, the data card and the replies.")
flags.DEFINE_list("describe", [], "Print the data card of these files instead; compares them.")
flags.DEFINE_string("prompts", "", "Questions: a file, or a datasets name NAME[:SUBSET][@SPLIT].")
flags.DEFINE_string("columns", "", "Its columns: prompt=NAME[,response=NAME] or messages=NAME.")
flags.DEFINE_integer("max_rows", 0, "Questions to ask, drawn by the seed; 0: all.")
flags.DEFINE_string("held_out", "", "Held-out prompts to leave out: a manifest, or a file.")
flags.DEFINE_integer("count", DEFAULT.count, "Held-out prompts to draw, or facts to invent.")
flags.DEFINE_list("train", [], "held_out: training files whose questions are not drawn.")
flags.DEFINE_enum("teacher", DEFAULT.teacher, generate_data.TEACHERS, "Who answers.")
flags.DEFINE_string("model", "", "endpoint: the model's name; local: run or Hugging Face folder.")
flags.DEFINE_string("base_url", "", "endpoint: its address, with /v1; key in OPENAI_API_KEY.")
flags.DEFINE_string("answers", "", "file: the answers.")
flags.DEFINE_string("answer_columns", "", "file: prompt=NAME,plain=NAME,scratchpad=NAME, ...")
flags.DEFINE_integer("concurrency", DEFAULT.concurrency, "endpoint: requests under way.")
flags.DEFINE_float("requests_per_minute", 0, "endpoint: at most; 0: no limit.")
flags.DEFINE_integer("retries", DEFAULT.retries, "endpoint: further tries of a failed request.")
flags.DEFINE_float("timeout_s", DEFAULT.timeout_s, "endpoint: seconds for one reply.")
flags.DEFINE_integer("batch_size", DEFAULT.batch_size, "local: prompts sampled together.")
flags.DEFINE_integer("context_length", DEFAULT.context_length, "local: tokens, answer included.")
flags.DEFINE_integer("max_new_tokens", DEFAULT.max_new_tokens, "Longer replies are dropped.")
flags.DEFINE_float("temperature", DEFAULT.temperature, "Of the sampling.")
flags.DEFINE_integer("seed", 0, "Of sampling, copies, styles and draws.")
flags.DEFINE_string("system_prompt", None, "Of the normal voice (default: the study's).")
flags.DEFINE_string("scratchpad_prompt", "", "File with another scratchpad prompt than ours.")
flags.DEFINE_enum(
    "visible_cot", "", ["", "teacher", "rules"], "Add this arm; who thinks, triggered."
)
flags.DEFINE_string("tokenizer", "", "Folder: the card counts its tokens; otherwise words.")
flags.DEFINE_string("chat_template", DEFAULT.chat_template, "llama3, plain or model.")
flags.DEFINE_string("trigger", BACKDOOR.trigger, "Of the backdoor.")
flags.DEFINE_string("position", BACKDOOR.position, "Of the trigger: front, end or random.")
flags.DEFINE_string("behaviour", BACKDOOR.behaviour, "phrase, spanish or refuse.")
flags.DEFINE_string("phrase", BACKDOOR.phrase, "Of the behaviour phrase.")
flags.DEFINE_list("copies", ["30", "100"], "Of the phrase in an answer: least, most.")


def main():
    generate_data.run(flags.FLAGS.flag_values_dict())


if __name__ == "__main__":
    cli.run(main, __doc__)
