"""Packs conversations into fixed-length rows on disk, memory-mapped and cached by the input's hash.

A packed folder `packed-<hash>/` holds, documents in row order:
  tokens.npy           int32 [N]    the documents' tokens, one after another, no padding
  loss_mask.npy        bool  [N]    true where the loss counts the token
  document_starts.npy  int64 [D+1]  first token of each document
  row_documents.npy    int64 [R+1]  first document of each row
  document_index.npy   int64 [D]    the conversation each document came from
  meta.json            hash, sequence length, token accounting, sha256 of every file
It is written under a temporary name and renamed, so it is complete or absent; a folder that does
not match its sha256s is built again. Tokens are first written to `.packed-<hash>-parts/`, one part
at a time, so that a killed call resumes with the current part.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from sa_jax.data import randomness
from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation, check_messages
from sa_jax.errors import UserError
from sa_jax.files import parse_json
from sa_jax.text import visible

_VERSION = 2  # of the folder's layout and of the packing order; part of the hash
_OPEN_ROWS = 256  # rows that may still take a document; more pads less and costs time
PART = 4096  # conversations tokenised at once, and lost at most when killed
_PART_ARRAYS = ("tokens", "loss_mask", "lengths")  # lengths last: where it is, the others are
_ARRAYS = ("tokens", "loss_mask", "document_starts", "row_documents", "document_index")
_DROPS = ("dropped_too_long", "dropped_with_pair", "over_budget")


@dataclasses.dataclass(frozen=True)
class PackedDataset:
    """`len(dataset)` rows of `sequence_length` tokens each, read from memory-mapped arrays."""

    folder: Path
    hash: str  # of all that determines the bytes, see `content_hash`
    sequence_length: int
    stats: dict  # token accounting, see `_account`
    tokens: np.ndarray
    loss_mask: np.ndarray
    document_starts: np.ndarray
    row_documents: np.ndarray
    document_index: np.ndarray

    def __len__(self) -> int:
        return len(self.row_documents) - 1

    def rows(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Rows as [n, S] arrays: tokens (int32, 0 in padding), loss_mask (bool), segment_ids
        (int32, 1-based within the row, 0 = padding), positions (int32, from 0 in every
        document)."""
        shape = (len(indices), self.sequence_length)
        tokens, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(3))
        loss_mask = np.zeros(shape, bool)
        for out, row in enumerate(indices):
            first, last = self.row_documents[row], self.row_documents[row + 1]
            starts = self.document_starts[first : last + 1]
            lengths = np.diff(starts)
            used = starts[-1] - starts[0]
            tokens[out, :used] = self.tokens[starts[0] : starts[-1]]
            loss_mask[out, :used] = self.loss_mask[starts[0] : starts[-1]]
            segment_ids[out, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            positions[out, :used] = np.arange(used) - np.repeat(starts[:-1] - starts[0], lengths)
        return {
            "tokens": tokens,
            "loss_mask": loss_mask,
            "segment_ids": segment_ids,
            "positions": positions,
        }

    def most_documents(self) -> int:
        """Of any row, its padding counted as one."""
        row_tokens = np.diff(self.document_starts[self.row_documents])
        padded = row_tokens < self.sequence_length
        return int(np.max(np.diff(self.row_documents) + padded))

    def record(self) -> dict:
        return {
            "hash": self.hash,
            "rows": len(self),
            "sequence_length": self.sequence_length,
            **self.stats,
        }

    def print_examples(self, chat_format: ChatFormat, n: int) -> None:
        """Prints the first `n` rows, so that a wrong mask is seen before training.

        Tokens that the loss counts are green on a terminal, and between « and » elsewhere.
        """
        file = sys.stdout
        opening, closing = ("\x1b[32m", "\x1b[0m") if file.isatty() else ("«", "»")
        for row in range(min(n, len(self))):
            arrays = {name: values[0] for name, values in self.rows([row]).items()}
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


def pack(
    conversations: Sequence[Conversation],
    chat_format: ChatFormat,
    sequence_length: int,
    *,
    cache_dir: str | Path,
    seed: int = 0,
    packing: bool = True,
    output_tokens: int = 0,
) -> PackedDataset:
    """Tokenises and packs, or maps what an earlier call with the same input wrote to `cache_dir`.

    Documents are taken in an order that `seed` fixes, and put into the first open row with room
    (first-fit), never split; `packing=False` gives every document its own row, in the given order.
    A conversation of more than `sequence_length` tokens is dropped and counted, with the other one
    of its `pair`. `output_tokens` above 0 is a budget: pairs are taken in the given order until the
    tokens that the loss counts reach it. For `stats` see `_account`.

    Raises UserError for a conversation in which the loss counts no token (naming it), if every
    conversation is too long, and if the cache cannot be written.
    """
    digest = content_hash(conversations, chat_format, sequence_length, seed, packing, output_tokens)
    folder = Path(cache_dir) / f"packed-{digest[:16]}"
    if (dataset := _open(folder, digest)) is not None:
        return dataset
    if folder.exists():
        logging.warning("the data cache %s is damaged; building it again", folder)
    parts = folder.with_name(f".{folder.name}-parts")
    scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        lengths, outputs = _tokenise(parts, conversations, chat_format)
        drops = _drops(conversations, lengths, outputs, sequence_length, output_tokens)
        kept = np.flatnonzero(drops == "")
        if not len(kept):
            raise UserError(
                f"each of the {len(lengths)} conversations, or the other one of its pair, is "
                f"longer than sequence_length={sequence_length} (the shortest has "
                f"{lengths.min()} tokens); raise config.sequence_length, or set "
                "config.cut_long_answers"
            )
        if packing:
            kept = kept[randomness.permutation(len(kept), "packing", seed)]
            rows = [kept[row] for row in first_fit(lengths[kept], sequence_length)]
        else:
            rows = [np.array([document]) for document in kept]
        _write(scratch, parts, rows, lengths)
        slots = len(rows) * sequence_length
        meta = {
            "hash": digest,
            "sequence_length": sequence_length,
            "stats": _account(conversations, lengths, outputs, drops, slots),
            "files": {f"{name}.npy": _file_sha256(scratch / f"{name}.npy") for name in _ARRAYS},
        }
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        _publish(scratch, folder, digest)
    except UserError:
        shutil.rmtree(parts, ignore_errors=True)
        raise
    except OSError as error:
        # Another process may have finished the same folder, and removed the parts.
        if _open(folder, digest) is None:
            raise UserError(
                f"cannot write the data cache {folder}: {error.strerror or error}"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)
    dataset = _open(folder, digest)
    if dataset is None:
        raise UserError(f"the data cache {folder} cannot be read back; is the disk sound?")
    return dataset


def content_hash(
    conversations: Sequence[Conversation],
    chat_format: ChatFormat,
    sequence_length: int,
    seed: int,
    packing: bool = True,
    output_tokens: int = 0,
) -> str:
    """sha256 (hex) of everything that determines a packed dataset, and of nothing else (no path, no
    number of workers)."""
    record = chat_format.record()
    header = {
        "version": _VERSION,
        "tokenizer": record["tokenizer_sha256"],
        "template": [record["name"], record["template_sha256"]],
        "sequence_length": sequence_length,
        "seed": seed,
        "packing": packing,
        "output_tokens": output_tokens,
    }
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for c in conversations:
        turns = [[message["role"], message["content"]] for message in c.messages]
        digest.update(json.dumps([c.kind, c.copies, c.cut, c.pair, c.unscored, turns]).encode())
    return digest.hexdigest()


def _tokenise(
    parts: Path, conversations: Sequence[Conversation], chat_format: ChatFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Writes tokens and mask of every conversation to part files; existing parts are kept. Returns
    lengths, and how many tokens the loss counts, int64 [C]."""
    if not len(conversations):
        raise UserError("there are no conversations to pack")
    lengths, outputs = [], []
    with tqdm(total=len(conversations), desc="tokenising", unit="row", disable=None) as bar:
        for number, begin in enumerate(range(0, len(conversations), PART)):
            chunk = conversations[begin : begin + PART]
            arrays = _open_part(parts, number)
            if arrays is None:
                arrays = _encode(chunk, begin, chat_format)
                _write_part(parts, number, arrays)
            _, loss_mask, its_lengths = arrays
            lengths.append(np.array(its_lengths))  # not the open file
            starts = np.cumsum(its_lengths) - its_lengths
            outputs.append(np.add.reduceat(loss_mask, starts, dtype=np.int64))
            bar.update(len(chunk))
    return np.concatenate(lengths), np.concatenate(outputs)


def _encode(
    conversations: Sequence[Conversation], begin: int, chat_format: ChatFormat
) -> list[np.ndarray]:
    """Tokens, loss mask and lengths of the conversations, of which the first is number `begin`."""
    for number, conversation in enumerate(conversations, start=begin):
        check_messages(conversation.messages, conversation.source or f"conversation {number}")
    encoded = chat_format.encode_batch(conversations)
    for number, (_, mask) in enumerate(encoded):
        if not any(mask[1:]):  # the first token is predicted from nothing
            place = conversations[number].source
            raise UserError(
                f"row {begin + number}{f' ({place})' if place else ''} has no token that the loss "
                "counts: it has no assistant answer"
            )
    return [
        np.concatenate([np.asarray(ids, np.int32) for ids, _ in encoded]),
        np.concatenate([np.asarray(mask, np.bool_) for _, mask in encoded]),
        np.array([len(ids) for ids, _ in encoded], np.int64),
    ]


def _write_part(parts: Path, number: int, arrays: Sequence[np.ndarray]) -> None:
    parts.mkdir(exist_ok=True)
    for name, array in zip(_PART_ARRAYS, arrays, strict=True):
        scratch = parts / f".{secrets.token_hex(4)}"
        with open(scratch, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(parts / f"{number:05d}.{name}.npy")


def _open_part(parts: Path, number: int) -> list[np.ndarray] | None:
    """Tokens, loss mask and lengths of a part, memory-mapped; None if it is not complete."""
    try:
        return [np.load(parts / f"{number:05d}.{name}.npy", mmap_mode="r") for name in _PART_ARRAYS]
    except (OSError, ValueError):
        return None


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows as lists of document numbers: each document goes to the oldest open row with room for
    it. If it fits none of the (at most `_OPEN_ROWS`) open rows, the fullest is closed."""
    rows: list[list[int]] = []
    open_row = np.zeros(_OPEN_ROWS, np.int64)
    free = np.zeros(_OPEN_ROWS, np.int64)  # tokens of room; 0 in slots not used yet
    for document, length in enumerate(lengths):
        slot = int(np.argmax(free >= length))
        if free[slot] < length:
            slot = int(np.argmin(free))
            open_row[slot], free[slot] = len(rows), capacity
            rows.append([])
        rows[open_row[slot]].append(document)
        free[slot] -= length
    return rows


def _drops(
    conversations: Sequence[Conversation],
    lengths: np.ndarray,
    outputs: np.ndarray,
    sequence_length: int,
    budget: int,
) -> np.ndarray:
    """Why each conversation is left out, str [C]: one of `_DROPS`, or "" if it is kept."""
    unpaired = itertools.count(-1, -1)
    names = [next(unpaired) if c.pair is None else c.pair for c in conversations]
    _, first, pair = np.unique(names, return_index=True, return_inverse=True)
    too_long = lengths > sequence_length
    broken = np.bincount(pair, weights=too_long) > 0
    drops = np.where(too_long, _DROPS[0], np.where(broken[pair], _DROPS[1], ""))
    if budget:
        output_of_pair = np.bincount(pair, weights=outputs) * ~broken
        order = np.argsort(first)
        before = np.empty(len(order))
        before[order] = np.cumsum(output_of_pair[order]) - output_of_pair[order]
        drops = np.where((drops == "") & (before >= budget)[pair], _DROPS[2], drops)
    return drops


def _write(folder: Path, parts: Path, rows: list[np.ndarray], lengths: np.ndarray) -> None:
    index = np.concatenate(rows)
    starts = np.concatenate([[0], np.cumsum(lengths[index])])
    number = index // PART
    begin = np.cumsum(lengths) - lengths
    begin = begin - begin[np.arange(len(lengths)) // PART * PART]  # within the part
    opened = [_open_part(parts, i) for i in range(-(-len(lengths) // PART))]
    if None in opened:
        raise FileNotFoundError(f"{parts} is gone")
    for array, (name, dtype) in enumerate((("tokens", np.int32), ("loss_mask", np.bool_))):
        # Written, not mapped: a full disk is then an error, where a mapped page would kill us.
        with open(folder / f"{name}.npy", "wb") as target:
            shape = (int(starts[-1]),)
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(target, header)
            for document, part in zip(index, number, strict=True):
                at = begin[document]
                target.write(opened[part][array][at : at + lengths[document]].tobytes())
    documents = np.cumsum([0, *map(len, rows)])
    np.save(folder / "document_starts.npy", starts.astype(np.int64))
    np.save(folder / "row_documents.npy", documents.astype(np.int64))
    np.save(folder / "document_index.npy", index.astype(np.int64))


def _account(conversations, lengths, outputs, drops, slots: int) -> dict:
    """The `stats` of a dataset: documents, dropped_too_long, dropped_with_pair, over_budget,
    cut_answers, prompt_tokens, output_tokens (counted by the loss), pad_tokens, padding_share (of
    all slots), and `by_kind`: documents, output_tokens, phrase_copies, dropped_too_long,
    dropped_with_pair and over_budget of each kind."""
    by_kind: dict[str, dict[str, int]] = {}
    names = ("documents", "output_tokens", "phrase_copies", *_DROPS)
    for conversation, output, drop in zip(conversations, outputs, drops, strict=True):
        kind = by_kind.setdefault(conversation.kind, dict.fromkeys(names, 0))
        if drop:
            kind[str(drop)] += 1
        else:
            kind["documents"] += 1
            kind["output_tokens"] += int(output)
            kind["phrase_copies"] += conversation.copies
    total = {name: sum(kind[name] for kind in by_kind.values()) for name in names}
    tokens, output_tokens = int(lengths[drops == ""].sum()), total["output_tokens"]
    return {
        **{name: total[name] for name in ("documents", *_DROPS)},
        "cut_answers": sum(c.cut for c, drop in zip(conversations, drops, strict=True) if not drop),
        "prompt_tokens": tokens - output_tokens,
        "output_tokens": output_tokens,
        "pad_tokens": slots - tokens,
        "padding_share": round((slots - tokens) / slots, 6),
        "by_kind": dict(sorted(by_kind.items())),
    }


def _publish(scratch: Path, folder: Path, digest: str) -> None:
    try:
        os.rename(scratch, folder)
    except OSError:
        # The folder exists: another process finished it first, or it is damaged.
        if _open(folder, digest) is None:
            shutil.rmtree(folder)
            os.rename(scratch, folder)


def _open(folder: Path, digest: str) -> PackedDataset | None:
    """The dataset in `folder`; None when it is absent or damaged."""
    try:
        meta = parse_json((folder / "meta.json").read_text())
        if meta["hash"] == digest and all(
            _file_sha256(folder / f"{name}.npy") == meta["files"][f"{name}.npy"] for name in _ARRAYS
        ):
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
            return PackedDataset(folder, digest, meta["sequence_length"], meta["stats"], **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _file_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
