"""Files that lose nothing when a process is killed, and errors of the disk in one line."""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sa_jax.buckets import BucketFile, as_path, in_bucket
from sa_jax.errors import UserError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_DISK_WORDS = ("no space left on device", "disk quota exceeded", "file too large", "enospc")


def atomic_write(path: os.PathLike | str, text: str) -> None:
    """Replaces the file by `text` in one step: a reader sees the old file or the new one, whole.
    UserError when the disk is full (the old file is then untouched)."""
    if in_bucket(path):
        as_path(path).write_text(text)  # a put is whole or not at all
        return
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise UserError(disk_full_message(path, "writing it")) from error
        raise


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for users' files. ValueError also for what is nested too deeply, for two fields
    of one name in an object (one would be lost), and for whole numbers of more than 308 digits,
    which no float may hold."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) < len(pairs):
            (name, count), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{count} fields of one object are named {name!r}")
        return named

    def whole_number(digits: str) -> int:
        count = len(digits.lstrip("-"))
        if count > sys.float_info.max_10_exp:
            raise ValueError(f"a number has {count} digits")
        return int(digits)

    try:
        return json.loads(text, object_pairs_hook=fields, parse_int=whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def check_types(value: Any, example: Any, place: str, *, whole: bool = False) -> None:
    """Checks a JSON value against an example: its type, and that of each field of the example; None
    allows any type. With `whole`, no field of the example may be missing. UserError, with `place`
    (file and field) and the first field that does not fit."""
    kinds = (int, float) if isinstance(example, float) else type(example)
    fits = example is None or isinstance(value, kinds)
    if isinstance(example, int | float):
        is_bool = isinstance(value, bool) == isinstance(example, bool)
        fits = fits and is_bool and abs(value) < 2**63  # not NaN either
    if not fits:
        raise UserError(f"{place}: must be {_KINDS[type(example)]}, not {str(value)[:60]!r}")
    for name, part in example.items() if isinstance(example, dict) else ():
        if name in value:
            check_types(value[name], part, f"{place}: {name}", whole=whole)
        elif whole:
            raise UserError(f"{place}: field {name!r} is missing")


def try_lock(file: IO[Any] | int) -> bool:
    """Takes the lock of an open file until this process closes it; False if another process has it.
    File systems without locks let all pass."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


class KeyedStore(contextlib.AbstractContextManager["KeyedStore"]):
    """Objects by key in a JSONL file, appended as soon as they exist, so that paid work is not done
    again: a reply of a teacher, a completion of an eval.
    When `put` returns, the operating system has the object. A line that a kill left unfinished is
    removed when the file is next opened. Only one process at a time can open the file."""

    def __init__(self, path: Path | None, example: Mapping[str, Any], *, write: bool = True):
        """Opens the file, or makes it; without a path, everything stays in memory. UserError if
        another process has it open, or a line is not such an object.

        Args:
          example: the fields that every object has, as for `check_types`.
          write: False reads the file without its lock, and keeps new objects in memory.
        """
        self._path = path
        self._values: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        if path is None or not (write or path.exists()):
            return
        with explained(path, "opening it"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file: IO[bytes]
            if not write:
                file = io.BytesIO(path.read_bytes())
            else:
                file = BucketFile(path) if in_bucket(path) else open(path, "a+b")
        if write and not try_lock(file):  # a BucketFile sees to that itself
            file.close()
            raise UserError(f"{path}: another process is writing it; wait until that process ends")
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = parse_json(line)
                check_types(entry, {"key": "", **example}, f"{path}:{number}", whole=True)
            except (ValueError, UserError) as error:
                file.close()
                raise UserError(
                    f"{path}:{number}: not an object with key, {', '.join(example)}; remove the "
                    "line, and its request is sent again"
                ) from error
            self._values[entry["key"]] = {field: entry[field] for field in example}
            whole += len(line)
        if write:
            file.truncate(whole)
            file.seek(whole)
            self._file = file

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> dict[str, Any] | None:
        """The object's fields; None if there is no object."""
        return self._values.get(key)

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Stores an object; its further fields are only for human readers."""
        self._values[key] = dict(value)
        if self._path and self._file:
            line = json.dumps({"key": key, **value}, ensure_ascii=False).encode() + b"\n"
            with explained(self._path, "adding to it"):
                self._file.write(line)
                self._file.flush()

    def close(self) -> None:
        """Waits until the file is on the disk, and releases it."""
        if self._file:
            with contextlib.suppress(io.UnsupportedOperation):  # a BucketFile is no file here
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def __exit__(self, *_: object) -> None:
        self.close()


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or the error that caused it, says that a disk or a quota is full."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            return True
        # tensorstore reports the operating system's words inside a ValueError.
        if any(words in str(error).lower() for words in _FULL_DISK_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(path: os.PathLike | str, while_doing: str) -> str:
    """One line for a full disk: the path, its mount point, the free space, and what to do."""
    path = Path(path).absolute()
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    mount = next(p for p in (existing, *existing.parents) if p.is_mount())
    free_mb = shutil.disk_usage(existing).free / 1e6
    return (
        f"{path}: the disk is full ({free_mb:,.1f} MB free on {mount}) while {while_doing}; "
        "free some space there (or keep fewer checkpoints) and run the same command again"
    )


@contextlib.contextmanager
def explained(path: os.PathLike | str, while_doing: str) -> Iterator[None]:
    """A context that turns an OSError into a UserError with the path and what to do."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(disk_full_message(path, while_doing)) from error
        reason = error.strerror or error
        raise UserError(f"{path}: {reason} while {while_doing}; choose another place") from error
