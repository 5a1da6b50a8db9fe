r"""Loads a generated 6 GB Llama (bfloat16, 4 safetensors shards) and prints speed and host memory.

The peer, in the same run: safetensors' own numpy reader copying every tensor of the same files
into memory. Both read from the page cache, each in a process of its own, in turns; the best of
`--rounds` counts. A virtual machine's free memory goes back to its host within seconds, and what is
taken then comes slower: so as much is touched and freed just before each measurement. Beyond =
peak resident memory, less what was resident before and the arrays loaded. On 8 fake devices every
copy between devices is a copy in the host's memory too. Needs 16 GB of memory.

    python benchmarks/loading.py [--folder=DIR] [--rounds=3] [--out=FILE.json]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import table_head, versions, write_record

from sa_jax.text import table_row

GB, GIB = 1e9, 2**30
# Llama-3.2-3B's shape: 6.4 GB in bfloat16.
SHAPE: dict[str, Any] = dict(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
READERS = {
    "safetensors.numpy": 1,
    "sa_jax, 1 device": 1,
    "sa_jax, 8 devices (fsdp 4, tensor 2)": 8,
}


def generate(folder: Path) -> int:
    """Writes the model folder; returns the bytes of its tensors."""
    import jax.numpy as jnp

    from sa_jax.llama.config import LlamaConfig
    from sa_jax.llama.hf_tensors import output_tensors
    from sa_jax.llama.model import parameter_shapes
    from sa_jax.llama.safetensors_io import write_json, write_tensors

    config = LlamaConfig(**SHAPE)
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.standard_normal(1 << 20), jnp.bfloat16)

    def tensor(out):
        return out._replace(fetch=lambda: jnp.resize(noise, out.shape))

    shapes: dict[str, Any] = parameter_shapes(config, jnp.bfloat16)
    tensors = [tensor(out) for leaf in shapes.items() for out in output_tensors(*leaf)]
    size = sum(out.nbytes for out in tensors)
    write_tensors(folder, "model", tensors, size / 4 + 400e6)
    write_json(folder / "config.json", config.to_hf())
    return size


def resident(field: str) -> int:
    """Bytes of this process, 'VmRSS' now or 'VmHWM' at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def touch_memory(size: int) -> None:
    """Takes so many bytes from the host, and frees them, in a process of its own."""
    subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({size}, 'u1')"], check=True)


def measure(reader: str, folder: Path) -> dict[str, float]:
    """Loads once; seconds, bytes of the arrays, peak bytes beyond them, largest leaf's shard."""
    files = sorted(folder.glob("*.safetensors"))
    room = sum(file.stat().st_size for file in files) + GIB
    if reader == "safetensors.numpy":
        import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
        from safetensors import safe_open

        touch_memory(room)
        before, start = resident("VmRSS"), time.perf_counter()
        arrays: dict[str, Any] = {}
        for file in files:
            with safe_open(file, "np") as opened:
                arrays |= {name: opened.get_tensor(name) for name in opened.keys()}
        seconds = time.perf_counter() - start
        leaves, shard = list(arrays.values()), 0
    else:
        import jax
        import jax.numpy as jnp

        from sa_jax.llama import load_hf
        from sa_jax.parallel.mesh import make_mesh

        mesh = make_mesh(fsdp=4, tensor=2) if READERS[reader] == 8 else make_mesh()
        jax.block_until_ready(jnp.zeros(8) + 1)  # start-up is not loading
        touch_memory(room)
        before, start = resident("VmRSS"), time.perf_counter()
        params = load_hf(folder, mesh, jnp.bfloat16)[1]
        leaves = jax.tree.leaves(jax.block_until_ready(params))
        seconds = time.perf_counter() - start
        shard = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    size = sum(leaf.nbytes for leaf in leaves)
    # Pages of files are counted only while they are mapped; the peer unmaps them.
    beyond = resident("VmHWM") - before - size
    return {"seconds": seconds, "bytes": size, "beyond": beyond, "shard": shard}


def run(reader: str, folder: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    flags = f"--xla_force_host_platform_device_count={READERS[reader]}"
    done = subprocess.run(
        [sys.executable, __file__, f"--reader={reader}", f"--folder={folder}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(folder: Path, rounds: int, out: Path) -> None:
    if not (folder / "config.json").exists():
        generate(folder)
    for file in folder.glob("*.safetensors"):  # into the page cache
        with open(file, "rb", buffering=0) as opened:
            while opened.read(64 << 20):
                pass
    results: dict[str, list[dict]] = {reader: [] for reader in READERS}
    for _ in range(rounds):
        for reader in READERS:
            results[reader].append(run(reader, folder))
    best = {reader: min(r["seconds"] for r in found) for reader, found in results.items()}
    peer = best["safetensors.numpy"]
    rows = []
    for reader, found in results.items():
        rows.append(
            {
                "reader": reader,
                "gb_per_s": found[0]["bytes"] / best[reader] / GB,
                "times_peer": best[reader] / peer,
                "beyond_gib": max(r["beyond"] for r in found) / GIB,
                "allowed_gib": 1 + found[0]["shard"] / GIB,
            }
        )
    print(table_head(["reader", "GB/s", "time / peer", "beyond the arrays, GiB", "allowed"]))
    for reader, *values in (row.values() for row in rows):
        print(table_row([reader, *(f"{value:.2f}" for value in values)]))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
    machine |= versions("jax", "safetensors")
    print(f"{found[0]['bytes'] / GB:.2f} GB, {machine}")
    write_record(out, {"machine": machine, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the model is, or is written to")
    parser.add_argument("--rounds", type=int, default=3, help="loads by each reader")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".json"), help="JSON file of results"
    )
    arguments = parser.parse_args()
    if arguments.reader:
        print(json.dumps(measure(arguments.reader, arguments.folder)))
    elif arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        table(arguments.folder, arguments.rounds, arguments.out)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            table(Path(scratch), arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
