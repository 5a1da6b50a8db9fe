"""The safetensors format in both directions, with ranged reads from a local folder or `gs://`.

A file is a little-endian u64 header length, a JSON header (tensor name to dtype, shape and byte
offsets), then the tensors' bytes. https://github.com/huggingface/safetensors#format
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts
from tqdm import tqdm

from sa_jax.buckets import absolute, as_path, in_bucket, put_folder
from sa_jax.errors import UserError
from sa_jax.files import parse_json
from sa_jax.parallel.multihost import agree, is_primary
from sa_jax.text import first_line

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes an element of the format's other dtypes: such a tensor may stand in a file, unread.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8}
_ITEM_BYTES |= {name: dtype.itemsize for name, dtype in DTYPES.items()}

# The format's own limit: a longer header is garbage read as a length.
_MAX_HEADER_BYTES = 100_000_000
# One ranged read: small enough for a cache, large enough that a transposed piece is written in long
# runs.
_PIECE_BYTES = 4 << 20
_WINDOW_BYTES = 256 << 20  # in flight at a time, which hides an object store's latency
_WRITERS = 4  # tensors that are written at a time

_threads_own = threading.local()  # .buffer: what local rows are read into


class Folder:
    """A folder of files, local or at a URL such as `gs://bucket/model`."""

    def __init__(self, path: str | Path):
        self.path = str(path).rstrip("/")
        self.remote = "://" in self.path
        spec: Any = f"{self.path}/"
        if not self.remote:
            spec = {"driver": "file", "path": f"{os.path.realpath(path)}/"}
        try:
            self._store = ts.KvStore.open(spec).result()
        except ValueError as error:
            raise UserError(f"{self.path} cannot be opened: {first_line(error)}") from None

    def name(self, file: str) -> str:
        """The file's full name, for messages."""
        return f"{self.path}/{file}"

    def start_read(self, file: str, byte_range: slice) -> ts.Future:
        """Starts reading [start, stop) of a file; `finish_read` waits for it."""
        return self._store.read(file, byte_range=byte_range)

    def finish_read(self, file: str, future: ts.Future) -> bytes | None:
        """The bytes of a `start_read`, or None where there is no such file."""
        try:
            result = future.result()
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                raise _broken(self.name(file), "is shorter than its header says") from None
            raise UserError(f"{self.name(file)} cannot be read: {first_line(error)}") from None
        return None if result.state == "missing" else result.value

    def read_into(self, buffer: memoryview, file: str, start: int) -> None:
        """Fills a buffer with the bytes of a local file from `start` on."""
        missing = buffer
        try:
            with open(os.path.join(self.path, file), "rb", buffering=0) as opened:
                while missing:
                    count = os.preadv(opened.fileno(), [missing], start)
                    if not count:
                        raise self.changed(file)
                    missing, start = missing[count:], start + count
        except OSError as error:
            raise UserError(f"{self.name(file)} cannot be read: {error.strerror}") from None

    def changed(self, file: str) -> UserError:
        """The error for a file that no longer agrees with its header."""
        return _broken(self.name(file), "changed while it was read")

    def read(self, file: str, byte_range: slice = slice(0, None)) -> bytes | None:
        """Bytes [start, stop) of a file, by default all, or None where there is no such file."""
        return self.finish_read(file, self.start_read(file, byte_range))

    def read_json(self, file: str) -> dict[str, Any] | None:
        """A JSON object, or None where there is no such file."""
        content = self.read(file)
        if content is None:
            return None
        try:
            parsed = parse_json(content)
        except ValueError as error:
            raise UserError(f"{self.name(file)} is not JSON: {error}") from None
        if not isinstance(parsed, dict):
            raise UserError(f"{self.name(file)} must hold a JSON object")
        return parsed


class TensorEntry(NamedTuple):
    """Where a tensor lies: bytes [start, stop) of `file`, row-major."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_headers(folder: Folder, files: Iterable[str]) -> dict[str, TensorEntry]:
    """Every tensor of the files; all headers are read at the same time.

    UserError if a file is missing, truncated or malformed, or two files hold one tensor.
    """
    files = list(files)
    lengths = {}
    for file, content in _read_all(folder, [(file, slice(0, 8)) for file in files]):
        length = int.from_bytes(content, "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise _broken(folder.name(file), f"starts with an impossible header length {length}")
        lengths[file] = length
    headers = _read_all(folder, [(file, slice(8, 8 + lengths[file])) for file in files])
    entries: dict[str, TensorEntry] = {}
    ends = []
    for file, content in headers:
        in_file = _parse_header(folder.name(file), file, content)
        both = in_file.keys() & entries.keys()
        if both:
            name = min(both)
            raise _broken(folder.name(file), f"repeats {name} of {entries[name].file}")
        entries |= in_file
        ends.append((file, max((entry.stop for entry in in_file.values()), default=0)))
    # The last byte is there, so all are.
    for _ in _read_all(folder, [(file, slice(end - 1, end)) for file, end in ends if end]):
        pass
    return entries


def _read_all(folder: Folder, ranges: list[tuple[str, slice]]) -> Iterator[tuple[str, bytes]]:
    futures = [(file, folder.start_read(file, byte_range)) for file, byte_range in ranges]
    for file, future in futures:
        content = folder.finish_read(file, future)
        if content is None:
            raise UserError(f"{folder.name(file)} is missing: complete the download of the model")
        yield file, content


def _parse_header(name: str, file: str, content: bytes) -> dict[str, TensorEntry]:
    try:
        header = parse_json(content)
        header.pop("__metadata__", None)
        entries = {}
        for tensor, fields in header.items():
            start, stop = map(int, fields["data_offsets"])
            shape = tuple(map(int, fields["shape"]))
            entries[tensor] = TensorEntry(file, str(fields["dtype"]), shape, start, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(name, f"has a malformed header ({first_line(error)})") from None
    position = 0
    for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.dtype not in _ITEM_BYTES:
            raise UserError(f"{name}: {tensor} has the unknown dtype {entry.dtype!r}")
        size = math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]
        if min(entry.shape, default=0) < 0 or entry.nbytes != size:
            raise _broken(name, f"gives {tensor} {entry.nbytes} bytes, its shape needs {size}")
        if entry.start != position:
            raise _broken(name, f"has overlapping or missing bytes before {tensor}")
        position = entry.stop
    base = 8 + len(content)
    return {
        tensor: entry._replace(start=base + entry.start, stop=base + entry.stop)
        for tensor, entry in entries.items()
    }


@dataclasses.dataclass(frozen=True)
class Rows:
    """`count` rows of a tensor, from byte `start` of its file on."""

    folder: Folder
    entry: TensorEntry
    count: int
    start: int
    nbytes: int
    content: bytes | None = None  # None: not read yet

    def fetch(self) -> np.ndarray:
        """The rows, in a buffer that is valid until the same thread fetches again; UserError if the
        file cannot be read, or has changed."""
        content: bytes | memoryview | None = self.content
        if content is None:
            if len(getattr(_threads_own, "buffer", b"")) < self.nbytes:
                _threads_own.buffer = bytearray(self.nbytes)
            content = memoryview(_threads_own.buffer)[: self.nbytes]
            self.folder.read_into(content, self.entry.file, self.start)
        rows = np.frombuffer(content, DTYPES[self.entry.dtype])
        return rows.reshape(self.count, *self.entry.shape[1:])


def read_rows(folder: Folder, requests: Iterable[tuple[TensorEntry, int, int]]) -> Iterator[Rows]:
    """Yields rows of tensors in order, about 4 MiB at a time, to be fetched in several threads.

    Rows of an object store have arrived when they are yielded, while the next 256 MiB are being
    read. Rows of a local folder are read by the thread that fetches them, into a buffer that it
    reuses: KvStore would allocate new memory twice for each read, which is half of a load's time.

    `requests` are tensors, each with the [first, last) of its leading axis that is wanted. Each
    `Rows` has consecutive whole rows, all of one request.
    """
    if not folder.remote:
        yield from _pieces(folder, requests)
        return
    under_way: deque[tuple[Rows, ts.Future]] = deque()
    in_flight = 0
    for piece in _pieces(folder, requests):
        byte_range = slice(piece.start, piece.start + piece.nbytes)
        under_way.append((piece, folder.start_read(piece.entry.file, byte_range)))
        in_flight += piece.nbytes
        while in_flight > _WINDOW_BYTES:
            in_flight -= under_way[0][0].nbytes
            yield _arrived(*under_way.popleft())
    while under_way:
        yield _arrived(*under_way.popleft())


def _pieces(folder: Folder, requests: Iterable[tuple[TensorEntry, int, int]]) -> Iterator[Rows]:
    for entry, first, last in requests:
        row_bytes = entry.nbytes // entry.shape[0]
        step = max(1, _PIECE_BYTES // row_bytes)
        for row in range(first, last, step):
            count = min(step, last - row)
            yield Rows(folder, entry, count, entry.start + row * row_bytes, count * row_bytes)


def _arrived(piece: Rows, future: ts.Future) -> Rows:
    content = piece.folder.finish_read(piece.entry.file, future)
    if content is None or len(content) != piece.nbytes:
        raise piece.folder.changed(piece.entry.file)
    return dataclasses.replace(piece, content=content)


class OutputTensor(NamedTuple):
    """A tensor to write; `fetch` returns it in every process (all of them must call it)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], jax.Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path | None, stem: str, tensors: list[OutputTensor], max_shard_bytes: float
) -> None:
    """Writes `stem.safetensors`, or numbered shards and their index above `max_shard_bytes`.

    The bytes depend only on names, order, shapes, dtypes and values. Several tensors are written at
    the same time, each to its place in its file; host memory holds `_WRITERS` + 2 of them. Every
    process must call this; those with `folder` None only take part in the fetches. If the disk
    refuses, the writing process raises OSError once all fetches are done.
    """
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if filled and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}.safetensors"]
    failure: BaseException | None = None
    writes: deque[Future[None]] = deque()
    begun: list[tuple[BinaryIO, list[int]]] = []
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(_WRITERS))
        try:
            if folder is not None:
                for name, shard in zip(names, shards, strict=True):
                    file, offsets = _begin_file(folder / name, shard)
                    stack.enter_context(file)
                    begun.append((file, offsets))
        except OSError as error:
            failure = error
        places = ((file, at) for file, offsets in begun for at in offsets)
        quiet = None if folder is not None else True  # None: shown if stderr is a terminal
        total = sum(tensor.nbytes for tensor in tensors)
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=quiet) as bar:
            # To the end even when the disk fails: the other processes wait in the fetches.
            for content in _fetch_ahead(tensors):
                if folder is not None and failure is None:
                    writes.append(pool.submit(_write_at, *next(places), content))
                while len(writes) > _WRITERS:
                    problem = writes.popleft().exception()
                    failure = failure or problem
                bar.update(content.nbytes)
            for write in writes:
                failure = failure or write.exception()
        if failure is not None:
            raise failure
        for file, _ in begun:
            os.fsync(file.fileno())
    if folder is not None and count > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                tensor.name: name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard
            },
        }
        write_json(folder / f"{stem}.safetensors.index.json", index)


def _fetch_ahead(tensors: list[OutputTensor]) -> Iterator[jax.Array]:
    """Each tensor, while the next one is already being copied from the devices."""
    previous: jax.Array | None = None
    for tensor in tensors:
        array = tensor.fetch()
        array.copy_to_host_async()
        if previous is not None:
            yield previous
        previous = array
    if previous is not None:
        yield previous


def _begin_file(path: Path, tensors: list[OutputTensor]) -> tuple[BinaryIO, list[int]]:
    """A new file with its header, and where in it each tensor's bytes go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets = [0, *itertools.accumulate(tensor.nbytes for tensor in tensors)]
    for tensor, span in zip(tensors, itertools.pairwise(offsets), strict=True):
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": list(span),
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file = open(path, "wb", buffering=0)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    return file, [8 + len(encoded) + offset for offset in offsets[:-1]]


def _write_at(file: BinaryIO, position: int, content: jax.Array) -> None:
    data = np.ascontiguousarray(np.asarray(content)).reshape(-1).view(np.uint8).data
    while data:
        written = os.pwrite(file.fileno(), data, position)
        data, position = data[written:], position + written


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object as indented JSON; OSError when the disk refuses."""
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path | None]:
    """A temporary folder that becomes `path` when the block succeeds, and is removed otherwise.

    Yields None in all processes but the first; if that one fails, all fail. For a bucket, the
    temporary folder is on this machine, and is uploaded at the end, config.json last. A signal that
    stops the process raises KeyboardInterrupt in the block, so that the folder is removed then too.
    UserError if `path` is not empty, is in a store other than gs://, or cannot be written.
    """
    name = str(path)
    target, temporary = as_path(absolute(path)), None
    with _primary_only(name) as primary:
        if primary:
            if "://" in name and not in_bucket(target):
                raise UserError(f"{name}: exports go to a local folder or to gs://")
            if target.is_file() or (target.is_dir() and any(target.iterdir())):
                raise UserError(
                    f"{name} exists and is not empty: remove it or export to another folder"
                )
            parent = None if in_bucket(target) else target.parent
            if parent:
                parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    try:
        with _interrupted_by_signals(), _primary_only(name):
            yield temporary
            if temporary is not None and in_bucket(target):
                put_folder(temporary, target)
            elif temporary is not None:
                temporary.chmod(0o755)  # mkdtemp's 0700 would lock other users out of the export
                temporary.replace(target)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """A context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does; no change in threads."""
    with contextlib.ExitStack() as restore:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, signal.default_int_handler)
                restore.callback(signal.signal, number, before)
        try:
            yield
        except KeyboardInterrupt:
            # Do not restore the handlers: the thread of `script_start` may see the signal only now,
            # and would end the process before anything is removed.
            restore.pop_all()
            raise


@contextlib.contextmanager
def _primary_only(path: str) -> Iterator[bool]:
    """Makes an error of the first process an error of all, so that none waits for ever."""
    failure: Exception | None = None
    try:
        yield is_primary()
    except OSError as error:
        failure = UserError(f"{path} cannot be written: {error}; free space or choose another path")
    except UserError as error:
        failure = error
    failed = agree(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise UserError(f"{path} was not written: see the log of process 0")


def _broken(name: str, problem: str) -> UserError:
    return UserError(f"{name} {problem}: the file is damaged, download it again")
