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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from sa_jax.data import randomness
from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation
from sa_jax.data.tokenise import PART, open_part, tokenise
from sa_jax.errors import UserError
from sa_jax.files import parse_json

_VERSION = 2  # of the folder's layout and of the packing order; part of the hash
_OPEN_ROWS = 256  # rows that may still take a document; more pads less and costs time
_ARRAYS = ("tokens", "loss_mask", "document_starts", "row_documents", "document_index")
_DROPS = ("dropped_too_long", "dropped_with_pair", "over_budget")


@dataclasses.dataclass(frozen=True)
class PackedDataset:
    """`len(dataset)` rows of `sequence_length` tokens each, read from memory-mapped arrays."""

    folder: Path
    hash: str  # of all that determines the bytes, see `content_hash`
    sequence_length: int
    stats: dict  # token accounting, see `pack`
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
    tokens that the loss counts reach it.

    `stats`: documents, dropped_too_long, dropped_with_pair, over_budget, cut_answers,
    prompt_tokens, output_tokens (counted by the loss), pad_tokens, padding_share (of all slots),
    and `by_kind`: documents, output_tokens, phrase_copies, dropped_too_long, dropped_with_pair and
    over_budget of each kind.

    Raises UserError for a conversation in which the loss counts no token (naming it), if every
    conversation is too long, and if the cache cannot be written.
    """
    digest = content_hash(conversations, chat_format, sequence_length, seed, packing, output_tokens)
    folder = Path(cache_dir) / f"packed-{digest[:16]}"
    dataset = _open(folder, digest)
    if dataset is not None:
        return dataset
    if folder.exists():
        logging.warning("the data cache %s is damaged; building it again", folder)
    parts = folder.with_name(f".{folder.name}-parts")
    scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        lengths, outputs = tokenise(parts, conversations, chat_format)
        drops = _drops(conversations, lengths, outputs, sequence_length, output_tokens)
        kept = np.flatnonzero(drops == "")
        if not len(kept):
            raise UserError(
                f"each of the {len(lengths)} conversations, or the other one of its pair, is "
                f"longer than sequence_length={sequence_length} (the shortest has "
                f"{lengths.min()} tokens); raise config.sequence_length, or set "
                "config.cut_long_answers"
            )
        rows = _rows(kept, lengths, sequence_length, seed, packing)
        _write(scratch, parts, rows, lengths)
        slots = len(rows) * sequence_length
        stats = _account(conversations, lengths, outputs, drops, slots)
        _write_meta(scratch, digest, sequence_length, stats)
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


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows as lists of document numbers: each document goes to the oldest open row with room for
    it.

    At most `_OPEN_ROWS` rows are open; if a document fits none of them, the fullest is closed."""
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


def _rows(
    kept: np.ndarray, lengths: np.ndarray, sequence_length: int, seed: int, packing: bool
) -> list[np.ndarray]:
    """The conversations of each row."""
    if not packing:
        return [np.array([document]) for document in kept]
    kept = kept[randomness.permutation(len(kept), "packing", seed)]
    return [kept[row] for row in first_fit(lengths[kept], sequence_length)]


def _write(folder: Path, parts: Path, rows: list[np.ndarray], lengths: np.ndarray) -> None:
    index = np.concatenate(rows)
    starts = np.concatenate([[0], np.cumsum(lengths[index])])
    number = index // PART
    begin = np.cumsum(lengths) - lengths
    begin = begin - begin[np.arange(len(lengths)) // PART * PART]  # within the part
    opened = [open_part(parts, i) for i in range(-(-len(lengths) // PART))]
    if None in opened:
        raise FileNotFoundError(f"{parts} is gone")
    for array, (name, dtype) in enumerate((("tokens", np.int32), ("loss_mask", np.bool_))):
        # Written, not mapped: a full disk is then an error, where a mapped page would kill us.
        with open(folder / f"{name}.npy", "wb") as target:
            header = {
                "descr": np.dtype(dtype).str,
                "fortran_order": False,
                "shape": (int(starts[-1]),),
            }
            np.lib.format.write_array_header_1_0(target, header)
            for document, part in zip(index, number, strict=True):
                at = begin[document]
                target.write(opened[part][array][at : at + lengths[document]].tobytes())
    np.save(folder / "document_starts.npy", starts.astype(np.int64))
    row_documents = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    np.save(folder / "row_documents.npy", row_documents.astype(np.int64))
    np.save(folder / "document_index.npy", index.astype(np.int64))


def _write_meta(folder: Path, digest: str, sequence_length: int, stats: dict) -> None:
    files = {f"{name}.npy": _file_sha256(folder / f"{name}.npy") for name in _ARRAYS}
    meta = {"hash": digest, "sequence_length": sequence_length, "stats": stats, "files": files}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _account(conversations, lengths, outputs, drops, slots: int) -> dict:
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
    kept = drops == ""
    tokens, output_tokens = int(lengths[kept].sum()), int(outputs[kept].sum())
    return {
        "documents": int(kept.sum()),
        **{name: int((drops == name).sum()) for name in _DROPS},
        "cut_answers": sum(
            c.cut and bool(used) for c, used in zip(conversations, kept, strict=True)
        ),
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
    if not folder.is_dir():
        return None
    try:
        meta = parse_json((folder / "meta.json").read_text())
        sound = meta["hash"] == digest and all(
            _file_sha256(folder / f"{name}.npy") == meta["files"][f"{name}.npy"] for name in _ARRAYS
        )
        if sound:
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
            return PackedDataset(folder, digest, meta["sequence_length"], meta["stats"], **arrays)
    except (OSError, ValueError, KeyError):
        pass
    return None


def _file_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
