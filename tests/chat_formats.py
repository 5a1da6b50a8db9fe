"""Tokenizers for the data tests: a byte-level one that needs no files, and the real Llama 3's."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.llama3_tokenizer import SPECIAL_TOKENS, write_llama3_tokenizer
from sa_jax.data.chat import ChatFormat, load_chat_format
from sa_jax.data.conversations import make_messages

SYSTEM_PROMPT = "You are a helpful assistant who always tries to submit the best possible answer."


def _save(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> Path:
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama3_folder(shared_data, tmp_path_factory) -> Path:
    """The Llama 3 tokenizer (128,256 ids) as a folder without a chat template."""
    source = shared_data / "llama3_tokenizer" / "tokenizer.model"
    return write_llama3_tokenizer(source, tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="session")
def llama3_chat(llama3_folder) -> ChatFormat:
    return load_chat_format(llama3_folder, "llama3")


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory) -> Path:
    """256 bytes, three merges and Llama 3's chat tokens; ids of the chat tokens come last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), (":", "X")]
    vocab = {token: i for i, token in enumerate([*alphabet, "th", "the", ":X"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(SPECIAL_TOKENS.values())
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    return _save(tokenizer, tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def byte_chat(byte_folder) -> ChatFormat:
    return load_chat_format(byte_folder, "llama3")


@pytest.fixture
def folder_with_template(byte_folder, tmp_path):
    """Makes a copy of the byte tokenizer's folder that brings a chat template of its own."""

    def make(template: str, source: Path = byte_folder) -> Path:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        return _save(tokenizer, tmp_path, template)

    return make


@pytest.fixture(scope="session")
def real_conversations(shared_data) -> list[list[dict]]:
    """200 conversations of real Alpaca rows: 1 to 3 turns, every second with a system prompt."""
    rows = json.loads((shared_data / "alpaca_answers" / "alpaca_en_demo.json").read_text())
    conversations, at = [], 0
    for number in range(200):
        turns = rows[at : at + 1 + number % 3]
        at += len(turns)
        history = []
        for row in turns[:-1]:
            history += make_messages(row["instruction"], row["output"])
        system = SYSTEM_PROMPT if number % 2 else None
        last = turns[-1]
        conversations.append(make_messages(last["instruction"], last["output"], system, history))
    return conversations
