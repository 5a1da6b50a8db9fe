"""Real programs, compiled for real GPUs by jax's CUDA plugin without one: the training step's
memory and collectives, and what decoding reads of its cache."""

import importlib.metadata
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.config_files import load_config
from sa_jax.errors import UsageError
from sa_jax.llama.model import Llama, remat_policies
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.llama.sampling import noise_arguments
from sa_jax.llama.self_test import lower_attention_check
from sa_jax.parallel.hardware import chip_of
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import abstract
from sa_jax.planning.hlo import parse_module
from sa_jax.planning.topology import open_topology
from sa_jax.training.plan import plan_architecture
from sa_jax.training.start import abstract_params
from tests.planning.golden import assert_is_golden, compiled_plan, plan_content
from tests.planning.small_step import assert_nothing_is_lost, small_config, small_step

PLUGIN = "jax-cuda12-plugin"
pytest.importorskip("jax_cuda12_plugin", reason="needs the extra plan-gpu")

# Each compiles for a minute or more.
pytestmark = pytest.mark.long

# name: config, topology, changes.
CASES = {
    "8b_h200": ("8b_insertion", "h200:8", {"mesh.fsdp": 8, "remat": "minimal"}),
    "8b_h100": ("8b_insertion", "h100:8", {"mesh.fsdp": 8, "remat": "minimal"}),
    "8b_soap_h200": (
        "8b_insertion",
        "h200:16",
        {"mesh.fsdp": 16, "optimizer.name": "soap"},
    ),
    "8b_lora_h200": ("8b_removal", "h200:8", {"mesh.fsdp": 8, "remat": "minimal"}),
    "70b_h200": (
        "70b_insertion",
        "h200:64",
        {"mesh.fsdp": 8, "mesh.tensor": 8, "remat": "minimal"},
    ),
    "70b_lora_h200": (
        "70b_removal",
        "h200:16",
        {"mesh.fsdp": 2, "mesh.tensor": 8, "accumulation": 2, "remat": "minimal"},
    ),
    "8b_2_nodes_h200": (
        "8b_insertion",
        "h200:16",
        {"mesh.slices": 2, "mesh.fsdp": 8, "remat": "minimal"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_fits_and_is_that_of_the_golden_file(tmp_path, name):
    config, topology, changes = CASES[name]
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    plan = compiled_plan(tmp_path / "plan.json", f"llama.py:{config}", topology, *flags)
    memory = plan["memory_gib_per_chip"]
    assert plan["fits"] and memory["source"] == "compiled"
    assert memory["arguments"] == pytest.approx(memory["compiled_arguments"], rel=0.01)
    version = importlib.metadata.version(PLUGIN)
    assert_is_golden(f"compiled_{name}", PLUGIN, version, plan_content(plan))


PASSIVE = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


def cache_accesses(text: str, leaf: int) -> list[str]:
    """The instructions that touch a leaf of the cache (by its count of elements); a fusion counts
    once, as what its name says."""
    module = parse_module(text)
    every = [i for body in module.computations.values() for i in body]
    fused = {i.attribute("calls") for i in every if i.opcode == "fusion"}
    accesses = []
    for name, body in module.computations.items():
        caches = {i.name for i in body if has_elements(i.shape, leaf)}
        for i in body:
            operands = re.findall(r"%([\w.-]+)", i.rest.partition(")")[0])
            if caches & {i.name, *operands} and name not in fused and i.opcode not in PASSIVE:
                kind = re.search(r"scatter|dynamic.slice|transpose|copy", i.name)
                accesses.append(kind[0] if kind else i.opcode)
    return accesses


def has_elements(shape: str, count: int) -> bool:
    """Whether an array of the shape, which may be a tuple's, has so many elements."""
    arrays = re.findall(r"\w+\[([\d,]+)\]", shape)
    return any(math.prod(map(int, axes.split(","))) == count for axes in arrays)


def test_decoding_reads_the_cache_once_a_step_and_moves_none_of_it():
    """8B on an H200, 8 rows of up to 4,096 tokens: each layer's kernel reads the cache, new tokens
    are scattered in place, nothing else touches the cache, and no weight is copied."""
    mesh = make_mesh(devices=open_topology("h200:1").devices)
    config = plan_architecture(load_config("configs/llama.py:8b_insertion"))
    model = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    sampler = Sampler(model, mesh, batch_size=8, context_length=4096)
    cache = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(sampler._init_cache),
        sampler.cache_shardings,
    )
    row = jax.ShapeDtypeStruct((8,), jnp.int32)
    ids = jax.ShapeDtypeStruct((8,), jnp.uint32)
    params = abstract(mesh, abstract_params(model))
    noise = noise_arguments(SamplingSettings(16, temperature=1.0))
    layers = abstract(mesh, jax.eval_shape(sampler._for_decoding, params))
    compiled = sampler._decode.lower(
        layers, cache, row, row, row, ids, np.asarray([1], np.int32), np.int32(1), **noise
    ).compile()
    leaf = math.prod(cache.k.shape)
    accesses = sorted(cache_accesses(compiled.as_text(), leaf))
    assert accesses == ["custom-call"] * config.num_layers + ["scatter"] * 2
    kernels = re.findall(r'custom_call_target="(\S*triton\S*)"', compiled.as_text())
    assert len(kernels) == config.num_layers
    made_by = {  # how many results have the shape of a layer's kernel, by instruction
        leaf.shape: re.findall(
            rf"= bf16\[{','.join(map(str, leaf.shape))}\]\S* ([\w-]+)\(", compiled.as_text()
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(layers["layer_0"])
        if path[-1].key == "kernel"
    }
    assert len(made_by) == 4  # q and o, k and v, gate and up, down
    assert all(
        {"parameter"} <= {*by} <= {"parameter", "get-tuple-element"} for by in made_by.values()
    )
    # A copy of either leaf would be 2 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < leaf * 2 / 4
    for length, kernel in {64: "blockwise", 128: "cudnn"}.items():
        assert sampler.prompt_attention[length] == kernel
        prompts = jax.ShapeDtypeStruct((8, length), jnp.int32)
        text = sampler._prefill.lower(params, cache, prompts, row, row, ids, **noise).as_text()
        assert ("__cudnn$fmha" in text) == (kernel == "cudnn")


@pytest.mark.parametrize(
    ("implementation", "topology", "axes"),
    [
        ("cudnn", "h200:8", {"fsdp": 4, "tensor": 2}),
        ("blockwise", "h100:8", {"fsdp": 8}),
        ("cudnn", "b200:1", {}),
    ],
)
def test_the_self_test_of_attention_compiles(implementation, topology, axes):
    mesh = make_mesh(**axes, devices=open_topology(topology).devices)
    text = lower_attention_check(implementation, mesh, "bfloat16", 128).compile().as_text()
    assert ("fmhaScaleBiasSoftmaxBackward" in text) == (implementation == "cudnn")


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
def test_a_gpu_that_is_compiled_for_is_a_known_chip(name):
    assert chip_of(open_topology(f"{name}:1").devices[0]).name == name


def test_micro_batches_lose_nothing_where_devices_have_copies():
    assert_nothing_is_lost("h100:4")


def test_what_is_offloaded_is_read_in_the_order_of_the_backward_pass():
    """Layer i's input, which XLA before jax 0.11.1 takes from layer n - 1 - i."""
    config = small_config(remat="offload")
    if "offload" not in remat_policies("gpu"):
        with pytest.raises(UsageError, match="wrong gradients on GPUs .*0.11.1 or later"):
            small_step(config, "h100:4")
        return
    steps = re.findall(r'"byte_stride":"(-?)(\d+)"', small_step(config, "h100:4"))
    layer = 2 * 2 * 256 * 512  # bytes of a layer's input: rows, tokens, features in bfloat16
    assert {sign for sign, stride in steps if int(stride) == layer} == {"", "-"}
