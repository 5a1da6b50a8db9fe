"""Paths in Google Cloud Storage, `gs://BUCKET/…`, and on this machine.

A bucket stores an object whole or not at all. So a file is written there without a temporary file.
It cannot be appended to: `BucketFile` uploads it again. A folder exists as long as it has files.
"""

import atexit
import functools
import importlib.util
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import fsspec
from etils import epath

from sa_jax.errors import UsageError, UserError, install

# Set before a bucket is opened. One client, the tested one, whatever else is installed; and no
# listing is kept, since Orbax and other processes write past that client.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False

TRAINING_PLACES = ("config.model", "config.data", "config.tokenizer", "config.eval.data_dir")
PUT_SECONDS = 10.0  # between two uploads of a growing file; a store refuses more than one a second
_SCHEME = "gs://"
_STORE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model")


def in_bucket(place: str | os.PathLike) -> bool:
    return os.fspath(place).startswith(_SCHEME)


def as_path(place: str | os.PathLike, *parts: str) -> Path:
    """The path; in a bucket an epath.Path, whose methods work in both places (not `resolve`,
    `absolute` and `stat`: see below)."""
    return cast(Path, epath.Path(place, *parts)) if in_bucket(place) else Path(place, *parts)


def absolute(place: str | os.PathLike) -> str:
    return os.fspath(place) if in_bucket(place) else os.path.abspath(place)


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes of a file, and when it was last written, in nanoseconds since 1970."""
    if in_bucket(path):
        remote = epath.Path(path).stat()
        return remote.length, int(remote.mtime * 1e9)
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def check_places(name: str, value: object, allowed: Collection[str] = ()) -> None:
    """UsageError for the address of a store (`gs://`, `s3://`) in a setting that does not take one:
    as a path it would be a local folder `gs:`. UserError for a bucket that cannot be read.

    `name` is the setting, such as '--workdir' or 'config'; of a mapping or list, all values are
    checked. `allowed` has the names of the settings that may be `gs://`.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_places(f"{name}.{key}", item, allowed)
    elif isinstance(value, list | tuple):
        for item in value:
            check_places(name, item, allowed)
    elif isinstance(value, str | os.PathLike) and _STORE.match(os.fspath(value)):
        place = os.fspath(value)
        if place.lower().startswith(("http:", "https:")):
            if name not in allowed:  # an endpoint's, or words of a prompt
                return
            raise UsageError(
                f"{name}={place}: is a web address; download it, or give its name on the Hub"
            )
        if name not in allowed:
            raise UsageError(
                f"{name}={place}: this does not take a bucket; mount it (gcsfuse, mountpoint-s3) "
                "and give the mounted folder"
            )
        if not in_bucket(place):
            raise UsageError(
                f"{name}={place}: only gs:// buckets can be used, because Orbax saves checkpoints "
                "to no other store; mount it (mountpoint-s3) and give the mounted folder"
            )
        if problem := _problem(place.removeprefix(_SCHEME).partition("/")[0]):
            raise UserError(f"{name}={place}: {problem}")


@functools.cache
def _problem(bucket: str) -> str:
    """Why a bucket cannot be read; '' if it can."""
    if importlib.util.find_spec("gcsfs") is None:
        return f"buckets need the package gcsfs: {install('buckets')}"
    try:
        fsspec.filesystem("gs").call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError:
        return f"there is no bucket {bucket!r}"
    except Exception as error:  # gcsfs, aiohttp and google-auth raise many kinds
        reason = " ".join(str(error).split())[:200]
        return (
            f"the bucket cannot be read ({reason}); log in with `gcloud auth "
            "application-default login`, or give this machine's account access"
        )
    return ""


@functools.cache
def local_tokenizer(place: str | Path) -> Path:
    """A tokenizer's folder on this machine: the path itself, or for a bucket a temporary folder
    with copies of its files, which is removed when this process ends."""
    source = as_path(place)
    if not in_bucket(source):
        return source
    folder = Path(tempfile.mkdtemp(prefix="sa_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy_files([file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)], folder)
    return folder


def copy_files(files: Collection[Path], folder: Path) -> None:
    """Copies files into a folder, also between a bucket and this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())


def put_folder(folder: Path, bucket: Path) -> None:
    """Uploads the files of a local folder to a folder of a bucket; config.json, which marks a model
    folder, last."""
    files = (file for file in folder.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        place = os.fspath(bucket / file.relative_to(folder).as_posix())
        with file.open("rb") as source, fsspec.open(place, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)


class BucketFile(io.BytesIO):
    """A growing file in a bucket: its whole text is kept here and uploaded again, at most once in
    PUT_SECONDS, and at `put` and `close`.
    The newest process that opens it owns it: an earlier one is refused at its next upload."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_bytes() if path.exists() else b"")
        self.seek(0, io.SEEK_END)
        self._path = path
        self._write()

    def flush(self) -> None:
        if time.monotonic() - self._put_time >= PUT_SECONDS:
            self.put()

    def put(self) -> None:
        """Uploads the file. UserError if another process has opened it since."""
        if self._generation() != self._known:
            raise UserError(
                f"{self._path}: another process has taken over this folder; this one stops"
            )
        if self.getvalue() != self._stored:
            self._write()

    def close(self) -> None:
        if not self.closed:
            try:
                self.put()
            finally:
                super().close()

    def _write(self) -> None:
        self._stored = self.getvalue()
        self._path.write_bytes(self._stored)
        self._known, self._put_time = self._generation(), time.monotonic()

    def _generation(self) -> Any:
        """The object's generation, which changes with every upload; None if it was deleted."""
        try:
            return fsspec.filesystem("gs").info(os.fspath(self._path))["generation"]
        except FileNotFoundError:
            return None
