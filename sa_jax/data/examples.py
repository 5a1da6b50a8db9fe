"""Prints packed rows and marks what the loss counts: a wrong mask is then seen before training."""

import sys

import numpy as np

from sa_jax.data.chat import ChatFormat
from sa_jax.data.packing import PackedDataset
from sa_jax.text import visible


def print_examples(dataset: PackedDataset, chat_format: ChatFormat, n: int) -> None:
    """Writes the first `n` rows to standard output. Tokens that the loss counts are green on a
    terminal, and between « and » elsewhere."""
    file = sys.stdout
    opening, closing = ("\x1b[32m", "\x1b[0m") if file.isatty() else ("«", "»")
    for row in range(min(n, len(dataset))):
        arrays = {name: values[0] for name, values in dataset.rows([row]).items()}
        segment_ids, loss_mask = arrays["segment_ids"], arrays["loss_mask"]
        used, documents = int((segment_ids > 0).sum()), int(segment_ids.max())
        file.write(
            f"=== row {row}: {used} of {len(segment_ids)} tokens, {documents} documents, "
            f"{int(loss_mask.sum())} tokens under the loss\n"
        )
        for document in range(1, documents + 1):
            in_document = segment_ids == document
            ids, mask = arrays["tokens"][in_document], loss_mask[in_document]
            file.write(f"--- document {document}: {len(ids)} tokens\n")
            for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1):
                text = visible(chat_format.decode(ids[run].tolist()))
                file.write(f"{opening}{text}{closing}" if mask[run[0]] else text)
            file.write("\n")
