r"""Adam, official SOAP and fast SOAP: eval loss of a byte-level Llama, and time a step.

Loss: our Llama (byte vocabulary) on the answers of alpaca_en_demo.json, 200 steps, constant rate
after a short warm-up, 3 seeds. Every optimizer gets the same grid of learning rates; the rate with
the lowest mean eval loss counts. Time: the optimizer's update alone, jitted, on a larger Llama, on
one device and on 8 fake ones; each step of the ten-step period is timed several times, and its
median counts.

    SA_JAX_DATA=data python benchmarks/optimizers.py [--skip=loss|time] [--out=FILE.json]
"""

import argparse
import functools
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# The size of XLA's thread pool. It decides how sums are split: with one size, losses repeat on
# machines with other numbers of cores.
os.environ.setdefault("NPROC", "32")

# The CPU's QR is OpenBLAS's, whose threads wait for each other in loops: with other work on the
# machine, matrices of 128 take it a thousand times longer than one thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import table_head, versions, write_record

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.model import Llama
from sa_jax.optim import soap
from sa_jax.optim.build import decay_mask, llama_view
from sa_jax.optim.soap_shared import ELEMENTWISE, TensorView
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import partition_spec, shardings
from sa_jax.text import table_row
from sa_jax.training.losses import make_cross_entropy

SMALL = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=176,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
LARGER = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=128,
)
STEPS, ROWS, LENGTH, EVAL_ROWS = 200, 16, 128, 64
RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
WARMUP = 10
PERIOD, REPEATS, DENSE = 10, 3, 20


def official_view(path: str, shape: tuple[int, ...]) -> TensorView:
    """Every matrix of every layer, the vocabulary's side too, as the official code would see it."""
    if path.endswith("scale"):
        return ELEMENTWISE
    return TensorView(1 if path.startswith("layers/") else 0, (1, 1))


def optimizers(mesh=None, blocks: int = 2048, slots: int = 1) -> dict:
    """Name -> (learning rate -> transformation). All with the same decay of 0.01."""
    shared: dict[str, Any] = {"weight_decay": 0.01, "mask": decay_mask}
    fast = functools.partial(
        soap, mode="fast", view=llama_view, mesh=mesh, partition_spec=partition_spec, **shared
    )
    return {
        "adam": lambda rate: optax.adamw(rate, b1=0.9, b2=0.95, **shared),
        "soap official, f = 10": lambda rate: soap(rate, view=official_view, **shared),
        "soap fast, f = 10": functools.partial(fast, block_size=blocks, refresh_slots=slots),
    }


def with_small_blocks() -> dict:
    """`optimizers()`, and SOAP with as many blocks a side as 8B has with block_size 2048 or 1024:
    2 and 6, or 4 and 11."""
    return optimizers() | {
        f"soap fast, blocks of {size}": optimizers(blocks=size)["soap fast, f = 10"]
        for size in (32, 16)
    }


def batches(text: np.ndarray, seed: int, count: int, rows: int) -> dict[str, np.ndarray]:
    """[count, rows, LENGTH] windows of the text, drawn from the seed."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, (count, rows))
    windows = text[starts[..., None] + np.arange(LENGTH + 1)].astype(np.int32)
    ones = np.ones(windows[..., 1:].shape, np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    return {
        "tokens": windows[..., :-1],
        "targets": windows[..., 1:],
        "loss_mask": ones.astype(bool),
        "positions": positions,
        "segment_ids": ones,
    }


def mean_loss(model: Llama, params, batch) -> jax.Array:
    total, tokens, _ = make_cross_entropy(model)(params, batch, jax.random.key(0))
    return total / tokens


def final_losses(text: np.ndarray) -> list[dict]:
    """Eval loss after training, for every optimizer, rate and seed."""
    model = Llama(SMALL)
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    eval_batch = jax.tree.map(lambda x: x[0], batches(held_out, 99, 1, EVAL_ROWS))
    rows = []
    for name, make in with_small_blocks().items():

        @jax.jit
        def run(rate, params, data, make=make):
            def schedule(step):
                return rate * jnp.minimum(1.0, (step + 1) / WARMUP)

            tx = make(schedule)

            def step(carry, batch):
                params, state = carry
                gradients = jax.grad(functools.partial(mean_loss, model))(params, batch)
                updates, state = tx.update(gradients, state, params)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), data)
            return mean_loss(model, params, eval_batch)

        for rate in RATES:
            losses = []
            for seed in SEEDS:
                tokens = jnp.zeros((1, 8), jnp.int32)
                params = model.init(jax.random.key(seed), tokens)["params"]
                data = batches(train, seed, STEPS, ROWS)
                losses.append(float(run(rate, params, data)))
            rows.append({"optimizer": name, "learning_rate": rate, "eval_loss": losses})
            print(f"  {name:24} {rate:.0e}  " + "  ".join(f"{x:.4f}" for x in losses), flush=True)
    return rows


def best(rows: list[dict]) -> list[dict]:
    """For each optimizer its best rate by mean loss over the seeds."""
    found: dict[str, dict] = {}
    for row in rows:
        mean = float(np.mean(row["eval_loss"]))
        if row["optimizer"] not in found or mean < found[row["optimizer"]]["mean"]:
            found[row["optimizer"]] = row | {"mean": mean}
    return list(found.values())


def update_times(sizes: tuple[int, int, int] | None) -> list[dict]:
    """Milliseconds of an update of LARGER's parameters, for each step of the period."""
    mesh = None if sizes is None else make_mesh(*sizes)
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(Llama(LARGER).init)(jax.random.key(0), tokens)["params"]
    if mesh is not None:
        params = jax.device_put(params, shardings(mesh, params))
    gradients = jax.tree.map(lambda p: 1e-3 * jnp.sin(1e4 * p), params)
    made = optimizers(mesh, blocks=128)
    made["soap fast, f = 10, slots = 10"] = optimizers(mesh, blocks=128, slots=10)[
        "soap fast, f = 10"
    ]
    del made["soap official, f = 10"]  # whole factors on every device
    rows = []
    for name, make in made.items():
        tx = make(1e-6)
        state = jax.jit(tx.init)(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, gradients, tx=tx):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        p = jax.tree.map(jnp.copy, params)
        times = []
        for number in range(DENSE + 1 + PERIOD * REPEATS):
            begin = time.perf_counter()
            p, state = jax.block_until_ready(step(p, state, gradients))
            if number > DENSE:
                times.append(1e3 * (time.perf_counter() - begin))
        phases = np.median(np.reshape(times, (REPEATS, PERIOD)), axis=0)
        rows.append(
            {
                "optimizer": name,
                "mesh": "one device" if mesh is None else dict(mesh.shape),
                "mean_ms": float(np.mean(phases)),
                "median_ms": float(np.median(phases)),
                "max_ms": float(np.max(phases)),
            }
        )
    return rows


def show_losses(rows: list[dict]) -> None:
    print(table_head(["optimizer", "best LR", "eval loss, mean of 3 seeds", "each"]))
    for row in best(rows):
        each = ", ".join(f"{x:.3f}" for x in row["eval_loss"])
        rate = f"{row['learning_rate']:.0e}"
        print(table_row([row["optimizer"], rate, f"{row['mean']:.3f}", each]))


def show_times(rows: list[dict]) -> None:
    columns = ["devices", "optimizer", "ms a step, amortised", "x Adam", "max / median step"]
    print(table_head(columns))
    for row in rows:
        adam = next(r for r in rows if r["optimizer"] == "adam" and r["mesh"] == row["mesh"])
        mesh = row["mesh"]
        if isinstance(mesh, dict):
            mesh = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
        times = f"{row['mean_ms']:.1f}", f"{row['mean_ms'] / adam['mean_ms']:.1f}"
        spread = f"{row['max_ms'] / row['median_ms']:.2f}"
        print(table_row([mesh, row["optimizer"], *times, spread]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--skip", choices=("loss", "time"), help="one of the two tables")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")), help="JSON file")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions("jax")},
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
    }
    if options.skip != "loss":
        data = Path(os.environ["SA_JAX_DATA"], "alpaca_answers", "alpaca_en_demo.json")
        answers = "\n\n".join(row["output"] for row in json.loads(data.read_text()))
        text = np.frombuffer(answers.encode(), np.uint8)
        found["losses"] = final_losses(text)
        show_losses(found["losses"])
    if options.skip != "time":
        found["times"] = update_times(None) + update_times((1, 4, 2))
        show_times(found["times"])
    write_record(options.out, found)


if __name__ == "__main__":
    main()
