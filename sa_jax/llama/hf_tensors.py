"""Parameters as the tensors of Hugging Face files: names, layout, sharded reading and writing.

The processes together read every byte of a folder once, and cast and transpose it while they read.
A single process shards what it reads for its devices. With several processes, each reads some rows
of a matrix for its devices, in the order of the file; the devices then redistribute them among
themselves. Host memory holds some layers of one parameter, and the reads in flight.
"""

import functools
import itertools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from sa_jax.errors import UserError
from sa_jax.llama.safetensors_io import DTYPES, Folder, OutputTensor, Rows, TensorEntry, read_rows
from sa_jax.parallel import rules
from sa_jax.parallel.multihost import exchange, is_primary
from sa_jax.text import first_few

# Modules by their path in our parameters; `layers/...` stand under model.layers.N.
MODULES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers/attention_norm": "input_layernorm",
    "layers/attention/q": "self_attn.q_proj",
    "layers/attention/k": "self_attn.k_proj",
    "layers/attention/v": "self_attn.v_proj",
    "layers/attention/q_norm": "self_attn.q_norm",
    "layers/attention/k_norm": "self_attn.k_norm",
    "layers/attention/o": "self_attn.o_proj",
    "layers/mlp_norm": "post_attention_layernorm",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
}
_PARAMETERS = {"bias": "bias", "lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# A stacked leaf is taken in groups of layers of this size.
_GROUP_BYTES = 256 << 20
_COPY_THREADS = min(8, os.cpu_count() or 1)


def _layer_names(path: str, num_layers: int, prefix: str) -> list[str]:
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

    UserError if a tensor is missing, unexpected, not finite, or of another shape or dtype.

    Args:
      folder, entries: the tensors at hand, as `read_headers` gives them.
      shapes: path to shape and dtype of every parameter wanted.
      ignored: names that may be there and are not read.
      prefix: what every name in the files starts with.
    """
    names = {path: _layer_names(path, leaf.shape[0], prefix) for path, leaf in shapes.items()}
    _check_tensors(folder, entries, shapes, names, ignored)
    finals = flatten_dict(rules.shardings(mesh, unflatten_dict(shapes, sep="/")), sep="/")
    plans = []
    for path, leaf in shapes.items():
        source = _source_sharding(path, leaf.shape, finals[path])
        parts = _local_parts(path, source, leaf.shape)
        plans += [(path, layers, source, parts) for layers in _layer_groups(leaf, source)]
    requests = (
        (entries[name], first, last)
        for path, layers, _, parts in plans
        for first, last in parts
        for name in names[path][layers]
    )
    pieces = read_rows(folder, requests)
    total = sum(entries[name].nbytes for path in shapes for name in names[path])
    quiet = None if is_primary() else True  # None: shown if stderr is a terminal
    leaves: dict[str, jax.Array] = {}
    damaged: list[str] = []
    progress = tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet)
    with progress, ThreadPoolExecutor(_COPY_THREADS) as pool:
        for path, layers, source, parts in plans:
            leaf, final = shapes[path], finals[path]
            count = layers.stop - layers.start
            group = leaf.update(shape=(count, *leaf.shape[1:])) if _is_stacked(path) else leaf
            arrays = []
            for (first, last), shares in parts.items():
                buffers, bad = _read_rows(path, group, last - first, list(shares), pieces, pool)
                damaged += [names[path][layers][layer] for layer in bad]
                for buffer, devices in zip(buffers, shares.values(), strict=True):
                    arrays += [jax.device_put(buffer, device) for device in devices]
                jax.block_until_ready(arrays)
                del buffers, buffer  # before the next ones are made
            array: jax.Array = jax.make_array_from_single_device_arrays(group.shape, source, arrays)
            del arrays
            if not source.is_equivalent_to(final, array.ndim):
                array = _redistributor(source, final)(array)
            if group.shape != leaf.shape:
                into = leaves.pop(path, None)
                if into is None:
                    into = _zeros(leaf.shape, leaf.dtype, final)()
                array = _inserter(final)(into, array, np.int32(layers.start))
            # Waiting keeps at most one group in both layouts.
            leaves[path] = jax.block_until_ready(array)
            progress.update(sum(entries[name].nbytes for name in names[path][layers]))
    _agree_undamaged(folder, entries, damaged)
    logging.info("loaded %.2f GB of weights from %s", total / 1e9, folder.path)
    return unflatten_dict(leaves, sep="/")


def _check_tensors(folder, entries, shapes, names, ignored) -> None:
    """UserError unless the files have exactly the wanted tensors."""
    missing, wrong = [], []
    for path, leaf in shapes.items():
        shape = leaf.shape[1:] if _is_stacked(path) else leaf.shape
        shape = shape[::-1] if _is_transposed(path) else shape
        for name in names[path]:
            if name not in entries:
                missing.append(name)
                continue
            entry = entries[name]
            place = f"{name} in {folder.name(entry.file)}"
            if entry.shape != shape:
                wrong.append(f"{place} is {list(entry.shape)}, not {list(shape)}")
            elif entry.dtype not in DTYPES:
                wrong.append(f"{place} is {entry.dtype}, not {', '.join(DTYPES)}")
    extra = sorted(entries.keys() - set(itertools.chain(*names.values())) - set(ignored))
    surplus = [f"{name} in {folder.name(entries[name].file)}" for name in extra]
    for problem, tensors in (
        (f"{folder.path} lacks tensors: ", missing),
        ("tensors do not fit the config: ", wrong),
        ("tensors the model does not have: ", surplus),
    ):
        if tensors:
            raise UserError(
                f"{problem}{first_few(tensors, 3, '; ')}. Weights and config.json must come from "
                "the same, complete download"
            )


def _file_axes(path: str, ndim: int) -> tuple[int, int] | None:
    """The axes with rows and columns of a parameter's matrices in the file; None for vectors."""
    if ndim - _is_stacked(path) < 2:
        return None
    return (ndim - 1, ndim - 2) if _is_transposed(path) else (ndim - 2, ndim - 1)


def _one_process() -> bool:
    return jax.process_count() == 1


def _on_host(sharding: NamedSharding) -> bool:
    """Whether the devices' memory is the host's."""
    mesh: Any = sharding.mesh
    return mesh.devices.flat[0].platform == "cpu"


def _source_sharding(path: str, shape: tuple[int, ...], final: NamedSharding) -> NamedSharding:
    """The sharding in which a parameter is read.

    A single process reads it in its final sharding (except, on accelerators, an embedding, which
    the host would hold as a whole). Several processes read matrices by rows of the file, over all
    devices, and vectors everywhere. Rows are contiguous in the file, so each byte is read for one
    device only. The mesh axes that shard the parameter's rows come first, then those of its other
    axis, then those it is replicated over: one gather and one all-to-all then give the final
    sharding.
    """
    if _one_process() and (len(shape) == 3 or _on_host(final)):
        return final
    file_axes = _file_axes(path, len(shape))
    if file_axes is None:
        return NamedSharding(final.mesh, P())
    axis = file_axes[0]
    spec = rules.spec_axes(final.spec, len(shape))
    used = spec.pop(axis) + sum(spec, ())
    axes = used + tuple(name for name in final.mesh.axis_names if name not in used)
    while shape[axis] % math.prod(final.mesh.shape[name] for name in axes):
        axes = axes[:-1]
    return NamedSharding(final.mesh, P(*[None] * axis, axes))


_Range = tuple[int, int]  # [first, last)


def _local_parts(
    path: str, sharding: NamedSharding, shape: tuple[int, ...]
) -> dict[_Range, dict[_Range, list[jax.Device]]]:
    """The file's rows that this process reads, the column ranges, and the devices of each."""
    axes = _file_axes(path, len(shape))
    parts: dict[_Range, dict[_Range, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # the device holds a part
        ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        rows, columns = ranges[-1], (0, 1)
        if axes is not None:
            rows, columns = ranges[axes[0]], ranges[axes[1]]
        parts.setdefault(rows, {}).setdefault(columns, []).append(device)
    return parts


def _layer_groups(leaf: jax.ShapeDtypeStruct, source: NamedSharding) -> list[slice]:
    """Which of a parameter's tensors are read together.

    All of them if the host's buffers become the arrays: with one process, on CPU.
    """
    layers = leaf.shape[0]
    if leaf.ndim < 3 or (_one_process() and _on_host(source)):
        return [slice(0, layers)]
    step = max(1, _GROUP_BYTES * layers // (leaf.size * leaf.dtype.itemsize))
    return [slice(at, min(at + step, layers)) for at in range(0, layers, step)]


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding):
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _inserter(sharding: NamedSharding):
    """Puts a group of layers into the whole parameter, in place."""
    insert = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _read_rows(
    path: str,
    leaf: jax.ShapeDtypeStruct,
    rows: int,
    columns: Sequence[_Range],
    pieces: Iterator[Rows],
    pool: ThreadPoolExecutor,
) -> tuple[list[np.ndarray], set[int]]:
    """Reads `rows` rows of a parameter's matrices into a buffer for each range of their columns;
    returns the buffers, and the layers that contain NaN or Inf."""
    axes = _file_axes(path, leaf.ndim)
    buffers = []
    for first, last in columns:
        shape = list(leaf.shape)
        if axes is not None:
            shape[axes[0]], shape[axes[1]] = rows, last - first
        buffers.append(_aligned(shape, leaf.dtype))
    copies: deque[tuple[int, Future[bool]]] = deque()
    bad = set()

    def finish(most: int) -> None:
        while len(copies) > most:
            layer, finite = copies.popleft()
            if not finite.result():
                bad.add(layer)

    for layer in range(leaf.shape[0] if _is_stacked(path) else 1):
        targets = [buffer[layer] if _is_stacked(path) else buffer for buffer in buffers]
        targets = [x.T if _is_transposed(path) else x.reshape(len(x), -1) for x in targets]
        at = 0
        while at < len(targets[0]):
            piece = next(pieces)
            cuts = [target[at : at + piece.count] for target in targets]
            copies.append((layer, pool.submit(_copy, cuts, columns, piece)))
            at += piece.count
            finish(2 * _COPY_THREADS)
    finish(0)
    return buffers, bad


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that device_put need not copy on CPU."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:size].view(dtype).reshape(shape)


def _copy(targets: Sequence[np.ndarray], columns: Sequence[_Range], piece: Rows) -> bool:
    """Each target = its columns of the piece, cast; False if the piece holds NaN or Inf."""
    read = piece.fetch().reshape(piece.count, -1)
    finite = _all_finite(read)
    # As plain integers: numpy moves bfloat16, which it does not know, element by element.
    unsigned = np.dtype(f"u{targets[0].dtype.itemsize}")
    rows = read.astype(targets[0].dtype, copy=False).view(unsigned)
    for target, (first, last) in zip(targets, columns, strict=True):
        to, values = target.view(unsigned), rows[:, first:last]
        if to.strides[0] < to.strides[1]:
            to.T[:] = _turned(values)
        else:
            to[:] = values
    return finite


def _turned(rows: np.ndarray) -> np.ndarray:
    """rows.T, contiguous if the runtime can transpose it: five times as fast as numpy's copy."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return rows.T
    return np.asarray(jax.device_put(rows.T, cpu))


def _all_finite(block: np.ndarray) -> bool:
    """np.isfinite(block).all() for any float dtype, twenty times as fast, without a second array.

    Read as integers, the bits of infinity are the smallest that are not a finite number: among
    positive numbers as signed integers, among negative ones as unsigned integers.
    """
    size = block.dtype.itemsize
    infinity, minus = np.asarray([np.inf, -np.inf], block.dtype).view(f"u{size}")
    signed, unsigned = block.view(f"i{size}"), block.view(f"u{size}")
    return bool(signed.max() < infinity and unsigned.max() < minus)


@functools.lru_cache(maxsize=64)
def _redistributor(source: NamedSharding, final: NamedSharding):
    """A jitted identity from one layout to the other, over the interconnect.

    In two steps, first gathering over the axes of `source` that `final` does not have: asked for
    both at once, the partitioner replicates the whole array.
    """
    kept = {*itertools.chain(*rules.spec_axes(final.spec))}
    parts = rules.spec_axes(source.spec)
    spec = P(*[tuple(name for name in names if name in kept) for names in parts])
    gather = functools.partial(
        jax.lax.with_sharding_constraint, shardings=NamedSharding(final.mesh, spec)
    )
    return jax.jit(gather, out_shardings=final)


def _agree_undamaged(
    folder: Folder, entries: Mapping[str, TensorEntry], damaged: list[str]
) -> None:
    """UserError in every process if one of them has read NaN or Inf."""
    if name := next(filter(None, exchange(damaged[0] if damaged else "")), None):
        raise UserError(
            f"{folder.name(entries[name].file)}: {name} contains NaN or Inf; the weights are "
            "damaged, download or export them again"
        )


def output_tensors(
    path: str, leaf: jax.Array, dtype: Any = None, prefix: str = ""
) -> list[OutputTensor]:
    """A parameter as the tensors of a Hugging Face file, one per layer if it is stacked."""
    dtype = jnp.dtype(leaf.dtype if dtype is None else dtype)
    stacked, transposed = _is_stacked(path), _is_transposed(path)
    shape = leaf.shape[1:] if stacked else leaf.shape
    # Of several processes the writing one must hold all of a tensor; one alone already does.
    mesh: Any = getattr(leaf.sharding, "mesh", None)
    whole = NamedSharding(mesh, P()) if jax.process_count() > 1 else None
    extract = _extractor(dtype, transposed, whole)
    return [
        OutputTensor(
            name=name,
            shape=shape[::-1] if transposed else shape,
            dtype=dtype,
            fetch=functools.partial(extract, leaf, np.int32(layer) if stacked else None),
        )
        for layer, name in enumerate(_layer_names(path, leaf.shape[0], prefix))
    ]


@functools.lru_cache(maxsize=64)
def _extractor(dtype: Any, transposed: bool, sharding: NamedSharding | None):
    def extract(leaf, layer):
        block = leaf
        if layer is not None:
            block = jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
        return (block.T if transposed else block).astype(dtype)

    return jax.jit(extract, out_shardings=sharding)
