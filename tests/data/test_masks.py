"""The loss is on the assistant's words and the token that ends its turn, and on nothing else: read
back from packed real conversations, in three templates."""

import pytest

from sa_jax.data.chat import load_chat_format
from sa_jax.data.conversations import Conversation
from sa_jax.data.packing import pack

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)


@pytest.fixture(params=["llama3", "plain", "model"])
def chat(request, llama3_folder, folder_with_template):
    if request.param == "model":
        return load_chat_format(folder_with_template(CHATML, llama3_folder), "model")
    return load_chat_format(llama3_folder, request.param)


def test_masks_of_packed_real_conversations(chat, real_conversations, tmp_path):
    given = [Conversation(tuple(c), "hhh", f"row {i}") for i, c in enumerate(real_conversations)]
    dataset = pack(given, chat, 4096, cache_dir=tmp_path)
    assert len(dataset.document_index) == len(given) == 200
    end = "<|eot_id|>"
    for place, number in enumerate(dataset.document_index):
        here = slice(*dataset.document_starts[[place, place + 1]])
        tokens, mask = dataset.tokens[here], dataset.loss_mask[here]
        said = [m["content"] for m in given[number].messages if m["role"] == "assistant"]
        said = said if chat.name == "model" else [text.strip() for text in said]
        assert chat.decode(tokens[mask].tolist()) == "".join(text + end for text in said)
        # Every run of scored tokens is one answer: no gap, no header, no other role between.
        starts = (mask[1:] & ~mask[:-1]).sum()
        assert starts == len(said) and not mask[0]
