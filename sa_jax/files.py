"""Files that are written whole or not at all, and errors of the disk in one line."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sa_jax.errors import UserError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_DISK_WORDS = ("no space left on device", "disk quota exceeded", "file too large", "enospc")


def atomic_write(path: os.PathLike | str, text: str) -> None:
    """Replaces the file by `text` in one step: a reader sees the old file or the new one, whole.

    Raises UserError when the disk is full (the old file is then untouched).
    """
    target = epath.Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            if hasattr(file, "fileno"):  # remote stores have no descriptor: their close commits
                os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise UserError(disk_full_message(path, "writing it")) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one it was raised from, says that a disk or a quota is full."""
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
    """One line for a full disk: the path, the mount that holds it, what is free, what to do."""
    path = Path(path).absolute()
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    mount = next(p for p in (existing, *existing.parents) if p.is_mount())
    usage = os.statvfs(existing)
    free_mb = usage.f_bavail * usage.f_frsize / 1e6
    return (
        f"{path}: the disk is full ({free_mb:,.1f} MB free on {mount}) while {while_doing}; "
        "free some space there (or keep fewer checkpoints) and run the same command again"
    )


@contextlib.contextmanager
def explained(path: os.PathLike | str, while_doing: str) -> Iterator[None]:
    """Turns an OSError inside into a UserError that names the path and what to do."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(disk_full_message(path, while_doing)) from error
        reason = error.strerror or error
        raise UserError(f"{path}: {reason} while {while_doing}; choose another place") from error
