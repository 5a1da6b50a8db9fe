"""The digests of a checkpoint: `digests.json`, the SHA-256 and size of every file in its folder.

Orbax gives each process its own folders and files (`ocdbt.process_3/…`,
`array_metadatas/process_3`), and that process hashes them. Process 0 writes and hashes all other
files. To check a checkpoint, the processes divide the files evenly. All must see the same folder.
"""

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from sa_jax.files import atomic_write, parse_json
from sa_jax.parallel.multihost import exchange

DIGEST_FILE = "digests.json"
_OWNER = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")
_THREADS = 8  # hashlib releases the GIL
_VISIBLE_SECONDS = 120
_BARRIER_SECONDS = 3600  # the slowest process may still be hashing many GB


def process_barrier(operation: str, name: str) -> None:
    """Waits until all processes have called it with the same operation and name.

    It needs no device, so it may wait in a background thread. A pair of operation and name must
    not be used twice.
    """
    asyncio.run(
        ocp.multihost.sync_global_processes(name, operation_id=operation, timeout=_BARRIER_SECONDS)
    )


def write_digests(folder: os.PathLike | str, step: int, barrier: Callable[[str], None]) -> int:
    """Hashes the files this process wrote; process 0 gathers all and commits `digests.json`.

    May run in a background thread. Only process 0 knows on return that the digests are committed.

    Args:
      folder: a checkpoint that Orbax has committed.
      step: recorded, and checked on restore.
      barrier: waits until all processes have called it with the same name; see `process_barrier`.

    Returns:
      The bytes of the checkpoint (process 0), of this process's part (the others).
    """
    root = epath.Path(folder)
    index, count = ocp.multihost.process_index(), ocp.multihost.process_count()
    parts = [root / f"digests.part_{process:05d}.json" for process in range(count)]
    try:
        names = _when_visible(root)
        mine = [name for name in names if writer(name) == index]
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = pool.map(_hash_file, (root / name for name in mine))
            files: dict[str, Any] = dict(zip(mine, hashes, strict=True))
        if index != 0:
            atomic_write(parts[index], json.dumps(files))
    finally:
        barrier("digested")  # also after a failure: the others must not wait for this process
    if index == 0:
        for process in range(1, count):
            try:
                files |= parse_json(parts[process].read_text())
            except FileNotFoundError as error:
                message = f"{root}: process {process} could not digest its files"
                raise RuntimeError(message) from error
        if sorted(files) != names:
            raise RuntimeError(f"{root}: files without a digest: {set(names) - set(files)}")
        manifest = {"step": step, "processes": count, "self": _digest_of(files), "files": files}
        atomic_write(root / DIGEST_FILE, json.dumps(manifest, indent=1, sort_keys=True))
        for part in parts[1:]:
            part.unlink()
    return sum(file["bytes"] for file in files.values())


def _when_visible(folder: epath.Path) -> list[str]:
    """`_data_files` of a folder that process 0 has just renamed.

    NFS may tell the other processes for up to a minute (`acdirmax`) that there is none.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        try:
            return _data_files(folder)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def find_corruption(folder: os.PathLike | str, step: int) -> str | None:
    """The first file of a checkpoint that differs from what was saved, and why; None if none does.

    Reads every file once; the processes share the work, and all return the same file.
    """
    root = epath.Path(folder)
    process, count = jax.process_index(), jax.process_count()
    files: dict[str, Any] = {}

    def problem(name: str) -> str | None:
        try:
            found = _hash_file(root / name)
        except OSError as error:
            return error.strerror or str(error)
        if found["bytes"] != files[name]["bytes"]:
            return f"it has {found['bytes']} bytes, not {files[name]['bytes']}"
        same = found["sha256"] == files[name]["sha256"]
        return None if same else "its bytes are not those saved"

    try:
        manifest = parse_json((root / DIGEST_FILE).read_text())
        files = manifest["files"]
        if manifest["self"] != _digest_of(files) or manifest["step"] != step:
            raise ValueError("it does not match its own digest")
        mine = sorted(files)[process::count]
        with ThreadPoolExecutor(_THREADS) as pool:
            problems = zip(mine, pool.map(problem, mine), strict=True)
            found = min(((name, why) for name, why in problems if why), default=None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = DIGEST_FILE, f"cannot be trusted: {error}"
    every = [parse_json(text) for text in exchange(json.dumps(found))]
    # Without digests other problems mean nothing.
    first = min(filter(None, every), key=lambda each: (each[0] != DIGEST_FILE, each), default=None)
    return first and f"{root / first[0]} ({first[1]})"


def writer(name: str) -> int:
    """The process that wrote a file of an Orbax checkpoint, by its path in the checkpoint."""
    match = _OWNER.search(name)
    return int(match[1]) if match else 0


def _hash_file(path: epath.Path) -> dict[str, Any]:
    """{"bytes": size of the file, "sha256": its SHA-256 in hexadecimal}"""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _digest_of(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _data_files(folder: epath.Path) -> list[str]:
    """Paths of all files below `folder`, relative to it, without the digests themselves.

    Another process may be writing its part right now: its temporary file is a digest file too.
    """
    names = []
    pending = [folder]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            else:
                names.append(str(path.relative_to(folder)))
    return sorted(name for name in names if not name.lstrip(".").startswith("digests."))
