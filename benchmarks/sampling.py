r"""Greedy generation, ours and transformers' `generate`: tokens a second and time a step by batch.

One run, one process, in turns: the same checkpoint, dtype (float32), prompts of mixed lengths, and
cores. Both generate `--new_tokens` for every prompt of a batch; the best of `--rounds` counts,
after one round that compiles. Our step is a decode step of the whole batch, prefill left out.

    python benchmarks/sampling.py --model=stories260k/hf [--batches=1,16,64,256] [--out=FILE.json]

On CPU we run a device a core with the batch cut over them (XLA gives one device's small products
to one core), and torch a thread a core.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import versions, write_record

from sa_jax.text import table_row


def main() -> None:
    arguments = parse()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={cores}")

    import jax
    import torch
    import transformers

    from sa_jax.llama import load_hf
    from sa_jax.llama.model import Llama
    from sa_jax.llama.sampler import Sampler, SamplingSettings
    from sa_jax.parallel.mesh import make_mesh

    torch.set_num_threads(cores)
    mesh = make_mesh(data=jax.device_count(), fsdp=1)
    config, params = load_hf(arguments.model, mesh)
    theirs = transformers.LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    theirs.eval()
    new = arguments.new_tokens
    settings = SamplingSettings(new, temperature=0.0)

    def run_ours(sampler: Sampler, prompts: list[list[int]]) -> list[list[int]]:
        completions = sampler.generate(params, prompts, range(len(prompts)), settings)
        return [completion.tokens for completion in completions]

    def run_theirs(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        tokens_bs = np.zeros((len(prompts), longest), np.int64)
        mask_bs = np.zeros_like(tokens_bs)
        for row, prompt in enumerate(prompts):  # padded on the left, as generate wants it
            tokens_bs[row, longest - len(prompt) :] = prompt
            mask_bs[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            found = theirs.generate(
                torch.from_numpy(tokens_bs),
                attention_mask=torch.from_numpy(mask_bs),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return found[:, longest:].tolist()

    rows = []
    for batch in arguments.batches:
        rng = np.random.default_rng(0)
        lengths = rng.integers(8, 65, batch)
        prompts = [
            [config.bos_token_id, *rng.integers(3, config.vocab_size, n - 1).tolist()]
            for n in lengths
        ]
        sampler = Sampler(
            Llama(config), mesh, batch_size=batch, context_length=64 + new, steps_per_call=32
        )
        runs: dict[str, Callable] = {
            "ours": lambda sampler=sampler, prompts=prompts: run_ours(sampler, prompts),
            "transformers": lambda prompts=prompts: run_theirs(prompts),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        tokens = {name: run() for name, run in runs.items()}
        steps = []
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
            steps.append(sampler.stats.seconds_per_step)
        same = np.mean([a == b for a, b in zip(*tokens.values(), strict=True)])
        best = {name: min(its) for name, its in seconds.items()}
        rows.append(
            {
                "batch": batch,
                "same_tokens": float(same),
                "ours_tokens_per_s": batch * new / best["ours"],
                "transformers_tokens_per_s": batch * new / best["transformers"],
                "ours_ms_a_step": 1e3 * min(steps),
                "times_faster": best["transformers"] / best["ours"],
            }
        )
        show(rows[-1], header=len(rows) == 1)
    step = {row["batch"]: row["ours_ms_a_step"] for row in rows}
    ratio = step[64] / step[1] if {1, 64} <= set(step) else None
    if ratio:
        print(f"step at batch 64: {ratio:.1f} times that at batch 1")
    result = {
        "model": Path(arguments.model).parent.name or arguments.model,
        "parameters": config.num_parameters,
        "new_tokens": new,
        "dtype": "float32",
        "rows": rows,
        "step_64_over_1": ratio,
        "cores": cores,
        "machine": platform.processor() or platform.machine(),
        "versions": versions("jax", "torch", "transformers"),
    }
    print(f"{cores} cores, {result['versions']}")
    if arguments.out:
        write_record(arguments.out, result)


def show(row: dict, header: bool) -> None:
    if header:
        peers = "ours, tokens/s", "transformers, tokens/s"
        print(table_row(["batch", *peers, "times faster", "our ms a step"]))
        print(table_row(["---"] * 5))
    cells = (
        f"{row['batch']}",
        f"{row['ours_tokens_per_s']:,.0f}",
        f"{row['transformers_tokens_per_s']:,.0f}",
        f"{row['times_faster']:.1f}",
        f"{row['ours_ms_a_step']:.2f}",
    )
    print(table_row(cells), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument(
        "--batches",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 16, 64, 256],
        help="prompts sampled together, as 1,16,64",
    )
    parser.add_argument("--new_tokens", type=int, default=128, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="of each batch; the fastest counts")
    parser.add_argument("--out", default="", help="JSON file of results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
