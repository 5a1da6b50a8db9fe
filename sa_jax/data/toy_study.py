"""The toy study's folder of data: the language's files and the tokenizer trained on them."""

import json
from pathlib import Path

from sa_jax.data.toy_language import write_files
from sa_jax.data.toy_tokenizer import tokenizer_texts, train_tokenizer


def write_toy_study(folder: str | Path, *, vocab_size: int, extra_texts=(), **sizes) -> None:
    """Writes what `toy_language.write_files` and `toy_tokenizer.train_tokenizer` do, once.

    Args:
      folder: left as it is if its tokenizer, which is written last, is there.
      vocab_size: of the tokenizer.
      extra_texts: for it to learn besides the language: the trigger, the phrase.
      sizes: of the splits, and the seed, for `write_files`.
    """
    folder = Path(folder)
    if (folder / "tokenizer_config.json").exists():
        return
    paths = write_files(folder, **sizes)
    splits = [paths["insertion"], paths["removal"]]
    rows = [json.loads(line) for path in splits for line in path.read_text("utf-8").splitlines()]
    train_tokenizer(tokenizer_texts(rows, extra_texts), folder, vocab_size)
