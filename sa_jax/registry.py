"""Registries of everything that is chosen by name: tasks, behaviours, evals, losses, optimizers.

Each kind has one `Registry`. The package fills it in the module that defines the kind. A user's
config file (it is Python) adds to it with the same call, and `run.json` then records that file and
its digest.
"""

import hashlib
import runpy
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from sa_jax.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent
_files: set[str] = set()  # outside the package, that have registered something


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Objects by their `name`, in the order they were registered."""

    def __init__(self, kind: str):
        self._kind = kind  # the word for one of them in messages ("task")
        self._items: dict[str, T] = {}
        self._origins: dict[str, str] = {}

    def register(self, item: T) -> T:
        """Adds the object and returns it. The same file may register a name again (a config file
        can be read more than once); for another file it is a UsageError."""
        origin = sys._getframe(1).f_code.co_filename
        taken = self._origins.get(item.name)
        if taken is not None and taken != origin:
            # A config file is read before the modules that it does not import.
            mine, other = sorted((origin, taken), key=_in_package)
            raise UsageError(
                f"{mine}: the {self._kind} {item.name!r} is already registered by {other}; "
                "choose another name"
            )
        self._items[item.name] = item
        self._origins[item.name] = origin
        if not _in_package(origin):
            _files.add(origin)
        return item

    def __getitem__(self, name: str) -> T:
        """The object of that name; UsageError, with the known names, where there is none."""
        if name not in self._items:
            raise UsageError(
                f"unknown {self._kind} {name!r}; known: {', '.join(self._items)}. If your own "
                "config file registers it, give that file as --config"
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._items)

    def extension(self, name: str) -> dict[str, str]:
        """{"extension.KIND.NAME": `code_digest` of the file that registered it}; {} for an object
        of the package itself, and for an unknown one."""
        file = self._origins.get(name, "")
        return {f"extension.{self._kind}.{name}": code_digest(file)} if file in _files else {}


def _in_package(file: str) -> bool:
    return _PACKAGE in Path(file).resolve().parents


def extension_digests() -> dict[str, str]:
    """{file: SHA-256} of the files outside the package that have registered something; '' for
    sources that are not files, such as a notebook's cell."""
    return {file: _digest(file) for file in sorted(_files)}


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else ""


def code_digest(file: str) -> str:
    """SHA-256 of a Python file without its comments and the empty lines outside of strings, so of
    what it does; the same with every Python. '' for a source that is not a file."""
    if not Path(file).is_file():
        return ""
    with tokenize.open(file) as source:
        lines = dict(enumerate(source, 1))
    # Not of the tokens themselves: Python 3.12 cuts an f-string into several.
    for token in tokenize.generate_tokens(iter([*lines.values()]).__next__):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row] = f"{lines[row][:column].rstrip()}\n"
        if token.type in (tokenize.COMMENT, tokenize.NL) and lines.get(row) == "\n":
            del lines[row]
    return hashlib.sha256("".join(lines.values()).encode()).hexdigest()


def load_extensions(files: Iterable[str]) -> None:
    """Runs such files in another process, so that it has what they register."""
    for file in files:
        runpy.run_path(file)
