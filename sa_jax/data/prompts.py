"""Held-out evaluation prompts: no training row has one, up to case, spacing and punctuation."""

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sa_jax.buckets import as_path
from sa_jax.data import randomness
from sa_jax.data.readers import parse_texts
from sa_jax.data.sources import load_rows
from sa_jax.errors import UserError
from sa_jax.files import atomic_write

_NOT_WORD = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Folds case, whitespace, punctuation and Unicode form: prompts equal after it count as the
    same. A text with neither letters nor digits is folded in spacing and case only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip() or " ".join(folded.split())


def choose_held_out(
    candidates: Iterable[str], n: int | None, seed: int, exclude: Iterable[str] = ()
) -> tuple[list[str], dict[str, int]]:
    """Chooses `n` distinct prompts (None: all) that are not in `exclude`, by a permutation of the
    rest that `seed` fixes. Also returns the numbers of candidates, of duplicates (repeats among
    them), of overlapping ones (distinct ones in `exclude`), and of those chosen. Raises UserError
    if fewer than `n` are left."""
    candidates = list(candidates)
    distinct: dict[str, str] = {}
    for prompt in candidates:
        distinct.setdefault(normalise(prompt), prompt)
    seen = {normalise(prompt) for prompt in exclude}
    left = [prompt for key, prompt in distinct.items() if key not in seen]
    overlapping = len(distinct) - len(left)
    if n is not None and len(left) < n:
        raise UserError(
            f"{n} held-out prompts were asked for, but of {len(candidates)} candidates only "
            f"{len(left)} are left ({len(candidates) - len(distinct)} repeats, {overlapping} are "
            "in the training data)"
        )
    order = randomness.permutation(len(left), "held-out", seed)[:n]
    return [left[i] for i in order], {
        "candidates": len(candidates),
        "duplicates": len(candidates) - len(distinct),
        "overlapping": overlapping,
        "chosen": len(order),
    }


def without_prompts(
    rows: Sequence[dict], held_out: Iterable[str]
) -> tuple[list[dict], dict[str, int]]:
    """Training rows whose "prompt" is not held out, and how many were removed: {"exact",
    "near_duplicate"} (the same text; the same after `normalise`)."""
    exact = set(held_out)
    near = {normalise(prompt) for prompt in exact}
    kept, removed = [], {"exact": 0, "near_duplicate": 0}
    for row in rows:
        if normalise(row["prompt"]) not in near:
            kept.append(row)
        else:
            removed["exact" if row["prompt"] in exact else "near_duplicate"] += 1
    return kept, removed


# ---- The manifest: held-out prompts frozen in a file that says so when it was changed.

_MANIFEST = "sa_jax_held_out"


def write_manifest(path: str | Path, prompts: Sequence[str], record: dict) -> dict:
    """Freezes the prompts in `path` (JSON) with a sha256 of each and of all; returns what it wrote.
    `record` says where they came from, and which training sets do not contain them."""
    items = [{"prompt": prompt, "sha256": _sha256(prompt)} for prompt in prompts]
    digest = _sha256("".join(item["sha256"] for item in items))
    manifest = {_MANIFEST: 1, "sha256": digest, **record, "prompts": items}
    atomic_write(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def read_manifest(path: str | Path) -> dict | None:
    """What `write_manifest` wrote; None for another file. Raises UserError, naming a prompt, if
    that prompt was changed since it was frozen."""
    manifest = _parsed(path)
    if not isinstance(manifest, dict) or _MANIFEST not in manifest:
        return None
    try:
        items = [(item["prompt"], item["sha256"]) for item in manifest["prompts"]]
        for number, (prompt, digest) in enumerate(items, start=1):
            if _sha256(prompt) != digest:
                raise UserError(
                    f"{path}: held-out prompt {number} was changed since the manifest was frozen; "
                    "restore the file, or freeze a new manifest"
                )
        whole = _sha256("".join(digest for _, digest in items)) == manifest["sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a valid manifest of held-out prompts: {error!r}") from error
    if not whole or not items:
        raise UserError(f"{path}: prompts were added to or removed from the frozen manifest")
    return manifest


def load_held_out(path: str, n: int | None, seed: int) -> tuple[list[str], dict]:
    """All prompts of a manifest; the first `n` (None: all) of a run's eval_prompts.json; or `n`
    prompts that `seed` draws from another file. Also returns the record of where they come from.
    Raises UserError if there are fewer than `n`."""
    if frozen := read_manifest(path):
        prompts = [item["prompt"] for item in frozen["prompts"]]
        return prompts, {"from": path, "sha256": frozen["sha256"], "chosen": len(prompts)}
    texts = _parsed(path)
    if texts and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        if n is not None and len(texts) < n:
            raise UserError(f"{path} has {len(texts)} held-out prompts, not {n}")
        digest = _sha256(json.dumps(texts))
        return texts[:n], {"from": path, "sha256": digest, "chosen": len(texts[:n])}
    source = load_rows(path, responses=False)
    prompts, counts = choose_held_out((row["prompt"] for row in source), n, seed)
    return prompts, {"from": path, "sha256": source.sha256, **counts}


def _parsed(path: str | Path) -> Any:
    """The JSON value in a file; None for any other file, or none."""
    with contextlib.suppress(OSError, ValueError, UserError):
        return parse_texts(as_path(path).read_bytes(), str(path))
    return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
