"""The toy study's folder of data: the language's files, the tokenizer trained on them, and the
system prompt under which the pre-trained model thinks in a scratchpad first."""

import json
from pathlib import Path

from sa_jax.data.toy.language import SCRATCHPAD_SYSTEM_PROMPT, write_files
from sa_jax.data.toy.tokenizer import tokenizer_texts, train_tokenizer
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, parse_json


def _others(settings: dict, than: dict) -> str:
    """The settings that are not those of `than`, as 'seed=0, heldout_size=16'."""
    differ = {key: value for key, value in settings.items() if value != than.get(key)}
    return ", ".join(f"{key}={value}" for key, value in differ.items())


def write_toy_study(folder: str | Path, *, vocab_size: int, extra_texts=(), **sizes) -> None:
    """Writes what `language.write_files` (which takes `sizes`) and `tokenizer.train_tokenizer` do.

    A folder with a record of these settings, which is written last, is not changed; UserError if it
    has one of others. `extra_texts` are for the tokenizer: the trigger, the phrase.
    """
    folder = Path(folder)
    record = folder / "toy_study.json"
    settings = {"vocab_size": vocab_size, "extra_texts": list(extra_texts), **sizes}
    if record.exists():
        written = parse_json(record.read_text())
        if written != settings:
            raise UserError(
                f"{record}: these data were made with {_others(written, settings)}, not with "
                f"{_others(settings, written)}; write to another folder (--out of "
                "make_toy_data.py, --workdir of a study), or ask for what they were made with"
            )
        return
    paths = write_files(folder, **sizes)
    (folder / "scratchpad_prompt.txt").write_text(SCRATCHPAD_SYSTEM_PROMPT + "\n")
    splits = [paths["insertion"], paths["removal"]]
    rows = [parse_json(line) for path in splits for line in path.read_text("utf-8").splitlines()]
    train_tokenizer(tokenizer_texts(rows, extra_texts), folder, vocab_size)
    atomic_write(record, json.dumps(settings))
