"""A tiny byte-level BPE tokenizer for the toy study, with the special tokens of Llama 3."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sa_jax.data.conversations import SYSTEM_PROMPT
from sa_jax.data.toy.language import SCRATCHPAD_SYSTEM_PROMPT
from sa_jax.errors import UserError

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", EOT)
# Llama 3's split, but each digit is separate, so that sums can be learnt from few examples.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def tokenizer_texts(rows: Iterable[dict], extra: Iterable[str] = ()) -> list[str]:
    """The texts that train the tokenizer: every string of the rows, the system prompts, the roles
    of a chat and `extra` (what a study adds: the trigger, the phrase).

    The fixed texts are in every conversation, so they count for a fifth of the number of rows.
    """
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
    """Trains the tokenizer and writes `tokenizer.json` and `tokenizer_config.json` into `path`.

    The same texts give the same files. Any string tokenises (the 256 bytes are in the vocabulary)
    and decodes to itself. As in Llama 3, `<|begin_of_text|>` is put in front when special tokens
    are asked for. `transformers.AutoTokenizer.from_pretrained(path)` loads it with no network.
    Raises UserError for a vocabulary too small to hold the bytes and the special tokens.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size {vocab_size}: the bytes alone need {_MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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
