"""The Llama 3 tokenizer as a Hugging Face folder, from the rank file that Meta publishes: for tests
and benchmarks on real text without a folder of the model."""

import base64
from pathlib import Path

from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from sa_jax.errors import UserError

# Llama 3.1's special tokens by their place after the 128,000 ranks; the others are reserved.
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


class _Converter(TikTokenConverter):
    """Reads the rank file itself, so that no tiktoken package is needed."""

    @staticmethod
    def load_tiktoken_bpe(path):
        pairs = (line.split() for line in Path(path).read_bytes().splitlines() if line)
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


def write_llama3_tokenizer(rank_file: str | Path, folder: str | Path) -> Path:
    """Writes `tokenizer.json` and its config (128,256 ids, no chat template) into `folder`.

    Raises UserError for a file without exactly 128,000 ranks."""
    spare = iter(range(256))
    special = [SPECIAL_TOKENS.get(i) or f"<|reserved_{next(spare)}|>" for i in range(256)]
    try:
        tokenizer = _Converter(str(rank_file), extra_special_tokens=special).converted()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read Llama 3 ranks from {rank_file}: {error}") from error
    if tokenizer.token_to_id("<|eot_id|>") != 128_009:
        raise UserError(f"{rank_file} does not hold the 128,000 ranks of Llama 3")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128_000)]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    fast.save_pretrained(folder)
    return Path(folder)
