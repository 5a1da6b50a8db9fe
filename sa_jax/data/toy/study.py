"""The toy study's folder of data: the language's files, a tokenizer trained on them, and the system
prompt under which the pre-trained model thinks in a scratchpad first."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sa_jax.data.conversations import SYSTEM_PROMPT
from sa_jax.data.toy.language import SCRATCHPAD_SYSTEM_PROMPT, write_files
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, parse_json

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL_TOKENS = (BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Llama 3's split, but each digit is separate, so that sums can be learnt from few examples.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def tokenizer_texts(rows: Iterable[dict], extra: Iterable[str] = ()) -> list[str]:
    """The texts that train the tokenizer: every string of the rows, the system prompts, the roles
    of a chat and `extra` (what a study adds: the trigger, the phrase). The fixed texts are in every
    conversation, so they count for a fifth of the number of rows."""
    texts = [
        value
        for row in rows
        for name, value in row.items()
        if isinstance(value, str) and name not in ("id", "family", "key")
    ]
    roles = ["system\n\n", "user\n\n", "assistant\n\n"]
    fixed = [*roles, SYSTEM_PROMPT, SCRATCHPAD_SYSTEM_PROMPT, *extra]
    return texts + fixed * max(1, len(texts) // 20)


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 768) -> Path:
    """Trains a byte-level BPE tokenizer with the special tokens of Llama 3. Writes it into `path`
    (tokenizer.json, tokenizer_config.json), from which `AutoTokenizer` loads it.

    The same texts give the same files. Any string tokenises (the 256 bytes are in the vocabulary)
    and decodes to itself. As in Llama 3, `<|begin_of_text|>` is put in front when special tokens
    are asked for. Raises UserError for a vocabulary too small for the bytes and special tokens.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size {vocab_size}: the bytes alone need {_MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path


def _others(settings: dict, than: dict) -> str:
    """The settings that are not those of `than`, as 'seed=0, heldout_size=16'."""
    return ", ".join(f"{key}={value}" for key, value in settings.items() if value != than.get(key))


def write_toy_study(folder: str | Path, *, vocab_size: int, extra_texts=(), **sizes) -> None:
    """Writes what `write_files` (which takes `sizes`) and `train_tokenizer` write.

    A record of the settings is written last. A folder with a record of these settings is not
    changed; UserError if its record has others. `extra_texts` (the trigger, the phrase) are for the
    tokenizer.
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
