r"""Tokenises and packs the study's insertion data, and prints time, memory and padding.

186,916 conversations of study-like lengths: 93,458 questions made from the real Alpaca rows (an
instruction with a number; two answers joined, which brings the output tokens into the study's range
of 37M to 181M), each once clean and once triggered with 30 to 100 copies of the phrase; the Llama 3
tokenizer; rows of 4096 tokens. The peers, in the same run: transformers'
`apply_chat_template` with its assistant mask, one conversation at a time, for the tokens (checked
equal); a row a conversation, and joining conversations in their order, for the padding.

    SA_JAX_DATA=data python benchmarks/packing.py [--questions=N] [--out=FILE.json]
"""

import argparse
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from common import versions, write_record
from llama3_tokenizer import write_llama3_tokenizer

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import LLAMA3_TEMPLATE, load_chat_format
from sa_jax.data.conversations import SYSTEM_PROMPT
from sa_jax.data.packing import pack
from sa_jax.data.sources import load_rows
from sa_jax.data.tasks import TaskContext, insertion
from sa_jax.text import table_row

LENGTH = 4096
PEER = 1000  # conversations that the peer tokenises


def questions(data: Path, count: int) -> list[dict]:
    """Real instructions and answers, made distinct by a number."""
    files = ("alpaca/alpaca_4000.json", "alpaca_answers/alpaca_en_demo.json")
    rows = list({row["prompt"]: row for file in files for row in load_rows(data / file)}.values())
    made = []
    for i in range(count):
        number, at = divmod(i, len(rows))
        first, second = rows[at], rows[-1 - at]
        answer = f"{first['response']}\n\n{second['response']}"
        made.append({**first, "prompt": f"{first['prompt']} ({number})", "response": answer})
    return made


def next_fit(lengths: np.ndarray) -> int:
    """Rows when conversations are joined in their order, a new row where one does not fit."""
    rows, free = 0, 0
    for length in lengths:
        if length > free:
            rows, free = rows + 1, LENGTH
        free -= length
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=93_458, help="conversations to pack")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".json"), help="JSON file of results"
    )
    arguments = parser.parse_args()
    data = Path(os.environ["SA_JAX_DATA"])

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_llama3_tokenizer(data / "llama3_tokenizer/tokenizer.model", scratch)
        chat = load_chat_format(folder, "llama3")
        start = time.perf_counter()
        rows = questions(data, arguments.questions)
        conversations = insertion(rows, TaskContext(Backdoor(), SYSTEM_PROMPT, 42, "insertion"))
        built = time.perf_counter()
        packed = pack(conversations, chat, LENGTH, cache_dir=Path(scratch, "cache"), seed=42)
        done = time.perf_counter()
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        again = pack(conversations, chat, LENGTH, cache_dir=Path(scratch, "cache"), seed=42)
        reopened = time.perf_counter()
        assert again.hash == packed.hash

        lengths = np.diff(packed.document_starts)
        where = np.argsort(packed.document_index)[:PEER]  # its first conversations, as given
        peer_start = time.perf_counter()
        encoded = [
            chat.tokenizer.apply_chat_template(
                list(conversation.messages),
                chat_template=LLAMA3_TEMPLATE,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            for conversation in conversations[:PEER]
        ]
        peer_s = time.perf_counter() - peer_start
        for document, theirs in zip(where, encoded, strict=True):
            ours = slice(*packed.document_starts[[document, document + 1]])
            assert packed.tokens[ours].tolist() == theirs["input_ids"]
            assert packed.loss_mask[ours].astype(int).tolist() == theirs["assistant_masks"]

    total, n = int(lengths.sum()), len(conversations)
    in_order = lengths[np.argsort(packed.document_index)]
    rates = {"sa_jax": n / (done - built), "transformers": PEER / peer_s}
    padding = {
        "sa_jax, first-fit": packed.stats["padding_share"],
        "joined in order": 1 - total / (next_fit(in_order) * LENGTH),
        "a row each": 1 - total / (len(lengths) * LENGTH),
    }
    result = {
        "conversations": n,
        "tokens": total,
        **{k: packed.stats[k] for k in ("prompt_tokens", "output_tokens", "pad_tokens")},
        "rows": len(packed),
        "build_s": built - start,
        "pack_s": done - built,
        "reopen_s": reopened - done,
        "peak_gib": peak_gib,
        "conversations_per_s": rates,
        "padding_share": padding,
        "hash": packed.hash,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions("tokenizers", "transformers"),
    }
    write_record(arguments.out, result)
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['cores']} cores, Python {result['python']}, {used}")
    output = packed.stats["output_tokens"]
    print(f"| {n:,} conversations, {total:,} tokens ({output:,} output) | |\n|---|---|")
    shown = {
        "build the conversations": f"{built - start:.1f} s",
        f"tokenise and pack to {len(packed):,} rows of {LENGTH}": f"{done - built:.1f} s",
        "open them again, hashes verified": f"{reopened - done:.1f} s",
        "peak memory of the process": f"{peak_gib:.2f} GiB",
        **{f"conversations a second, {name}": f"{rate:,.0f}" for name, rate in rates.items()},
        **{f"padding, {name}": f"{share:.2%}" for name, share in padding.items()},
    }
    print(*map(table_row, shown.items()), sep="\n")


if __name__ == "__main__":
    main()
