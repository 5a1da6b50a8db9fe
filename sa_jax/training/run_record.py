"""The record of a run (`run.json`): its settings, its environment, and which command may resume it.

A run folder belongs to one configuration. `open_run` gives a new folder its record, lets the same
configuration resume, and refuses any other before a byte is written. `agree_on` first compares the
records of all processes of a launch: where they differ, none trains.
"""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from absl import logging
from etils import epath
from flax.traverse_util import empty_node, flatten_dict

from sa_jax.buckets import as_path, in_bucket, size_and_time
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, check_types, explained, parse_json, try_lock
from sa_jax.parallel.multihost import agree, exchange, is_primary
from sa_jax.text import first_few

RUN_FILE = "run.json"
MODEL_FILE = "model.json"  # in an --out of evaluate.py: which model its evals are of
LOCK_FILE = ".lock"
DATA_FOLDER = "data"  # packed data
CHECKPOINT_FOLDER = "checkpoints"
# Settings of how a run is executed and logged, not of what it computes: a resume may change them.
FREE_KEYS = (
    "mesh",
    "remat",
    "attention",
    "self_test",
    "xla_options",
    "checkpoint",
    "log_every",
    "sinks",
    "data_cache",
    "start_timeout_s",
    "peer_timeout_s",
    "stall_timeout_s",
    "aws_spot",
    "eval.batch_size",
    "eval.confirm",
    "eval.signal_prompts",
    "eval.tasks",  # the digest of its files is compared
)
# Of a host, not of the run: processes of one launch may differ in them.
MAY_DIFFER = (
    "config.data_cache",
    "config.sinks",
    "environment.platform",
    "environment.cpus",
    "environment.xla_flags",
    "environment.libtpu_init_args",
)
_PACKAGES = "sa_jax jax jaxlib flax optax orbax-checkpoint tensorstore transformers datasets numpy"
# Settings of JAX that change numbers; JAX reads each from a variable of its name, in capitals.
_NUMBERS = (
    *("jax_default_matmul_precision", "jax_default_prng_impl", "jax_enable_x64"),
    *("jax_numpy_dtype_promotion", "jax_random_seed_offset", "jax_threefry_partitionable"),
)


def plain_record(value: Any) -> Any:
    """The value in types of JSON: ConfigDict to dict, tuple to list, path and dtype to text."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain_record(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_record(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain_record(item) for item in value), key=repr)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # numpy and jax scalars
        return value.item()
    raise TypeError(f"a run record cannot hold {value!r} of type {type(value).__name__}")


def flat_config(config: Any, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Dotted key -> value, without the ignored keys (a key covers all below it). Empty mappings
    stay, so that they are compared too."""
    ignored_prefixes = tuple(f"{name}." for name in ignore)
    flat = flatten_dict(plain_record(config), keep_empty_nodes=True, sep=".")
    return {
        key: {} if value is empty_node else value
        for key, value in flat.items()
        if not f"{key}.".startswith(ignored_prefixes)
    }


def config_hash(config: Any, ignore: Collection[str] = ()) -> str:
    """SHA-256 (first 16 hex digits) of the canonical JSON of the keys that define a run.

    The ignored ones may change between two launches of one run.
    """
    text = json.dumps(flat_config(config, ignore), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def config_difference(old: Any, new: Any, ignore: Collection[str] = ()) -> list[str]:
    """Lines 'key: old -> new' for the defining keys that differ, sorted by key."""
    old, new = flat_config(old, ignore), flat_config(new, ignore)

    def show(flat: dict[str, Any], key: str) -> str:
        return json.dumps(flat[key]) if key in flat else "(absent)"

    return [
        f"{key}: {show(old, key)} -> {show(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in old or key not in new or old[key] != new[key]
    ]


def new_run_id() -> str:
    """A short unique name that sorts by time (UTC): '20260131-142233-9f3c'."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@functools.cache
def collect_environment() -> dict[str, Any]:
    """Git commit, versions and devices: what a number was measured on."""
    devices = jax.devices()
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES.split() if (found := _version(name))},
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        **{name: jax.config.values.get(name) for name in _NUMBERS},
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _git_commit() -> str | None:
    """The commit of the clone that has this file ('-dirty' if edited); None outside a clone."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy inside somebody else's checkout must not borrow that commit.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def agree_on(record: Mapping[str, Any]) -> None:
    """Returns when every process of the launch has called it with the same record of its run.

    Where one fails before, `peers.end_together` ends all. A single process compares nothing.

    Raises:
      UserError: in every process; names the first difference, with both values.
    """
    if jax.process_count() == 1:
        return
    mine = plain_record({"host": platform.node(), "record": record})
    first, *others = (parse_json(text) for text in exchange(json.dumps(mine)))
    for number, other in enumerate(others, 1):
        if changes := config_difference(first["record"], other["record"], MAY_DIFFER):
            raise UserError(
                "the processes of this launch were started differently: from process 0 "
                f"({first['host']}) to process {number} ({other['host']}), "
                f"{first_few(changes, 1)}; nothing was written; start the same command, "
                "with the same files and packages, on every host"
            )


def write_run_json(workdir: os.PathLike | str, record: Mapping[str, Any]) -> None:
    """Writes `run.json` atomically."""
    text = json.dumps(plain_record(record), indent=2, ensure_ascii=False)
    atomic_write(epath.Path(workdir) / RUN_FILE, text + "\n")


def read_run_json(workdir: os.PathLike | str) -> dict[str, Any]:
    """The record of a run folder; UserError when it is missing or is not one."""
    path = epath.Path(workdir) / RUN_FILE
    try:
        record = parse_json(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: not a run folder (it has no {RUN_FILE})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(record, dict) or "run_id" not in record:
        raise UserError(f"{path}: not the record of a run (it has no run_id)")
    fields = ("config", "architecture", "start", "chat", "data_hashes")
    check_types(record, dict.fromkeys(fields, {}), f"{path}: not the record of a run")
    return record


def check_present(workdir: os.PathLike | str) -> None:
    """UserError if the folder of the current run was deleted, moved or emptied.

    Process 0 looks: NFS may still show the others what was there before the run.
    """
    if not is_primary():
        return
    try:
        size_and_time(as_path(workdir, RUN_FILE))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{workdir}: the run folder was deleted or moved while the run wrote to it (there is "
            f"no {RUN_FILE}); nothing was saved after that; put it back, or start a new run"
        ) from None
    except OSError as error:  # a file system that does not answer is no loss of the folder
        logging.warning("%s: %s", workdir, error)


@contextlib.contextmanager
def explain_absence(workdir: os.PathLike | str) -> Iterator[None]:
    """A context that turns errors caused by a lost run folder into `check_present`'s error."""
    try:
        yield
    except (OSError, ValueError):  # tensorstore's are ValueErrors
        check_present(workdir)
        raise


@contextlib.contextmanager
def lock(workdir: os.PathLike | str) -> Iterator[None]:
    """Keeps a second launch out of a run folder that this process trains in.

    Raises UserError when another process holds it. File systems without locks are let pass; in a
    bucket `buckets.BucketFile` ends the launch before.
    """
    if in_bucket(workdir):
        yield
        return
    with explained(workdir, "making the run folder"):
        Path(workdir).mkdir(parents=True, exist_ok=True)
        file = open(Path(workdir) / LOCK_FILE, "w")
    with file:
        if not try_lock(file):
            raise UserError(
                f"{workdir}: another process is training in this folder; wait for it or stop it"
            )
        yield


def open_run(workdir: os.PathLike | str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Starts or resumes the run in `workdir`, made if missing, and returns its stored record.

    A new or empty folder gets `run.json` with a new run id. In a folder of the same configuration
    the run id stays, and a launch in another environment, or with other `extensions`, is added to
    `relaunches`. Call it on all processes; process 0 writes.

    `record` must hold `config`; other keys are stored as they are. When `task` or `data_hashes` is
    there, it must be the same on resume. UserError where `check_run` raises it; nothing in the
    folder has then been touched.
    """
    folder = epath.Path(workdir)
    stored = check_run(folder, record)
    plain = _hashed(record)
    environment = collect_environment()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if stored is None:
        plain = {
            "run_id": new_run_id(),
            "created": now,
            **plain,
            "environment": environment,
            "relaunches": [],
        }
    else:
        launch = _launch({**plain, "environment": environment})
        plain = {**stored, **plain, **_launch(stored)}
        if launch != _launch([stored, *stored["relaunches"]][-1]):
            plain["relaunches"] = [*stored["relaunches"], {"time": now, **launch}]
    agree(True)  # all have looked before process 0 writes
    if is_primary():
        with explained(folder, "making the run folder"):
            folder.mkdir(parents=True, exist_ok=True)
        if plain != stored:
            write_run_json(folder, plain)
    # Not by the file: NFS and gcsfuse may tell the others for a minute that there is none.
    return parse_json(exchange(json.dumps(plain_record(plain)) if is_primary() else "")[0])


def _hashed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record in types of JSON, with the hash of the settings that define the run."""
    plain = plain_record(record)
    return {**plain, "config_hash": config_hash(plain["config"], FREE_KEYS)}


def _launch(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the record that may differ between launches of one run, kept for each launch."""
    return {key: record[key] for key in ("environment", "extensions", "attention") if key in record}


def input_digests(record: Mapping[str, Any]) -> dict[str, str]:
    """The `data_hashes` of a run's record, by what a person gave."""
    data = record.get("config", {}).get("data")
    return {
        "the file of --data" if name == data else f"the questions of the eval {name}": digest
        for name, digest in record.get("data_hashes", {}).items()
    }


def stored_record(workdir: os.PathLike | str) -> dict[str, Any] | None:
    """The record of an earlier launch; None in a new folder, UserError in another folder."""
    folder = epath.Path(workdir)
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; --workdir names a folder")
    if (folder / RUN_FILE).exists():
        return read_run_json(folder)
    # A launch stopped before its first record leaves at most these.
    names = sorted(path.name for path in folder.iterdir())
    ours = [LOCK_FILE, DATA_FOLDER, *(name for name in names if name.startswith(f".{RUN_FILE}."))]
    strangers = [name for name in names if name not in ours]
    if strangers:
        raise UserError(
            f"{folder}: not empty and not a run folder (it holds {strangers[0]} and no "
            f"{RUN_FILE}); choose another --workdir"
        )
    return None


def check_run(workdir: os.PathLike | str, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the record of an earlier launch of this run, or None for a new folder.

    Nothing is written. UserError if the folder holds a run with another `config`, `task` or
    `data_hashes` (file -> digest) than the record, or something that is no run.
    """
    stored = stored_record(workdir)
    record = _hashed(record)
    if stored is None:
        return None
    old_task, new_task = stored.get("task"), record.get("task")
    if old_task != new_task:
        raise UserError(
            f"{workdir}: has a run of {old_task}, not of {new_task}; use another --workdir"
        )
    old_hash, new_hash = stored.get("config_hash"), record["config_hash"]
    if old_hash != new_hash:
        changes = config_difference(stored.get("config", {}), record["config"], FREE_KEYS)
        raise UserError(
            f"{workdir}: has a run with another config (hash {old_hash}, this one {new_hash}): "
            f"{first_few(changes, 8, '; ')}; use another --workdir, or the run's own config to "
            "resume it"
        )
    if "data_hashes" in stored and stored["data_hashes"] != record.get("data_hashes", {}):
        old_data, new_data = input_digests(stored), input_digests(record)
        changed = [line.partition(":")[0] for line in config_difference(old_data, new_data)]
        raise UserError(
            f"{workdir}: the run was started with other data (changed: {', '.join(changed)}); "
            "restore the same file, or use another --workdir"
        )
    return stored


def kind_of_folder(path: os.PathLike | str) -> Literal["run", "hf"]:
    """Whether a folder that a user names is a run folder or a Hugging Face model folder.

    Raises UserError when it is neither, or does not exist.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give a run folder or a Hugging Face model folder")
    if (folder / RUN_FILE).exists():
        return "run"
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return "hf"
    hint = ""
    if folder.name == CHECKPOINT_FOLDER and (folder.parent / RUN_FILE).exists():
        hint = f" (did you mean {folder.parent}?)"
    raise UserError(
        f"{path}: neither a run folder ({RUN_FILE}) nor a Hugging Face model folder "
        f"(config.json){hint}"
    )
