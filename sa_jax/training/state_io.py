"""Saves a training state to an Orbax v1 folder, and loads it on any mesh.

A state is stored as nested dicts of arrays, whatever its classes, so that a part of it ("params")
can be loaded alone, and an error names the path of a leaf.
"""

import logging as python_logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.v1._src.synchronization import multihost as orbax_multihost

from sa_jax.buckets import absolute
from sa_jax.errors import UserError
from sa_jax.files import is_disk_full
from sa_jax.parallel.rules import path_string
from sa_jax.text import first_few, one_line

_DAY_S = 24 * 3600
# How long a process that has loaded waits for the slowest. No public setting changes it, and where
# many hosts read 70B from a bucket its 300 s may be too short. A lost peer ends this process anyway
# (`sa_jax.parallel.peers`).
orbax_multihost._DEFAULT_BARRIER_TIMEOUT = _DAY_S


def save_async(folder: os.PathLike | str, state: Any) -> ocp.AsyncResponse[None]:
    """Starts to save a pytree of jax.Array (typed PRNG keys too); `result()` waits for the commit.

    The arrays have been copied when this returns. An existing `folder` is replaced.
    """
    tree = unflatten_dict(_flatten(state), sep="/")
    with _context():
        return ocp.save_async(epath.Path(absolute(folder)), tree, overwrite=True)


def load(
    folder: os.PathLike | str,
    abstract: Any,
    *,
    part: str = "",
    exact: bool = True,
    resizable: Callable[[str], bool] = lambda name: False,
) -> Any:
    """Loads a state, or a part of it, as the tree, dtypes and shardings of `abstract`.

    Args:
      abstract: tree of jax.ShapeDtypeStruct, each with a sharding.
      part: path of the part to load, "params" or "opt_state/1/0/mu"; "" for all.
      exact: refuse other dtypes and additional leaves; otherwise cast, and ignore these.
      resizable: whether the first axis of the leaf with this path may be shorter or longer than
        stored; the stored leaf is then cut, or padded with zeros.

    Raises:
      UserError: a leaf, shape or dtype differs; the folder is no checkpoint.
    """
    quiet_orbax()
    folder = epath.Path(absolute(folder))
    wanted = {"/".join(filter(None, (part, n))): x for n, x in _flatten(abstract).items()}
    for name, leaf in wanted.items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"{name}: the abstract state needs a sharding on every leaf")
    try:
        stored = _flatten(ocp.metadata(folder).metadata)
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be read as a checkpoint ({one_line(error)[:300]})"
        ) from error
    if not exact:
        stored = {name: x for name, x in stored.items() if name in wanted}

    def show(leaves: dict[str, Any], name: str) -> str:
        if name not in leaves:
            return "absent"
        leaf = leaves[name]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # stored as its uint32 data
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        dtype = f"{np.dtype(leaf.dtype).name} " if exact else ""
        shape = list(leaf.shape)
        return f"{dtype}{['any', *shape[1:]] if resizable(name) else shape}"

    different = [
        f"{name} is {show(stored, name)} in the checkpoint, {show(wanted, name)} here"
        for name in sorted(stored.keys() | wanted.keys())
        if show(stored, name) != show(wanted, name)
    ]
    if different:
        raise UserError(
            f"{folder}: does not fit: {first_few(different, 1)}; use the model, optimizer and LoRA "
            "settings, and the commit of sa_jax, that it was saved with"
        )
    try:
        with _context(partial_load=True):
            loaded = _flatten(ocp.load(folder, unflatten_dict(wanted, sep="/")))
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded ({one_line(error)[:300]})") from error
    for name, leaf in wanted.items():  # Orbax stores a typed key as numbers, and names its type
        if loaded[name].dtype != leaf.dtype:
            raise UserError(
                f"{folder}: {name} is {loaded[name].dtype}, not {leaf.dtype}: another version of "
                "sa_jax saved it; resume with that version"
            )
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])


def _is_wanted(record: python_logging.LogRecord) -> bool:
    if "/orbax/" not in record.pathname:
        return True
    of_full_disk = record.exc_info is not None and is_disk_full(record.exc_info[1])
    return record.levelno >= python_logging.WARNING and not of_full_disk


def quiet_orbax() -> None:
    """Drops Orbax's INFO lines, about thirty per save, which would hide the run's own lines, and
    its three tracebacks of a full disk, whose error the save raises too."""
    logging.get_absl_logger().addFilter(_is_wanted)  # adding it again changes nothing


def _context(partial_load: bool = False) -> ocp.Context:
    context = ocp.Context()
    # In the background, a folder that cannot be made shows only as a time-out minutes later.
    context.asynchronous.create_directories_asynchronously = False
    context.asynchronous.timeout_secs = _DAY_S  # by default 20 minutes from the start of a save
    # Else each process looks whether the folder is there, and one that looks after process 0 has
    # removed it leaves the others at a barrier.
    context.file.skip_sync_file_validations = True
    context.pytree.loading.partial_load = partial_load
    context.array.loading.enable_padding_and_truncation = True  # `load` compares shapes
    return context


def _flatten(tree: Any) -> dict[str, Any]:
    """{"params/embed/embedding": leaf, ...}; empty parts (optax's EmptyState) leave no trace."""
    return {path_string(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
