"""Predicts whether a run fits a machine, its time and its traffic, before the machine is rented.

It compiles the step that `training.loop` runs, for the machine's own topology.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sa_jax.errors import UsageError, UserError
from sa_jax.files import atomic_write
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.model import Llama
from sa_jax.optim.build import make_optimizer, optimizer_rows
from sa_jax.parallel.hardware import GIB, Chip, chip_of, has_cuda_plugin, memory_bytes
from sa_jax.parallel.mesh import make_mesh, mesh_sizes
from sa_jax.parallel.xla_flags import compiler_options, missing_kernel
from sa_jax.planning.clock import read_clock
from sa_jax.planning.collectives import read_collectives
from sa_jax.planning.memory import advice_to_fit, checkpoint_bytes, cudnn_workspace, step_memory
from sa_jax.planning.new_process import ProcessCrash, call_in_new_process
from sa_jax.planning.plan_text import format_plan
from sa_jax.planning.roofline import Workload, step_time
from sa_jax.planning.search import candidates
from sa_jax.planning.topology import Machine, Topology, open_topology, parse_topology
from sa_jax.registry import extension_digests, load_extensions
from sa_jax.training import start as start_lib
from sa_jax.training.config import changed, check_config
from sa_jax.training.program import Program, attention_of, check_remat, make_model, make_program
from sa_jax.training.step import init_state

TRIES = 4  # steps of one search that may not fit, and as many that may crash the compiler
RUN_TOKENS = 1e8  # token slots, where nothing says how long a run is


class CompilerCrash(UserError):
    """The compiler ended its process instead of compiling."""


def plan(
    config: ConfigDict, topology_name: str, *, search: bool = False, tokens: float = RUN_TOKENS
) -> dict[str, Any]:
    """The plan (see `make_plan`) of a config on a named machine, such as v5p:4x4x4 or h200:64.

    Args:
      config: of a training run; its model, or else `config.architecture`, gives the shapes.
      search: take the fastest mesh, accumulation and remat that fits, instead of the config's.
      tokens: token slots of the run, where the config does not say its steps.

    Raises:
      UsageError: an unknown topology; a mesh that does not divide the model or the batch.
      UserError: no compiler for that machine is installed.
      CompilerCrash: it crashes on this step, or on all that a search tries.
    """
    check_config(config)
    architecture = plan_architecture(config)
    topology = parse_topology(topology_name)
    reserve_fake_devices(topology)
    make = search_plan if search else plan_machine
    return make(config, architecture, topology, tokens)


def plan_machine(
    config: ConfigDict, architecture: LlamaConfig, topology: Topology, tokens: float
) -> dict[str, Any]:
    """`make_plan` for another machine, in a new process: CompilerCrash if its compiler crashes."""
    files = list(extension_digests())
    arguments = config.to_dict(), architecture.to_hf(), topology.name, tokens, files
    if not topology.chip.torus and not has_cuda_plugin():
        return plan_topology(*arguments)
    logging.info("compiling the step for %s; takes 1 to 4 minutes", topology.name)
    try:
        return call_in_new_process(plan_topology, *arguments)
    except ProcessCrash as crash:
        raise CompilerCrash(
            f"the compiler crashed ({crash}) on this step for {topology.name}; its message is "
            "above, or none where this machine's memory ran out. Try another config.mesh, or "
            "--search, which goes round it" + _bf16_advice(config, topology)
        ) from None


def plan_topology(
    config: dict[str, Any], hf: dict[str, Any], name: str, tokens: float, extensions: list[str]
) -> dict[str, Any]:
    """`make_plan` with a compiler's devices, or with fake CPU devices; JSON in and out."""
    load_extensions(extensions)
    reserve_fake_devices(parse_topology(name))
    topology = open_topology(name)
    if not topology.devices:
        topology = dataclasses.replace(topology, devices=fake_devices(topology.chips))
    return make_plan(ConfigDict(config), LlamaConfig.from_hf(hf), topology, tokens)


def _bf16_advice(config: ConfigDict, topology: Topology) -> str:
    """Advice that avoids a known crash of libtpu 0.0.42; '' if the config already follows it."""
    option = "xla_jf_bf16_propagation"
    options = compiler_options(topology.platform, topology.chip, config.xla_options)
    advice = f", or --config.xla_options={option}=true, which takes more memory"
    return advice if options.get(option) is False else ""


def plan_attached(config: ConfigDict, architecture: LlamaConfig) -> dict[str, Any]:
    """The plan of a run on this machine's devices."""
    devices = tuple(jax.devices())
    name, chip = f"{len(devices)} x {devices[0].device_kind}", chip_of(devices[0])
    if chip is None:
        return make_plan(config, architecture, Machine(name, None, (len(devices),), devices))
    shape, slices = (len(devices) // chip.devices,), 1
    if chip.torus:
        slices = len({device.slice_index for device in devices})
        shape = tuple(1 + max(column) for column in zip(*(d.coords for d in devices), strict=True))
    return make_plan(config, architecture, Topology(name, chip, shape, devices, slices))


def plan_architecture(config: ConfigDict) -> LlamaConfig:
    """The architecture of the config's model if it names one, else `config.architecture`."""
    if config.model:
        return start_lib.open_start(config.model).config
    if config.architecture:
        return start_lib.fresh_architecture(config)
    raise UsageError(
        "nothing to plan: set config.model to a Hugging Face or run folder, or config.architecture "
        "to the fields of its config.json"
    )


def search_plan(
    config: ConfigDict, architecture: LlamaConfig, topology: Topology, tokens: float
) -> dict[str, Any]:
    """The plan of the fastest mesh, accumulation and remat that fits, by trying in that order.

    The estimates that give the order are rough, so each candidate is compiled; if none of the first
    `TRIES` that compile fits, the plan of the one that comes nearest is returned. CompilerCrash if
    all that are tried, at most `TRIES`, crash the compiler.
    """
    everything = mesh_sizes(topology.chips * topology.chip.devices, slices=config.mesh.slices)
    work = workload(config, architecture, everything, topology.platform)
    tried: list[str] = []
    plans: list[dict[str, Any]] = []
    crashes = 0
    for candidate in candidates(work, topology):
        if max(len(plans), crashes) == TRIES:
            break
        work = candidate.work
        mesh = {**work.of_one_slice().mesh, "slices": work.slices}
        values = {"mesh": mesh, "accumulation": work.accumulation, "remat": work.remat}
        outcome = f"{candidate.describe()}: at least {candidate.time.step:.3f} s a step"
        try:
            plans.append(plan_machine(changed(config, values), architecture, topology, tokens))
        except CompilerCrash:
            crashes += 1
            outcome += ", crashes the compiler"
        else:
            if clock := plans[-1]["clock"]:
                outcome += f", {clock['step_s']:.3f} s by the compiler's clock"
            outcome += f", {plans[-1]['memory_gib_per_chip']['needed']:.1f} GiB"
            outcome += "" if plans[-1]["fits"] else ", does not fit"
        tried.append(outcome)
        logging.info("%s", outcome)
        if plans and plans[-1]["fits"]:
            break
    if not plans:
        raise CompilerCrash(
            f"the compiler crashed on all {crashes} steps that were tried for {topology.name}: "
            f"{'; '.join(tried)}. Try another topology or batch" + _bf16_advice(config, topology)
        )
    best = plans[-1] if plans[-1]["fits"] else max(plans, key=lambda p: p["free_gib"])
    return best | {"tried": tried}


def make_plan(
    config: ConfigDict, architecture: LlamaConfig, machine: Machine, tokens: float = RUN_TOKENS
) -> dict[str, Any]:
    """Compiles the step of a config for a machine, and adds the results of arithmetic.

    Args:
      config: with the mesh, accumulation and remat to plan.
      machine: its devices, or fake CPU devices if there is no compiler for it.
      tokens: token slots of the run, where the config does not say its steps.

    Returns:
      JSON-able: machine, model, settings, memory_gib_per_chip, capacity_gib, free_gib, fits,
      advice, flops_per_token, time (empty for an unknown chip), run, clock (see `planning.clock`;
      empty where no TPU executable was read), soap (a row a parameter, where that is the
      optimizer), disk (see `checkpoint_bytes`), collectives, tried (by a search), xla_flags,
      compile_s.
    """
    check_remat(config.remat, machine.platform)
    mesh = make_mesh(**config.mesh, devices=machine.devices)
    model = make_model(config, architecture, mesh)
    work = workload(config, architecture, mesh.shape, machine.platform)
    steps = config.steps or math.ceil(tokens / work.tokens)
    program = make_program(config, model, steps)
    options = compiler_options(machine.platform, machine.chip, config.xla_options)
    per_chip = 1 if machine.chip is None else machine.chip.devices
    # The chip that fake CPU devices stand for, as there is no compiler for it: they only partition
    # the step.
    faked = machine.chip if mesh.devices.flat[0].platform == "cpu" else None
    capacity = faked.hbm_bytes if faked else per_chip * memory_bytes(mesh.devices.flat)
    begin = time.monotonic()
    compiled, needed = (None, 0.0) if faked else _compile(program)
    compile_s = 0.0 if faked else time.monotonic() - begin
    text = _text(compiled)
    memory = step_memory(work.of_one_slice(), *program.arguments, per_chip, compiled)
    if needed:  # what the compiler said when it gave up
        memory = dataclasses.replace(memory, peak=per_chip * needed, source="compiled")
    # On a machine with a GPU, XLA asks cuDNN itself.
    if not faked and jax.default_backend() != "gpu" and work.attention.startswith("cudnn"):
        memory = dataclasses.replace(memory, workspace=per_chip * cudnn_workspace(work))
    fits = not needed and memory.needed <= capacity
    remedies = advice_to_fit(memory, capacity, work, config.optimizer, machine.platform)
    rows = optimizer_rows(config.optimizer, program.arguments[0].params)
    return {
        "machine": {
            "name": machine.name,
            "described": machine.describe(),
            "chips": machine.chips,
            "devices": len(machine.devices),
        },
        "model": {"parameters": architecture.num_parameters, "trainable": work.trainable},
        "settings": {
            "mesh": " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
            + (f" over {config.mesh.slices} slices" if config.mesh.slices > 1 else ""),
            "batch": f"{config.batch_size} x {config.sequence_length}",
            "accumulation": config.accumulation,
            "remat": config.remat,
            "attention": work.attention,
            "dtype": config.dtype,
            "optimizer": config.optimizer.name,
            "lora_rank": config.lora.rank or None,
        },
        "memory_gib_per_chip": memory.gib(),
        "capacity_gib": round(capacity / GIB, 2) if capacity < math.inf else 0.0,
        "free_gib": round((capacity - memory.needed) / GIB, 3) if capacity < math.inf else None,
        "fits": fits,
        "advice": "" if fits else remedies,
        "flops_per_token": work.flops_per_token(),
        **_times(work, machine, steps),
        "clock": _clock(work, machine, text),
        "soap": [dataclasses.asdict(row) | {"shape": list(row.shape)} for row in rows],
        "disk": checkpoint_bytes(config, steps, work),
        "collectives": _collectives(config, architecture, mesh, text),
        "tried": [],
        "xla_flags": [f"{option}={value}" for option, value in options.items()],
        "compile_s": compile_s,
    }


def workload(
    config: ConfigDict, architecture: LlamaConfig, mesh: Mapping[str, int], platform: str
) -> Workload:
    """The input of arithmetic: a config's step on a mesh of a platform."""
    lora, tx = start_lib.lora_config(config.lora), make_optimizer(config.optimizer, 1)
    model = Llama(architecture, param_dtype=jnp.dtype(config.param_dtype), lora=lora)
    trainable, _ = start_lib.split_trainable(start_lib.abstract_params(model), lora)
    state = jax.eval_shape(lambda params: init_state(params, tx), trainable)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return Workload(
        architecture=architecture,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        accumulation=config.accumulation,
        remat=config.remat,
        mesh=mesh,
        trainable=count,
        attention=attention_of(config, platform).implementation,
        item_bytes=jnp.dtype(config.dtype).itemsize,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / count,
        slices=config.mesh.slices,
        optimizer=config.optimizer.name,
    )


def reserve_fake_devices(topology: Topology) -> None:
    """Makes jax start with enough fake CPU devices and no accelerator, if it has not started."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # it has started
            jax.config.update("jax_num_cpu_devices", topology.chips * topology.chip.devices)


def fake_devices(count: int) -> tuple[jax.Device, ...]:
    """This many fake CPU devices; UserError if this process has fewer."""
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"{count} fake CPU devices are needed, and this process has {len(devices)}: start "
            f"it with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])


def write_plan(described: dict[str, Any], path: str | Path | None = None) -> None:
    """Prints a plan, and writes it as JSON where a path is given."""
    print(format_plan(described), flush=True)
    if path:
        atomic_write(path, json.dumps(described, indent=1) + "\n")


def _compile(program: Program) -> tuple[Any, float]:
    """(executable, 0), or (None, bytes that it would need per device) if it does not fit."""
    lowered = program.step.lower(*program.arguments)
    try:
        return lowered.compile(), 0.0
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if known := missing_kernel(error):
            raise known from error
        if needed is None:
            raise
        return None, needed


def needed_bytes(message: str) -> float | None:
    """The bytes per device in libtpu's refusal to compile a step; None for other errors.

    libtpu names all memory, or only the temporaries, which is a lower bound.
    """
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([MGT])\b", message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    return float(match[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[match[2]]


def _times(work: Workload, machine: Machine, steps: int) -> dict[str, Any]:
    run: dict[str, Any] = {"tokens": steps * work.tokens, "steps": steps}
    if machine.chip is None:
        return {"time": {}, "run": run}
    bound = step_time(work, machine.chip, machine.shape)
    hours = steps * bound.step / 3600
    return {
        "time": {
            "compute_s": bound.compute,
            "hbm_s": bound.hbm,
            "interconnect_s": bound.interconnect,
            "between_slices_s": bound.network,
            "step_s": bound.step,
            "bound": bound.bound,
            **_rates(work, machine.chip, machine.chips, bound.step),
        },
        "run": {**run, "hours": hours, "chip_hours": hours * machine.chips},
    }


def _rates(work: Workload, chip: Chip, chips: int, step_s: float) -> dict[str, float]:
    rate = work.tokens / step_s / chips
    return {"tokens_per_s_per_chip": rate, "mfu": rate * work.flops_per_token() / chip.flops}


def _text(compiled: Any) -> str:
    """The text of an executable; '' if there is none, or if libtpu cannot write it."""
    if compiled is not None:
        # libtpu's text of a 70B executable fails a RET_CHECK on async-update.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return compiled.as_text()
    return ""


def _clock(work: Workload, machine: Machine, text: str) -> dict[str, Any]:
    """The step by the compiler's clock, the cheap branch of each conditional taken."""
    if not text or machine.chip is None or not machine.chip.torus:
        return {}
    clock = read_clock(text, machine.chip)
    return {
        "step_s": clock.step,
        "dearest_step_s": read_clock(text, machine.chip, branch=max).step,
        **dataclasses.asdict(clock),
        **_rates(work, machine.chip, machine.chips, clock.step),
    }


def _collectives(
    config: ConfigDict, architecture: LlamaConfig, mesh: Mesh, text: str
) -> dict[str, Any]:
    """Collectives by kind, and where they were read."""
    source = "read from the executable"
    if not text:
        source = f"the same step, partitioned for a CPU mesh of {mesh.size}, attention=reference"
        twin = make_mesh(**mesh.shape, devices=fake_devices(mesh.size))
        # Both hold for TPUs only.
        option = changed(config, {"attention": "reference", "xla_options": ""})
        program = make_program(option, make_model(option, architecture, twin), 1)
        text = _text(_compile(program)[0])
    a_slice = mesh.size // config.mesh.slices if config.mesh.slices > 1 else 0
    kinds = read_collectives(text, a_slice).items()
    return {"source": source, "kinds": {kind: dataclasses.asdict(each) for kind, each in kinds}}
