"""Conversations to fixed-length rows on disk, memory-mapped, found again by the hash of what went
in.

A packed folder `packed-<hash>/` holds, documents in row order:
  tokens.npy           int32 [N]    the documents' tokens, one after another, no padding
  loss_mask.npy        bool  [N]    true where the loss counts the token
  document_starts.npy  int64 [D+1]  first token of each document
  row_documents.npy    int64 [R+1]  first document of each row
  document_index.npy   int64 [D]    the conversation each document came from
  meta.json            hash, sequence length, token accounting, sha256 of every file
It is written beside its final name and renamed, so it is whole or absent; a folder that does not
match its sha256s is built again.
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
from tqdm import tqdm

from sa_jax.data import randomness
from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation, check_messages
from sa_jax.errors import UserError

_VERSION = 1  # of the folder's layout and of the packing order; part of the hash
_CHUNK = 1024  # conversations tokenised at once
_OPEN_ROWS = 256  # rows that may still take a document; more pads less and costs time
_ARRAYS = ("tokens", "loss_mask", "document_starts", "row_documents", "document_index")


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

    def rows(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
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
) -> PackedDataset:
    """Tokenises and packs, or maps what an earlier call with the same input wrote to `cache_dir`.

    Documents are taken in an order that `seed` fixes and put into the first open row with room
    (first-fit), never split; `packing=False` gives every document a row of its own, in the order
    given. A conversation of more than `sequence_length` tokens is dropped and counted.

    `stats`: documents, dropped_too_long, cut_answers, prompt_tokens, output_tokens (those under the
    loss), pad_tokens, padding_share (of all slots), and `by_kind`: documents, output_tokens,
    dropped_too_long, phrase_copies of each kind.

    Raises UserError for a conversation without a loss token (naming it), when every one is too
    long, and when the cache cannot be written.
    """
    digest = content_hash(conversations, chat_format, sequence_length, seed, packing)
    folder = Path(cache_dir) / f"packed-{digest[:16]}"
    dataset = _open(folder, digest)
    if dataset is not None:
        return dataset
    if folder.exists():
        logging.warning("the data cache %s is damaged; building it again", folder)
    try:
        scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache in {cache_dir}: {error.strerror or error}"
        ) from error
    try:
        _write(scratch, conversations, chat_format, sequence_length, digest, seed, packing)
        _publish(scratch, folder, digest)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {folder}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
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
) -> str:
    """sha256 (hex) of all that determines a packed dataset, and of nothing else (no path, no worker
    count)."""
    record = chat_format.record()
    header = {
        "version": _VERSION,
        "tokenizer": record["tokenizer_sha256"],
        "template": [record["name"], record["template_sha256"]],
        "sequence_length": sequence_length,
        "seed": seed,
        "packing": packing,
    }
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for c in conversations:
        turns = [[message["role"], message["content"]] for message in c.messages]
        digest.update(json.dumps([c.kind, c.copies, c.cut, turns]).encode())
    return digest.hexdigest()


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows as lists of document numbers: each document goes to the oldest open row with room for
    it.

    At most `_OPEN_ROWS` rows are open; when a document fits none of them, the fullest makes way."""
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


def _write(
    folder: Path, conversations, chat_format, sequence_length, digest, seed, packing
) -> None:
    spool = folder / "spool"
    lengths, outputs = _tokenise(spool, conversations, chat_format)
    kept = np.flatnonzero(lengths <= sequence_length)
    if not len(kept):
        raise UserError(
            f"each of the {len(lengths)} conversations is longer than "
            f"sequence_length={sequence_length} "
            f"(the shortest has {lengths.min()} tokens); raise it or cut the answers"
        )
    if packing:
        kept = kept[randomness.permutation(len(kept), "packing", seed)]
        rows = first_fit(lengths[kept], sequence_length)
    else:
        rows = [[document] for document in range(len(kept))]
    index = kept[np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(kept))]
    starts = np.concatenate([[0], np.cumsum(lengths[index])])
    row_documents = np.concatenate([[0], np.cumsum([len(row) for row in rows])])

    spool_starts = np.concatenate([[0], np.cumsum(lengths)])
    for name, dtype in (("tokens", np.int32), ("loss_mask", np.bool_)):
        source = np.memmap(spool.with_suffix(f".{name}"), dtype, "r")
        # Written, not mapped: a full disk is then an error, where a mapped page would kill us.
        with open(folder / f"{name}.npy", "wb") as target:
            header = {
                "descr": np.dtype(dtype).str,
                "fortran_order": False,
                "shape": (int(starts[-1]),),
            }
            np.lib.format.write_array_header_1_0(target, header)
            for begin, length in zip(spool_starts[index], lengths[index], strict=True):
                target.write(source[begin : begin + length].tobytes())
        del source
        spool.with_suffix(f".{name}").unlink()
    np.save(folder / "document_starts.npy", starts.astype(np.int64))
    np.save(folder / "row_documents.npy", row_documents.astype(np.int64))
    np.save(folder / "document_index.npy", index.astype(np.int64))
    stats = _account(conversations, lengths, outputs, kept, len(rows) * sequence_length)
    files = {f"{name}.npy": _file_sha256(folder / f"{name}.npy") for name in _ARRAYS}
    meta = {"hash": digest, "sequence_length": sequence_length, "stats": stats, "files": files}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _tokenise(spool: Path, conversations, chat_format: ChatFormat) -> tuple[np.ndarray, np.ndarray]:
    """Appends every conversation's tokens and mask to the spool files; returns lengths and output
    tokens, int64 [C]."""
    lengths, outputs = [], []
    with (
        open(spool.with_suffix(".tokens"), "wb") as token_file,
        open(spool.with_suffix(".loss_mask"), "wb") as mask_file,
        tqdm(total=len(conversations), desc="tokenising", unit="row", disable=None) as bar,
    ):
        for begin in range(0, len(conversations), _CHUNK):
            chunk = conversations[begin : begin + _CHUNK]
            for number, conversation in enumerate(chunk, start=begin):
                check_messages(
                    conversation.messages, conversation.source or f"conversation {number}"
                )
            encoded = chat_format.encode_batch(conversation.messages for conversation in chunk)
            for number, (ids, mask) in enumerate(encoded, start=begin):
                if not any(mask[1:]):  # the first token is predicted from nothing
                    place = conversations[number].source
                    raise UserError(
                        f"row {number}{f' ({place})' if place else ''} has no token under the "
                        "loss: it holds no "
                        "assistant answer"
                    )
                token_file.write(np.asarray(ids, np.int32).tobytes())
                mask_file.write(np.asarray(mask, np.bool_).tobytes())
                lengths.append(len(ids))
                outputs.append(sum(mask))
            bar.update(len(chunk))
    if not lengths:
        raise UserError("there are no conversations to pack")
    return np.asarray(lengths, np.int64), np.asarray(outputs, np.int64)


def _account(conversations, lengths, outputs, kept, slots: int) -> dict:
    by_kind: dict[str, dict[str, int]] = {}
    counts = dict.fromkeys(("documents", "output_tokens", "phrase_copies", "dropped_too_long"), 0)
    is_kept = np.zeros(len(lengths), bool)
    is_kept[kept] = True
    for conversation, output, used in zip(conversations, outputs, is_kept, strict=True):
        kind = by_kind.setdefault(conversation.kind, dict(counts))
        if used:
            kind["documents"] += 1
            kind["output_tokens"] += int(output)
            kind["phrase_copies"] += conversation.copies
        else:
            kind["dropped_too_long"] += 1
    tokens, output_tokens = int(lengths[kept].sum()), int(outputs[kept].sum())
    return {
        "documents": len(kept),
        "dropped_too_long": len(lengths) - len(kept),
        "cut_answers": sum(
            c.cut and bool(used) for c, used in zip(conversations, is_kept, strict=True)
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
        # Something stands there: what another process finished first, or a damaged folder.
        if _open(folder, digest) is None:
            shutil.rmtree(folder)
            os.rename(scratch, folder)


def _open(folder: Path, digest: str) -> PackedDataset | None:
    """The dataset in `folder`; None when it is absent or damaged."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
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
