"""Parameters as the tensors of Hugging Face files: names, layout, sharded reading and writing.

Every byte of a folder is read once over the whole mesh: each device gets some rows of a matrix, as
they lie in the file, cast and transposed on the way, and the devices then redistribute them among
themselves. Host memory holds one device's part of one parameter and the reads in flight.
"""

import functools
import itertools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from sa_jax.errors import UserError
from sa_jax.llama.safetensors_io import DTYPES, Folder, OutputTensor, TensorEntry, read_rows
from sa_jax.parallel import rules

# Modules by their path in our parameters; `layers/...` stand under model.layers.N.
MODULES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers/attention_norm": "input_layernorm",
    "layers/attention/q": "self_attn.q_proj",
    "layers/attention/k": "self_attn.k_proj",
    "layers/attention/v": "self_attn.v_proj",
    "layers/attention/o": "self_attn.o_proj",
    "layers/mlp_norm": "post_attention_layernorm",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
}
_PARAMETERS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# A leaf that goes through another layout on its way is taken in groups of layers of this size.
_GROUP_BYTES = 256 << 20
_COPY_THREADS = min(8, os.cpu_count() or 1)


def _layer_names(path: str, num_layers: int, prefix: str = "") -> list[str]:
    """The Hugging Face names of a parameter's tensors, one a layer if it is stacked."""
    module, _, parameter = path.rpartition("/")
    suffix = f"{MODULES[module]}.{_PARAMETERS.get(parameter, 'weight')}"
    if not _is_stacked(path):
        return [prefix + suffix]
    return [f"{prefix}model.layers.{layer}.{suffix}" for layer in range(num_layers)]


def _is_stacked(path: str) -> bool:
    return path.startswith("layers/")


def _is_transposed(path: str) -> bool:
    # Matrices are [out, in] there and [in, out] here; embeddings are [V, D] in both.
    return path.endswith(("kernel", "lora_a", "lora_b"))


def load_leaves(
    folder: Folder,
    entries: Mapping[str, TensorEntry],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    ignored: Iterable[str] = (),
    prefix: str = "",
) -> dict:
    """Reads parameters onto a mesh, laid out by `parallel.rules`.

    Args:
      folder, entries: the tensors at hand, as `read_headers` gives them.
      shapes: path to shape and dtype of every parameter wanted.
      mesh: where they go.
      ignored: names that may be there and are not read.
      prefix: what every name in the files starts with.

    Raises:
      UserError: a tensor is missing, surplus, mis-shaped, of another dtype or not finite.
    """
    names = {path: _layer_names(path, leaf.shape[0], prefix) for path, leaf in shapes.items()}
    _check_tensors(folder, entries, shapes, names, ignored)
    final = flatten_dict(rules.shardings(mesh, unflatten_dict(shapes, sep="/")), sep="/")
    sources = {
        path: _source_sharding(path, leaf.shape, final[path]) for path, leaf in shapes.items()
    }
    parts = {path: _local_parts(sources[path], leaf.shape) for path, leaf in shapes.items()}
    groups = {path: _layer_groups(shapes[path], sources[path], final[path]) for path in shapes}
    requests = (
        (entries[name], first, last)
        for path in shapes
        for layers in groups[path]
        for first, last in parts[path]
        for name in names[path][layers]
    )
    pieces = read_rows(folder, requests)
    total = sum(entries[name].stop - entries[name].start for path in shapes for name in names[path])
    quiet = None if jax.process_index() == 0 else True  # None: shown if stderr is a terminal
    leaves: dict[str, jax.Array] = {}
    damaged: list[str] = []
    progress = tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet)
    with progress, ThreadPoolExecutor(_COPY_THREADS) as pool:
        for path, leaf in shapes.items():
            for layers in groups[path]:
                count = layers.stop - layers.start
                group = leaf.update(shape=(count, *leaf.shape[1:])) if _is_stacked(path) else leaf
                arrays = []
                for (first, last), devices in parts[path].items():
                    buffer, bad = _read_part(path, group, last - first, pieces, pool)
                    damaged += [names[path][layers][layer] for layer in bad]
                    arrays += [jax.device_put(buffer, device) for device in devices]
                    jax.block_until_ready(arrays)
                    del buffer  # before the next one is made: the host holds one part at a time
                array = jax.make_array_from_single_device_arrays(group.shape, sources[path], arrays)
                del arrays
                array = _redistribute(array, final[path])
                if group.shape != leaf.shape:
                    into = leaves.pop(path, None)
                    array = _insert(leaf, final[path], into, array, layers.start)
                # Waiting keeps at most one group in both layouts.
                leaves[path] = jax.block_until_ready(array)
                read = [entries[name] for name in names[path][layers]]
                progress.update(sum(entry.stop - entry.start for entry in read))
    _agree_undamaged(folder, entries, damaged)
    logging.info("loaded %.2f GB of weights from %s", total / 1e9, folder.path)
    return unflatten_dict(leaves, sep="/")


def _check_tensors(folder, entries, shapes, names, ignored) -> None:
    """UserError unless the files hold exactly what is wanted."""
    missing, wrong = [], []
    for path, leaf in shapes.items():
        shape = leaf.shape[1:] if _is_stacked(path) else leaf.shape
        shape = shape[::-1] if _is_transposed(path) else shape
        for name in names[path]:
            entry = entries.get(name)
            if entry is None:
                missing.append(name)
            elif entry.shape != shape:
                wrong.append(
                    f"{name} in {folder.name(entry.file)} is {list(entry.shape)}, not {list(shape)}"
                )
            elif entry.dtype not in DTYPES:
                wrong.append(
                    f"{name} in {folder.name(entry.file)} is {entry.dtype}, not {', '.join(DTYPES)}"
                )
    extra = sorted(entries.keys() - set(itertools.chain(*names.values())) - set(ignored))
    surplus = [f"{name} in {folder.name(entries[name].file)}" for name in extra]
    for problem, found in (
        (f"{folder.path} lacks tensors: ", missing),
        ("tensors do not fit the config: ", wrong),
        ("tensors the model does not have: ", surplus),
    ):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(
                f"{problem}{'; '.join(found[:3])}{more}. Weights and config.json must come from "
                "the same, complete Llama download"
            )


def _file_axis(path: str, ndim: int) -> int | None:
    """The axis of a parameter that is the rows of its matrices in the file; None for vectors."""
    if ndim - _is_stacked(path) < 2:
        return None
    return ndim - 1 if _is_transposed(path) else ndim - 2


def _axes(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _source_sharding(path: str, shape: tuple[int, ...], final: NamedSharding) -> NamedSharding:
    """How a parameter is read: matrices by rows of the file over all devices, vectors everywhere.

    Rows are contiguous in the file, so each byte is read for one device and for no other. The mesh
    axes that cut the parameter's rows come first, then those of its other axis, then those it is
    replicated over: from there it is one gather and one all-to-all to where it belongs.
    """
    axis = _file_axis(path, len(shape))
    if axis is None:
        return NamedSharding(final.mesh, P())
    spec = [_axes(part) for part in (*final.spec, *(None,) * (len(shape) - len(final.spec)))]
    used = spec.pop(axis) + sum(spec, ())
    axes = used + tuple(name for name in final.mesh.axis_names if name not in used)
    while shape[axis] % math.prod(final.mesh.shape[name] for name in axes):
        axes = axes[:-1]
    return NamedSharding(final.mesh, P(*[None] * axis, axes))


def _local_parts(
    sharding: NamedSharding, shape: tuple[int, ...]
) -> dict[tuple[int, int], list[jax.Device]]:
    """The row ranges this process reads, and which of its devices hold each."""
    axis = next((axis for axis, part in enumerate(sharding.spec) if part), len(shape) - 1)
    parts: dict[tuple[int, int], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        first, last, _ = index[axis].indices(shape[axis])
        parts.setdefault((first, last), []).append(device)
    return parts


def _layer_groups(
    leaf: jax.ShapeDtypeStruct, source: NamedSharding, final: NamedSharding
) -> list[slice]:
    """Which of a parameter's tensors are read at a time: all, unless they must be moved on."""
    layers = leaf.shape[0]
    moved = not source.is_equivalent_to(final, leaf.ndim)
    if leaf.ndim < 3 or not moved:
        return [slice(0, layers)]
    step = max(1, _GROUP_BYTES * layers // (leaf.size * leaf.dtype.itemsize))
    return [slice(at, min(at + step, layers)) for at in range(0, layers, step)]


def _insert(
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
    whole: jax.Array | None,
    group: jax.Array,
    first: int,
) -> jax.Array:
    """Puts layers into the whole parameter, in place; None starts one."""
    if whole is None:
        whole = _zeros(leaf.shape, leaf.dtype, sharding)()
    return _inserter(sharding)(whole, group, np.int32(first))


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding):
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _inserter(sharding: NamedSharding):
    def insert(whole, group, first):
        return jax.lax.dynamic_update_slice_in_dim(whole, group, first, 0)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _read_part(
    path: str,
    leaf: jax.ShapeDtypeStruct,
    rows: int,
    pieces: Iterator[np.ndarray],
    pool: ThreadPoolExecutor,
) -> tuple[np.ndarray, set[int]]:
    """One device's part of a parameter, and the layers in which it holds NaN or Inf."""
    axis = _file_axis(path, leaf.ndim)
    shape = tuple(rows if i == axis else size for i, size in enumerate(leaf.shape))
    size = math.prod(shape) * leaf.dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    aligned = raw[-raw.ctypes.data % 64 :][:size]  # which device_put need not copy on CPU
    buffer = aligned.view(leaf.dtype).reshape(shape)
    copies: deque[tuple[int, Future[bool]]] = deque()
    bad = set()

    def finish(most: int) -> None:
        while len(copies) > most:
            layer, finite = copies.popleft()
            if not finite.result():
                bad.add(layer)

    for layer, values in enumerate(buffer if _is_stacked(path) else buffer[None]):
        target = values.T if _is_transposed(path) else values.reshape(len(values), -1)
        at = 0
        while at < len(target):
            piece = next(pieces)
            copies.append((layer, pool.submit(_copy, target[at : at + len(piece)], piece)))
            at += len(piece)
            finish(2 * _COPY_THREADS)
    finish(0)
    return buffer, bad


def _copy(target: np.ndarray, piece: np.ndarray) -> bool:
    """target[:] = piece, casting; False if the piece holds NaN or Inf."""
    piece = piece.reshape(target.shape)
    finite = _all_finite(piece)
    # As plain integers: numpy moves bfloat16, which it does not know, element by element.
    unsigned = np.dtype(f"u{target.dtype.itemsize}")
    to, rows = target.view(unsigned), piece.astype(target.dtype, copy=False).view(unsigned)
    if target.strides[0] < target.strides[1]:
        to.T[:] = _turned(rows)
    else:
        to[:] = rows
    return finite


def _turned(rows: np.ndarray) -> np.ndarray:
    """rows.T, contiguous where the runtime can turn it: five times as fast as numpy's own copy."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return rows.T
    return np.asarray(jax.device_put(rows.T, cpu))


def _all_finite(block: np.ndarray) -> bool:
    """np.isfinite(block).all(), on the exponent bits: ten times faster, any float dtype."""
    unsigned = np.dtype(f"u{block.dtype.itemsize}")
    exponent = np.asarray(np.inf, block.dtype).view(unsigned)
    return bool(np.max(block.view(unsigned) & exponent) != exponent)


def _redistribute(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    if array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    return _redistributor(array.sharding, sharding)(array)


@functools.lru_cache(maxsize=64)
def _redistributor(source: NamedSharding, final: NamedSharding):
    """A jitted identity from one layout to the other, over the interconnect.

    In two steps, first gathering over the axes of `source` that `final` does not have: asked for
    both at once, the partitioner replicates the whole array.
    """
    kept = {name for part in final.spec for name in _axes(part)}
    spec = P(*[tuple(name for name in _axes(part) if name in kept) for part in source.spec])

    def identity(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(final.mesh, spec))

    return jax.jit(identity, out_shardings=final)


def _agree_undamaged(
    folder: Folder, entries: Mapping[str, TensorEntry], damaged: list[str]
) -> None:
    """UserError in every process if one of them met NaN or Inf."""
    total = len(damaged)
    if jax.process_count() > 1:
        total = int(multihost_utils.process_allgather(np.asarray(total)).sum())
    if damaged:
        raise UserError(
            f"{folder.name(entries[damaged[0]].file)}: {damaged[0]} holds NaN or Inf; the weights "
            "are damaged, fetch or export them again"
        )
    if total:
        raise UserError(f"weights in {folder.path} hold NaN or Inf: see the other processes' logs")


def output_tensors(
    path: str, leaf: jax.Array, dtype: Any = None, prefix: str = ""
) -> list[OutputTensor]:
    """A parameter as the tensors of a Hugging Face file, one a layer if it is stacked."""
    dtype = jnp.dtype(leaf.dtype if dtype is None else dtype)
    stacked, transposed = _is_stacked(path), _is_transposed(path)
    shape = leaf.shape[1:] if stacked else leaf.shape
    extract = _extractor(dtype, transposed, _replicated(leaf))
    return [
        OutputTensor(
            name=name,
            shape=shape[::-1] if transposed else shape,
            dtype=dtype,
            fetch=functools.partial(extract, leaf, np.int32(layer) if stacked else None),
        )
        for layer, name in enumerate(_layer_names(path, leaf.shape[0], prefix))
    ]


def _replicated(leaf: jax.Array) -> NamedSharding | None:
    # Several processes: the writing one must hold all of a tensor. One process: it already does.
    return NamedSharding(leaf.sharding.mesh, P()) if jax.process_count() > 1 else None


@functools.lru_cache(maxsize=64)
def _extractor(dtype: Any, transposed: bool, sharding: NamedSharding | None):
    def extract(leaf, layer):
        block = leaf
        if layer is not None:
            block = jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
        return (block.T if transposed else block).astype(dtype)

    return jax.jit(extract, out_shardings=sharding)
