r"""Memory, predicted time and compile time of training steps, on paper: each row is a TPU plan.

    python benchmarks/growth.py [--tables=published,growth] [--only=WORDS] [--out=FILE.json]

published: steps whose speed others have published, with the predicted speed over theirs; as
  training compiles them, and "whole".
options: as training compiles them, and without two of its options: "whole" lets no SparseCore
  gather weights and sum gradients, so that the matrix units wait; "loops" also lets XLA cut
  products of gathered weights into loops of one chunk a device and a permute (windowed einsum).
growth: 8B over sequence length, rows and layers; 70B over chips, 4,096 tokens each.
optimizers: Adam and SOAP at the study's 65,536 tokens a step.

A row is named by its run of configs/llama.py, topology, rows x tokens, fsdp x tensor and changes.
One takes minutes; what FILE.json has is not compiled again, unless it failed.
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from common import table_head

from sa_jax.config_files import load_config
from sa_jax.errors import UserError
from sa_jax.files import atomic_write
from sa_jax.parallel.xla_flags import WITHOUT_SPARSE_CORES
from sa_jax.text import table_row
from sa_jax.training.config import changed
from sa_jax.training.plan import plan

# The size in MiB from which XLA makes loops: of all weights, or of none.
OPTIONS = {
    word: f"{WITHOUT_SPARSE_CORES} xla_jf_spmd_threshold_for_windowed_einsum_mib={mib}"
    for word, mib in (("loops", 0), ("whole", 1_000_000))
}
# Tokens/s/chip that MaxText prints for the same model, rows and chips:
# https://github.com/AI-Hypercomputer/tpu-recipes, training/trillium/*-MaxText, and for v5p its
# "Optimized models tiering" page. It keeps more between the passes than our full remat.
PUBLISHED = {
    "8b_insertion v6e:2x4 24x8192 8x1": 7139,
    "70b_insertion v6e:4x8 64x8192 32x1 remat=offload param_dtype=bfloat16 "
    "optimizer.mu_dtype=bfloat16": 921,
    "8b_insertion v6e:16x16 1024x8192 256x1": 7207,
    "70b_insertion v5p:4x8x8 1024x4096 256x1 architecture.vocab_size=32000": 692,
}
V5P = "8b_insertion v5p:2x2x2"
STEPS = (
    f"{V5P} 16x2048 8x1",
    "70b_insertion v5p:4x4x4 64x2048 16x4",
    "8b_insertion v6e:2x4 16x4096 4x2",
    "70b_removal v5p:2x2x4 16x4096 4x4",
    "8b_insertion v6e:16x16 1024x8192 256x1",
    "8b_insertion v5e:4x4 16x4096 4x4",
)
BATCHES = "16x1024 16x2048 16x4096 16x8192 8x32768 8x2048 32x2048 64x2048".split()
CHIPS = ("2x2x2 8x4096 2x4", "2x4x4 32x4096 8x4", "4x4x4 64x4096 16x4", "8x8x8 512x4096 64x8")
TABLES = {
    "published": [row + option for row in PUBLISHED for option in (" whole", "")],
    "options": [row + option for row in STEPS for option in (" loops", " whole", "")],
    "growth": [f"{V5P} {batch} 8x1" for batch in BATCHES]
    + [f"{V5P} 16x2048 8x1 architecture.num_hidden_layers={n}" for n in (8, 16, 64)]
    + [f"70b_insertion v5p:{row}" for row in CHIPS],
    "optimizers": [
        f"8b_insertion v5p:2x2x4 16x4096 16x1 optimizer.name={name}"
        for name in (
            "adam",
            "soap",
            "soap optimizer.soap.refresh_slots=10",
            "soap optimizer.soap.block_size=1024",
        )
    ],
}


def measure(name):
    """What of a row's plan the tables show, or the line that says why there is none."""
    run, topology, batch, mesh, *options = name.split()
    rows, length = map(int, batch.split("x"))
    fsdp, tensor = map(int, mesh.split("x"))
    changes: dict[str, Any] = {"batch_size": rows, "sequence_length": length}
    changes |= {"mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    for option in options:
        key, _, value = option.partition("=")
        changes[key] = int(value) if value.isdigit() else value
    for word, option in OPTIONS.items():
        if changes.pop(word, None) is not None:
            changes["xla_options"] = option
    try:
        made = plan(changed(load_config(f"configs/llama.py:{run}"), changes), topology)
    except UserError as error:
        return {"error": str(error).splitlines()[0]}
    return {
        "gib": made["memory_gib_per_chip"],
        "clock": made["clock"],
        "roofline_s": made["time"]["step_s"],
        "compile_s": made["compile_s"],
        "libtpu": importlib.metadata.version("libtpu"),
    }


def line(name, row):
    if "error" in row:
        return f"| {name} | {row['error'][:90]} | | | | | |"
    clock, gib = row["clock"], row["gib"]
    memory = ", ".join(f"{gib[key]:.1f}" for key in ("arguments", "temporaries", "needed"))
    predicted, speed, over = "no executable", "", ""
    if clock:
        rate = clock["tokens_per_s_per_chip"]
        predicted, speed = f"{clock['step_s']:.3f}", f"{rate:,.0f} ({100 * clock['mfu']:.0f} %)"
        if clock["conditionals"]:
            predicted += f" (dearest {clock['dearest_step_s']:.3f})"
        if published := PUBLISHED.get(name.removesuffix(" whole")):
            over = f"{rate / published:.2f}"
    times = f"{row['roofline_s']:.3f}", predicted
    return table_row([name, memory, *times, speed, over, f"{row['compile_s']:.0f}"])


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", default=",".join(TABLES), help="of: " + ", ".join(TABLES))
    parser.add_argument("--only", default="", help="rows whose name has these words")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_suffix(".json"),
        help="JSON file of all rows; only rows that it lacks are compiled",
    )
    arguments = parser.parse_args()
    measured = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for table in arguments.tables.split(","):
        for name in TABLES[table]:
            # What failed is tried again: another libtpu or more memory may do it.
            if "error" in measured.get(name, {"error": ""}) and arguments.only in name:
                print(f"compiling {name}", file=sys.stderr)
                measured[name] = measure(name)
                atomic_write(arguments.out, json.dumps(measured, indent=1) + "\n")
        memory = "GiB a chip: arguments, temporaries, needed"
        columns = [table, memory, "roofline, s", "predicted, s", "tokens/s/chip (MFU)"]
        print(f"\n{table_head([*columns, 'over published', 'compile, s'])}")
        print(*(line(name, measured[name]) for name in TABLES[table] if name in measured), sep="\n")


if __name__ == "__main__":
    main()
