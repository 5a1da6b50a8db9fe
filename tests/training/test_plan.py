"""Plans that need no libtpu: a toy on the devices here, GPUs by arithmetic, and the search."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sa_jax.config_files import load_config
from sa_jax.errors import UsageError
from sa_jax.llama.model import remat_policies
from sa_jax.parallel.hardware import CHIPS, GIB
from sa_jax.parallel.mesh import make_mesh
from sa_jax.planning import topology
from sa_jax.planning.memory import Memory, advice_to_fit
from sa_jax.planning.roofline import step_time
from sa_jax.planning.search import candidates
from sa_jax.planning.topology import Machine, parse_topology
from sa_jax.training import plan as training_plan
from sa_jax.training.config import check_config, default_config
from sa_jax.training.plan import (
    CompilerCrash,
    _collectives,
    needed_bytes,
    plan,
    plan_architecture,
    plan_attached,
    workload,
    write_plan,
)
from tests.toys import CONFIG


@pytest.fixture(scope="module")
def toy():
    config = default_config()
    config.architecture.update({k: v for k, v in CONFIG.to_hf().items() if k != "architectures"})
    config.mesh.update(data=1, fsdp=4, tensor=2)
    config.batch_size, config.sequence_length, config.steps = 8, 64, 10
    return config


@pytest.fixture(scope="module")
def attached(toy):
    return plan_attached(toy, plan_architecture(toy))


def work(name, topology, **changes):
    config = load_config(f"configs/llama.py:{name}")
    config.update(changes)
    machine = parse_topology(topology)
    devices = machine.chips * machine.chip.devices
    mesh = {"data": 1, "fsdp": devices, "tensor": 1}
    return workload(config, plan_architecture(config), mesh, machine.platform), machine


def test_predicted_arguments_are_those_that_are_compiled(attached):
    memory = attached["memory_gib_per_chip"]
    # 4 bytes a parameter, matrices in 8 parts and the norms' 7 x 32 scales whole; moments twice
    # that, two counters; five arrays of the batch, a fourth of its rows each.
    matrices, scales = CONFIG.num_parameters - 7 * 32, 7 * 32
    parameters = 4 * (matrices / 8 + scales)
    batch = 8 * 64 / 4 * (4 * 4 + 1)
    assert memory["parameters"] * GIB == pytest.approx(parameters, rel=0.005)
    assert memory["arguments"] * GIB == pytest.approx(3 * parameters + batch + 12, rel=0.005)
    assert memory["compiled_arguments"] == pytest.approx(memory["arguments"], rel=0.01)
    assert memory["source"] == "compiled"
    # XLA's own peak on a CPU is the arguments alone.
    assert memory["needed"] == pytest.approx(memory["arguments"] + memory["temporaries"], rel=0.01)
    assert attached["collectives"]["kinds"] and attached["time"] == attached["clock"] == {}


def test_memory_is_known_also_of_a_device_that_is_not(toy, monkeypatch):
    """Such as a GPU that is no topology: JAX says what it may use."""
    described = plan_attached(toy, plan_architecture(toy))
    needed = described["memory_gib_per_chip"]["needed"]
    for capacity, fits in ((2 * needed, True), (needed / 2, False)):
        monkeypatch.setattr(training_plan, "memory_bytes", lambda _, c=capacity: c * GIB)
        found = plan_attached(toy, plan_architecture(toy))
        assert found["capacity_gib"] == round(capacity, 2) and found["time"] == {}
        assert found["fits"] == fits and bool(found["advice"]) != fits
    assert Machine("8 x GPU", None, (8,), [SimpleNamespace(platform="gpu")]).platform == "gpu"


def test_without_jaxs_cuda_plugin_gpus_are_planned_by_arithmetic_and_the_extra_is_named(
    toy, tmp_path, capsys, monkeypatch
):
    for module in (training_plan, topology):
        monkeypatch.setattr(module, "has_cuda_plugin", lambda: False)
    found = plan(toy, "h200:8")
    offload = toy.copy_and_resolve_references()
    offload.remat = "offload"
    if "offload" not in remat_policies("gpu"):
        with pytest.raises(UsageError, match="offload' gives wrong gradients on GPUs"):
            plan(offload, "h200:8")
    assert found["memory_gib_per_chip"]["source"] == "estimated"
    assert "partitioned for a CPU mesh of 8" in found["collectives"]["source"]
    assert found["collectives"]["kinds"]["all-gather"]["count"] >= 3 * 2 * CONFIG.num_layers
    assert found["run"]["steps"] == 10 and found["run"]["tokens"] == 10 * 8 * 64
    # The last step's state alone (no listed step is reached), with three counters.
    assert found["disk"]["total"] == 12 * CONFIG.num_parameters + 12
    write_plan(found, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == found
    text = capsys.readouterr().out
    for words in (
        "h200:8, 8 GPUs on 1 node",
        "= arguments",
        "'.[plan-gpu]'",
        "fits",
        "MFU",
        "chip-hours",
        "disk: 439kB of",
    ):
        assert words in text


def test_soaps_state_is_printed_by_parameter(toy, tmp_path, capsys):
    """MLP's sides of 32 and 48 in equal blocks of up to 32: factors and bases in float32."""
    config = toy.copy_and_resolve_references()
    config.optimizer.name, config.optimizer.soap.block_size = "soap", 32
    found = plan(config, "h200:8")
    write_plan(found, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == found
    assert len(found["soap"]) == 12
    gate = next(row for row in found["soap"] if row["path"] == "layers/mlp/gate/kernel")
    assert gate["basis_bytes"] == 2 * 4 * CONFIG.num_layers * (32**2 + 2 * 24**2)
    assert re.search(r"layers/mlp/gate/kernel +3 +1 x 32 +2 x 24 ", capsys.readouterr().out)


def test_flops_and_times_of_8b_are_those_by_hand():
    """8B on 8 v5p chips, full remat: 8 FLOPs a matrix parameter and token, and 8/6 of attention."""
    described, machine = work("8b_insertion", "v5p:2x2x2")
    matrices = 8_030_261_248 - 65 * 4096 - 128_256 * 4096
    attention = 6 * 32 * 4096 * 4096
    assert described.flops_per_token() == 6 * matrices + attention
    tokens = 16 * 4096
    time = step_time(described, machine.chip, machine.shape)
    assert time.compute == pytest.approx(
        tokens * 8 / 6 * (6 * matrices + attention) / (8 * 459e12), rel=1e-6
    )
    # Three passes over bfloat16 weights at most 7/8 of which come from others.
    assert time.interconnect > 3 * 2 * 8.03e9 * 7 / 8 / (6 * 100e9)
    assert time.bound == "compute" and time.step == time.compute


def test_the_search_cuts_heads_where_there_are_fewer_rows_than_chips():
    described, machine = work("70b_insertion", "v5p:4x4x4")
    found = candidates(described, machine)
    assert found and all(c.work.mesh["tensor"] >= 4 for c in found)
    assert found[0].bytes < 95 * GIB
    times = [c.time.step for c in found]
    assert all(a <= b + 1e-3 for a, b in zip(times, times[1:], strict=False))


def test_the_search_copies_frozen_weights_where_they_fit_and_none_that_train():
    """LoRA of 8B on 8 H200: no weights are sent, only gradients of the adapters, in bfloat16."""
    described, machine = work("8b_removal", "h200:8")
    best = candidates(described, machine)[0]
    assert best.work.mesh == {"data": 8, "fsdp": 1, "tensor": 1}
    assert best.time.interconnect == pytest.approx(2 * 2 * described.trainable * 7 / 8 / 450e9)
    kept = 2 * 8_030_261_248 + described.trainable * (described.state_bytes + 2)
    assert kept < best.bytes < kept + 50 * GIB  # and activations
    for name, frozen in (("8b_removal", True), ("8b_insertion", False)):
        described, machine = work(name, "v5e:4x4")  # 16 GB a chip: no whole copy of 8B
        shards = {c.work.shards for c in candidates(described, machine)}
        assert max(shards) == 16 and 1 not in shards
        assert (min(shards) < 16) == frozen
    # Gathers of 70B stay inside a node, and copies are on several nodes.
    described, machine = work("70b_removal", "h200:16")
    assert candidates(described, machine)[0].work.shards <= 8


def test_more_chips_than_rows_times_heads_says_what_would_work():
    described, machine = work("70b_insertion", "v5p:8x8x8")
    with pytest.raises(UsageError, match="at most 128 devices.*batch_size to 64"):
        candidates(described, machine)


def test_what_does_not_fit_names_what_to_change():
    described, machine = work("70b_insertion", "v5e:4x4", batch_size=16)
    (nearest,) = candidates(described, machine)
    assert nearest.bytes > machine.chip.hbm_bytes
    memory = Memory(0, nearest.bytes, 0, 0, 0, 0, 0, 0, 0, 0, "estimated")
    optimizer = default_config().optimizer
    advice = advice_to_fit(memory, machine.chip.hbm_bytes, described, optimizer, "tpu")
    assert "more chips; config.optimizer.mu_dtype=bfloat16" in advice
    optimizer.mu_dtype = "bfloat16"  # it is so already
    advice = advice_to_fit(memory, machine.chip.hbm_bytes, described, optimizer, "tpu")
    assert "mu_dtype" not in advice


@pytest.mark.parametrize(
    "message, gib",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 96.35G of 95.74G", 96.35),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (47.58G) exceeds available HBM (31.25G).",
            47.58,
        ),
    ],
)
def test_what_libtpu_says_when_a_step_does_not_fit(message, gib):
    assert needed_bytes(message) == gib * GIB
    assert needed_bytes("INTERNAL: " + message.partition(": ")[2]) is None


def test_bfloat16_moments_and_adapters_take_what_they_should(toy):
    config = load_config("configs/llama.py:8b_insertion")
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    config.optimizer.mu_dtype = "bfloat16"
    half = workload(config, plan_architecture(config), mesh, "tpu")
    assert half.state_bytes == pytest.approx(10, abs=1e-6)
    adapters, _ = work("8b_removal", "v5p:2x2x2")
    pairs = 32 * 64 * sum((4096 + out) * times for out, times in ((4096, 2), (1024, 2), (14336, 3)))
    assert adapters.trainable == pairs and not adapters.full_weights


def test_every_chip_has_a_time():
    for chip in CHIPS:
        name = f"{chip.name}:" + {0: "8", 2: "2x4", 3: "2x2x2"}[chip.torus]
        described, machine = work("8b_insertion", name)
        time = step_time(described, chip, machine.shape)
        assert 0 < time.compute < 100 and math.isfinite(time.interconnect)


def test_nothing_to_plan_is_said():
    with pytest.raises(UsageError, match=r"config\.model.*config\.architecture"):
        plan(default_config(), "h200:8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mesh": {"fsdp": 1, "tensor": 8}},
            "4 key/value heads do not divide by tensor = 8; tensor may be 1, 2, 4 on these 8 dev",
        ),
        (
            {"batch_size": 6},
            "6 rows .* do not divide by data x fsdp = 4; .*may be 1, 2 on.* 4 or 8 rows",
        ),
        ({"mesh": {"fsdp": 3, "tensor": 1}}, "the product must be 8"),
        ({"sequence_length": 128}, "sequence_length=128 is more than the model's context of 64"),
    ],
)
def test_what_does_not_divide_says_what_would(toy, changes, words):
    config = toy.copy_and_resolve_references()
    config.update(changes)
    with pytest.raises(UsageError, match=words):
        plan(config, "h200:8")


@pytest.fixture
def no_compilation_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def test_ones_own_options_reach_the_step_and_the_plan(toy, tmp_path, no_compilation_cache):
    # A step from the cache would write no dump, which is how the test sees that the option arrived.
    config = toy.copy_and_resolve_references()
    config.xla_options = f"xla_dump_to={tmp_path}"
    found = plan_attached(config, plan_architecture(config))
    assert found["xla_flags"] == [config.xla_options]
    assert list(tmp_path.glob("*.jit_step.before_optimizations.txt"))  # by the compiler
    config.xla_options = "xla_nope=1"
    with pytest.raises(UsageError, match="No such compile option"):
        plan_attached(config, plan_architecture(config))
    config.xla_options = "enable=1"
    with pytest.raises(UsageError, match="start with xla_"):
        check_config(config)


def test_collectives_of_fake_devices_are_read_without_options_of_a_tpu(toy):
    config = toy.copy_and_resolve_references()
    config.xla_options = "xla_jf_bf16_propagation=true"
    mesh = make_mesh(**config.mesh)
    assert _collectives(config, plan_architecture(config), mesh, "")["kinds"]


@pytest.mark.long
def test_a_crash_of_the_compiler_is_one_line(toy, monkeypatch, caplog):
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    config = toy.copy_and_resolve_references()
    config.mesh.update(fsdp=4, tensor=1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_nope=1")  # XLA aborts a process that starts with it
    words = r"crashed \(exit status 1\).*v5p:2x2x1.*--search.*xla_jf_bf16_propagation=true"
    caplog.set_level("INFO", logger="absl")
    with pytest.raises(CompilerCrash, match=words):
        plan(config, "v5p:2x2x1")
    # Nobody waits for minutes without a word.
    assert "compiling the step for v5p:2x2x1; takes 1 to 4 minutes" in caplog.messages
    config.xla_options = "xla_jf_bf16_propagation=true"
    with pytest.raises(CompilerCrash, match="goes round it$"):
        plan(config, "v5p:2x2x1")


def test_a_search_goes_round_crashes(toy, monkeypatch):
    ran = []

    def crash(*arguments):
        ran.append(arguments)
        if len(ran) < first:
            raise CompilerCrash
        return real(*arguments)

    real = training_plan.plan_machine
    monkeypatch.setattr(training_plan, "plan_machine", crash)
    first = 3
    found = plan(toy, "h200:8", search=True)
    assert found["fits"] and len(ran) == 3
    assert ["crashes the compiler" in line for line in found["tried"]] == [True, True, False]
    first = 99
    with pytest.raises(CompilerCrash, match=f"all {training_plan.TRIES} steps that were tried"):
        plan(toy, "h200:8", search=True)


@pytest.mark.long
def test_planning_leaves_accelerators_alone(tmp_path):
    """In a fresh process that has not been told to use the CPU, nor how many of them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    changes = ["hidden_size=64", "num_hidden_layers=2", "vocab_size=256", "intermediate_size=128"]
    done = subprocess.run(
        [
            *(sys.executable, "scripts/plan.py", "--config=configs/llama.py:8b_insertion"),
            *("--topology=h200:16", "--search", f"--out={tmp_path / 'plan.json'}"),
            *(f"--config.architecture.{change}" for change in changes),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "plan.json").read_text())["machine"]["devices"] == 16
    assert "backend" not in done.stderr
