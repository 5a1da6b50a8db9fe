r"""Bytes that one decode step of 8B moves in a chip's memory, compiled for TPUs or GPUs.

    python benchmarks/decode_bytes.py [--topology=v5p:2x2x1] [--mesh=1x1x4] [--batch=64] \
        [--context=1024]

The sampler's own program with a full cache. `--mesh` is where the parameters are, data x fsdp x
tensor, by default tensor-parallel over the chips; the sampler decodes on its `decoding_mesh`. Each
instruction of the compiled text reads its operands and writes its result, except what lies in
vector memory, what a fusion takes a slice of, and what it updates in place. Beside it: weights and
cache, read once.
"""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
from common import table_head

from sa_jax.config_files import load_config
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler, SamplingSettings, noise_arguments
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import abstract
from sa_jax.planning.collectives import read_collectives
from sa_jax.planning.hlo import Instruction, Module, parse_module, shape_bytes
from sa_jax.planning.memory import device_bytes
from sa_jax.planning.topology import open_topology, parse_topology
from sa_jax.text import table_row
from sa_jax.training.plan import plan_architecture, reserve_fake_devices
from sa_jax.training.start import abstract_params

_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "custom-call"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand holds the new values


def hbm(shape: str) -> int:
    """Bytes of the arrays of a shape that do not lie in vector memory, `{1,0:T(8,128)S(1)}`."""
    return sum(shape_bytes(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(\d\)[^}]*\}", "", shape)))


def operands(instruction: Instruction) -> list[str]:
    depth, end = 1, 0
    while depth and end < len(instruction.rest):
        depth += {"(": 1, ")": -1}.get(instruction.rest[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", instruction.rest[:end])


def read(module: Module, name: str, index: int, whole: int) -> int:
    """Bytes that a fused computation reads of an operand of `whole` bytes."""
    body = module.computations[name]
    parameter = (i.name for i in body if i.opcode == "parameter" and i.rest.startswith(f"{index})"))
    return _read(module, body, next(parameter), whole)


def _read(module: Module, body: list[Instruction], name: str, whole: int) -> int:
    total = 0
    for user in body:
        places = [] if user.opcode in ("parameter", "constant") else operands(user)
        if name not in places:
            continue
        if user.opcode in _SLICES and places[0] == name:
            total += sum(shape_bytes(user.shape))
        elif user.opcode == "bitcast":
            total += _read(module, body, user.name, whole)
        elif user.opcode == "fusion":
            total += read(module, user.attribute("calls"), places.index(name), whole)
        elif user.opcode not in _UPDATES or places[0] != name:
            return whole
    return min(total, whole)


def written(module: Module, name: str, instruction: Instruction) -> int:
    """Bytes that a computation writes whose result one instruction is."""
    by_name = {i.name: i for i in module.computations[name]}
    if instruction.opcode == "tuple":
        return sum(written(module, name, by_name[part]) for part in operands(instruction))
    if instruction.opcode == "bitcast":
        return written(module, name, by_name[operands(instruction)[0]])
    if instruction.opcode == "fusion":
        inner = instruction.attribute("calls")
        return written(module, inner, module.computations[inner][-1])
    if instruction.opcode in _UPDATES:
        new = by_name[operands(instruction)[_UPDATES[instruction.opcode]]]
        return sum(shape_bytes(new.shape))
    return hbm(instruction.shape)


def layer_bytes(shape: str) -> int:
    """Bytes that decoding's kernel reads of an operand: of the cache (six axes), one layer."""
    axes = re.findall(r"\[([\d,]*)\]", shape)[0].split(",")
    return hbm(shape) // (int(axes[0]) if len(axes) == 6 else 1)


def moved(module: Module, name: str, blocks: int, steps: int = 0) -> dict[str, int]:
    """Bytes by opcode of one execution. A loop turns `steps` times, if this is given; in it, loops
    of unknown length are over the blocks of the cache."""
    total: dict[str, int] = {}
    shapes = {i.name: i.shape for i in module.computations[name]}
    for i in module.computations[name]:
        if i.opcode == "custom-call" and "triton" in i.rest:  # it reads a layer of the cache
            parts = {"kernel": hbm(i.shape) + sum(layer_bytes(shapes[o]) for o in operands(i))}
        elif i.opcode in _FREE or i.opcode.endswith("-done"):
            continue
        elif i.opcode == "while":
            known = module.trips(i)
            count = steps or (known if known > 1 else blocks)
            body = moved(module, i.attribute("body"), blocks)
            parts = {kind: size * count for kind, size in body.items()}
        elif i.opcode == "conditional":  # its dearest branch
            branches = (moved(module, branch, blocks) for branch in i.callees())
            parts = max(branches, key=lambda kinds: sum(kinds.values()))
        elif i.opcode == "fusion":
            calls, places = i.attribute("calls"), operands(i)
            size = min(hbm(i.shape), written(module, calls, module.computations[calls][-1]))
            for index, place in enumerate(places):
                if whole := hbm(shapes[place]):
                    size += read(module, calls, index, whole)
            parts = {"fusion": size}
        elif i.opcode.endswith("-start"):  # its result names its operand too
            parts = {i.opcode: hbm(i.shape)}
        else:
            parts = {i.opcode: hbm(i.shape) + sum(hbm(shapes.get(o, "")) for o in operands(i))}
        for kind, size in parts.items():
            total[kind] = total.get(kind, 0) + size
    return total


def compile_decode(topology: str, mesh: str, batch: int, context: int):
    """(text of the compiled decode loop, weights and cache in bytes a device, blocks of a row, the
    mesh it runs on)."""
    config = plan_architecture(load_config("configs/llama.py:8b_insertion"))
    devices = open_topology(topology).devices
    data, fsdp, tensor = map(int, mesh.split("x")) if mesh else (1, 1, len(devices))
    on_mesh = make_mesh(data, fsdp, tensor, devices)
    model = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    sampler = Sampler(model, on_mesh, batch_size=batch, context_length=context)
    params = abstract(sampler.mesh, abstract_params(model))
    cache = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(sampler._init_cache),
        sampler.cache_shardings,
    )
    rows = (sampler.batch_size,)
    row = jax.ShapeDtypeStruct(rows, jnp.int32)
    per_row = (row, row, row, jax.ShapeDtypeStruct(rows, jnp.uint32), np.asarray([1], np.int32))
    settings = SamplingSettings(max_new_tokens=context, temperature=1.0, seed=0)
    decoding_params = abstract(sampler.mesh, jax.eval_shape(sampler._for_decoding, params))
    lowered = sampler._decode.lower(
        decoding_params, cache, *per_row, np.int32(1), **noise_arguments(settings)
    )
    text = lowered.compile().as_text()
    local = sum(leaf.size for leaf in cache) * 2 // len(devices)  # bfloat16, rows or heads cut
    sampled_on = "x".join(map(str, sampler.mesh.devices.shape))
    return text, device_bytes(params), local, cache.k.shape[1], sampled_on


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="TPUs or GPUs to compile for")
    parser.add_argument("--mesh", default="", help="data x fsdp x tensor, as 1x8x1")
    parser.add_argument("--batch", type=int, default=64, help="rows decoded together")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row's cache")
    arguments = parser.parse_args()
    reserve_fake_devices(parse_topology(arguments.topology))
    report(*compile_decode(**vars(arguments)))


def report(text, weights, cache, blocks, sampled_on, steps=16):
    module = parse_module(text)
    kinds = {
        kind: size / steps for kind, size in moved(module, module.entry, blocks, steps).items()
    }
    total, least = sum(kinds.values()), weights + cache
    sent = sum(traffic.bytes for traffic in read_collectives(text).values()) / steps
    what = "GB a step and chip: weights, cache"
    print(
        table_head(["decoded on", what, "moved", "over both once", "between chips", "most of it"])
    )
    most = ", ".join(
        f"{k} {v / 1e9:.2f}" for k, v in sorted(kinds.items(), key=lambda e: -e[1])[:4]
    )
    read = f"{weights / 1e9:.2f}, {cache / 1e9:.2f}"
    figures = f"{total / 1e9:.2f}", f"{total / least:.2f}", f"{sent / 1e9:.2f}"
    print(table_row([sampled_on, read, *figures, most]))


if __name__ == "__main__":
    main()
