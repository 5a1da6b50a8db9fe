r"""One training step: sa_jax against transformers and torch, on the same weights and rows.

Both train in float32 with AdamW (torch's is the fused one) and clip the gradient's norm to 1, on
packed rows of documents that do not see each other. The losses of the first three steps must agree
to 1e-5, relative. Then all take turns, a step each, and the median of each counts.

    python benchmarks/training.py [--sizes=toy,25M] [--lora_rank=64] [--rounds=10] [--parts] \
        [--out=FILE.json]

--sizes=toy:8x512 takes 8 rows of 512 tokens instead of the size's own. By default all weights are
trained. --lora_rank trains LoRA adapters on all projections, against the package peft.

torch runs as it is ("eager") and through torch.compile, both with SDPA attention. --parts prints
where our step spends its time, by JAX's profiler.

With --device=cuda the products of float32 weights are in bfloat16, and a row is one document, so
that torch takes its flash attention; the losses must agree to 1 %. No GPU has run this yet.
"""

import argparse
import collections
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "" if "--device=cuda" in sys.argv else "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
os.environ.setdefault("SA_JAX_COMPILATION_CACHE", "off")  # the first step's time holds compilation

from sa_jax.host_memory import keep_freed_memory

keep_freed_memory()  # as a run on CPU does; it holds for torch too

import jax
import numpy as np
import peft
import torch
import transformers
from common import table_head, versions, write_record
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf import save_hf, write_peft
from sa_jax.llama.safetensors_io import new_folder
from sa_jax.parallel.mesh import make_mesh
from sa_jax.text import table_row
from sa_jax.training.config import default_config
from sa_jax.training.program import make_model, make_program
from sa_jax.training.start import split_trainable
from sa_jax.training.step import init_state

# name: (vocabulary, width, MLP, layers, heads, key/value heads), rows, tokens a row
SIZES = {
    "toy": ((768, 128, 352, 4, 4, 2), 32, 128),
    "stories260k": ((512, 64, 172, 5, 8, 4), 32, 256),
    "25M": ((8192, 512, 1408, 6, 8, 4), 4, 256),
    "110M": ((8192, 768, 2048, 12, 12, 12), 2, 512),
    "1B": ((128_256, 2048, 8192, 16, 32, 8), 2, 4096),
}
ON_CPU = [name for name in SIZES if name != "1B"]
CUDA = "--device=cuda" in sys.argv
DTYPE, TOLERANCE, DOCUMENTS = ("bfloat16", 1e-2, 1) if CUDA else ("float32", 1e-5, 4)
LEARNING_RATE, B1, B2, EPS, DECAY, CLIP = 1e-3, 0.9, 0.99, 1e-8, 0.01, 1.0
CHECKED_STEPS = 3
# part of a step: what the scopes of its operations match, the first that does
PARTS = {
    "norms": "norm/",
    "q, k, v and o": "/attention/[qkvo]/",
    "attention": "/attention/",
    "MLP": "/mlp/",
    "loss": "ntc",
    "rest": "",
}


def architecture(vocab, width, mlp, layers, heads, kv_heads) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def packed_rows(vocab: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of `DOCUMENTS`; all tokens but each document's last bear loss."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(4, length), (rows, DOCUMENTS - 1)), axis=1)
    segments = 1 + (np.arange(length) >= cuts[..., None]).sum(1).astype(np.int32)
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    tokens = rng.integers(3, vocab, (rows, length), dtype=np.int32)
    mask = np.zeros((rows, length), bool)
    mask[:, :-1] = segments[:, 1:] == segments[:, :-1]
    return {
        "tokens": tokens,
        "targets": np.where(mask, np.roll(tokens, -1, axis=1), 0),
        "loss_mask": mask,
        "positions": (np.arange(length) - starts).astype(np.int32),
        "segment_ids": segments,
    }


def ours(
    config: LlamaConfig, lora_rank: int, batch: dict[str, np.ndarray], folder: str
) -> tuple[Callable[[], float], str]:
    """The step that a run compiles, and its HLO text; writes its first weights to the folder, and
    its adapter to folder/adapter."""
    settings = default_config()
    settings.batch_size, settings.sequence_length = batch["tokens"].shape
    settings.dtype, settings.remat = DTYPE, "none"
    settings.lora.update(rank=lora_rank, alpha=2.0 * lora_rank)
    settings.optimizer.update(
        learning_rate=LEARNING_RATE, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY, clip_norm=CLIP
    )
    settings.optimizer.update(schedule="constant", warmup_fraction=0.0)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = make_model(settings, config, mesh)
    short = model.clone(attention="reference", mesh=None)  # kernels refuse a short row
    params = short.init(jax.random.key(0), batch["tokens"][:, :8])["params"]
    trained, frozen = split_trainable(params, model.lora)
    save_hf(folder, config, frozen or trained)
    if model.lora:
        with new_folder(f"{folder}/adapter") as adapter:
            write_peft(adapter, model.lora, trained, base_model=folder, files={})
    program = make_program(settings, model, total_steps=1000)
    # As the step returns it, or the second step would be compiled too.
    state = jax.device_put(init_state(trained, program.tx), program.state_shardings)
    batch = jax.device_put(batch)

    def step() -> float:
        nonlocal state
        state, metrics = program.step(state, frozen, batch)
        return float(metrics["loss"])

    return step, program.step.lower(state, frozen, batch).compile().as_text()


def parts(step: Callable[[], float], text: str, steps: int = 3) -> dict[str, float]:
    """{part of our step: its share of the time}, by the scope that wrote each operation."""
    scopes = dict(re.findall(r'%([\w.-]+) = .*op_name="([^"]*)"', text))
    nanoseconds: collections.Counter[str] = collections.Counter()
    step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if "hlo_op" in dict(event.stats) and event.name in scopes:
                    found = (p for p, word in PARTS.items() if re.search(word, scopes[event.name]))
                    nanoseconds[next(found)] += event.duration_ns
    return {part: spent / nanoseconds.total() for part, spent in nanoseconds.most_common()}


def theirs(folder: str, batch: dict[str, np.ndarray], compiled: bool) -> Callable[[], float]:
    """The same step by transformers (and peft) and torch, from the weights in the folder."""
    # When traced, transformers' own "sdpa" always gets a mask, which rules out flash attention.
    transformers.AttentionMaskInterface.register("causal_sdpa", lambda *args, **kwargs: None)
    transformers.AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    attention = "causal_sdpa" if CUDA else "sdpa"
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).train()
    adapter = Path(folder, "adapter")
    if adapter.exists():
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model = model.cuda() if CUDA else model
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(B1, B2),
        eps=EPS,
        weight_decay=DECAY,
        fused=True,
    )
    length = batch["tokens"].shape[1]
    device = "cuda" if CUDA else "cpu"
    tensors = {name: torch.from_numpy(array).long().to(device) for name, array in batch.items()}
    segments = tensors["segment_ids"]
    same_document = segments[:, None, :, None] == segments[:, None, None, :]
    mask = same_document & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    targets = torch.where(tensors["loss_mask"].bool(), tensors["targets"], -100)

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=CUDA):
            logits = model(
                input_ids=tensors["tokens"],
                position_ids=tensors["positions"],
                attention_mask=bias if DOCUMENTS > 1 else None,  # None: causal, by flash attention
                use_cache=False,
            ).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    forward = torch.compile(forward) if compiled else forward

    def step() -> float:
        loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(size: str, lora_rank: int, rounds: int, with_parts: bool) -> dict:
    name, _, own_batch = size.partition(":")
    shape, rows, length = SIZES[name]
    if own_batch:
        rows, length = map(int, own_batch.split("x"))
    config = architecture(*shape)
    batch = packed_rows(config.vocab_size, rows, length)
    with tempfile.TemporaryDirectory() as folder:

        def make(name: str) -> tuple[Callable[[], float], str]:
            return ours(config, lora_rank, batch, f"{folder}/{name}")

        # First: once torch has run, the profiler sees none of our operations.
        shares = parts(*make("parts")) if with_parts else {}
        steps = {"sa_jax": make("model")[0]}
        for label, compiled in (("torch eager", False), ("torch.compile", True)):
            steps[label] = theirs(f"{folder}/model", batch, compiled)
        losses, first_s = {}, {}
        for label, step in steps.items():
            started = time.perf_counter()
            losses[label] = [step()]
            first_s[label] = time.perf_counter() - started
            losses[label] += [step() for _ in range(CHECKED_STEPS - 1)]
        for label in steps:
            np.testing.assert_allclose(
                losses[label], losses["sa_jax"], rtol=TOLERANCE, err_msg=label
            )
        times: dict[str, list[float]] = {label: [] for label in steps}
        for _ in range(rounds):
            for label, step in steps.items():
                started = time.perf_counter()
                step()
                times[label].append(time.perf_counter() - started)
    median = {label: float(np.median(seconds)) for label, seconds in times.items()}
    return {
        "parts": shares,
        "size": name,
        "rows": rows,
        "tokens_a_row": length,
        "lora_rank": lora_rank,
        "losses": losses,
        "first_step_s": first_s,
        "ms": {label: 1e3 * seconds for label, seconds in median.items()},
        "over_compiled_torch": median["sa_jax"] / median["torch.compile"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--sizes", default=",".join(ON_CPU), help="NAME[:ROWSxTOKENS]: " + ", ".join(SIZES)
    )
    parser.add_argument("--lora_rank", type=int, default=0, help="0 (default): all weights train")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each that are timed")
    parser.add_argument("--parts", action="store_true", help="print where our step's time goes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", help="write the results to this JSON file too")
    args = parser.parse_args()
    if CUDA and not torch.cuda.is_available():
        parser.error(
            f"--device=cuda: torch sees no GPU. It is built for CUDA {torch.version.cuda}: update "
            "the driver, or install a torch for the driver's CUDA"
        )
    peers = "sa_jax", "torch eager", "torch.compile"
    print(table_head(["size", "rows x tokens", *peers, "sa_jax / compiled"]))
    results = []
    for size in args.sizes.split(","):
        row = measure(size, args.lora_rank, args.rounds, args.parts)
        ms = [f"{value:.0f} ms" for value in row["ms"].values()]
        shape = f"{row['rows']} x {row['tokens_a_row']}"
        print(table_row([row["size"], shape, *ms, f"{row['over_compiled_torch']:.2f}"]), flush=True)
        results.append(row)
    if args.parts:
        print(f"\n{table_head(['size', *PARTS])}")
        for row in results:
            shares = (f"{100 * row['parts'].get(part, 0):.0f} %" for part in PARTS)
            print(table_row([row["size"], *shares]))
    if args.out:
        used = versions("jax", "torch", "transformers", "peft")
        write_record(args.out, {"python": platform.python_version(), **used, "results": results})


if __name__ == "__main__":
    main()
