"""The weights that evals compute with: where they are, and that no step moves them."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.config_files import load_config
from sa_jax.llama import sampler as sampler_module
from sa_jax.llama import weights as weights_module
from sa_jax.llama.lora import LoraConfig
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler
from sa_jax.llama.weights import cast_weights, decoding_mesh
from sa_jax.parallel.hardware import GIB, memory_bytes
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import abstract, shardings, with_shardings
from sa_jax.planning.collectives import read_collectives
from sa_jax.planning.topology import open_topology
from sa_jax.training.plan import plan_architecture
from sa_jax.training.start import abstract_params
from tests.llama.sampling_toys import (
    CONFIG,
    CONTEXT,
    GREEDY,
    IDS,
    PROMPTS,
    SAMPLED,
    SHORT,
    make_params,
    tokens_of,
)
from tests.toys import one_device_mesh


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return make_params(model)


def test_no_decoding_step_gathers_weights(model, params, monkeypatch):
    """A step sends less than a tenth of what it sends if the weights stay cut over fsdp."""
    mesh = make_mesh(1, 8, 1)
    row = np.zeros(8, np.int32)
    noise = {"seed": np.uint32(0), "temperature": np.float32(0), "top_p": np.float32(1)}

    def bytes_sent(sampler):
        placed = jax.device_put(params, shardings(sampler.mesh, params))
        lowered = sampler._decode.lower(
            placed, sampler._init_cache(), *[row] * 5, np.int32(1), nucleus=False, **noise
        )
        collectives = read_collectives(lowered.compile().as_text())
        return sum(traffic.bytes for traffic in collectives.values())

    ours = Sampler(model, mesh, batch_size=8, context_length=CONTEXT)
    assert dict(ours.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}  # 2 kv heads
    assert list(ours.mesh.devices.flat) == list(mesh.devices.flat)
    monkeypatch.setattr(sampler_module, "decoding_mesh", lambda mesh, *_: mesh)
    gathering = Sampler(model, mesh, batch_size=8, context_length=CONTEXT)
    assert bytes_sent(gathering) > 10 * bytes_sent(ours)


@pytest.mark.parametrize(
    "topology,sizes,run,sampled_on",
    [
        ("v5p:2x2x2", (1, 8, 1), "8b", (1, 1, 8)),
        ("v5p:2x2x4", (1, 16, 1), "8b", (2, 1, 8)),  # eight are two whole dimensions of three
        ("v5p:4x4x4", (1, 16, 4), "8b", (16, 1, 4)),  # eight would split a dimension
        ("v5p:4x4x4", (1, 16, 4), "70b", (1, 16, 4)),  # 33 GiB would not fit beside training
        ("v5p:4x4x8", (1, 16, 8), "70b", (16, 1, 8)),
        ("2xv5p:2x2x2", (1, 8, 1), "8b", (2, 1, 8)),
        ("v5p:2x2x2", (8, 1, 1), "8b", (8, 1, 1)),
    ],
)
def test_meshes_of_tpus_that_answers_are_sampled_on(topology, sizes, run, sampled_on):
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    machine = open_topology(topology)
    mesh = make_mesh(*sizes, devices=machine.devices, slices=machine.slices)
    config = plan_architecture(load_config(f"configs/llama.py:{run}_insertion"))
    assert decoding_mesh(mesh, config, jnp.bfloat16).devices.shape == sampled_on


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 1, 4)])
def test_a_decoding_step_on_tpus_gathers_no_cached_value(sizes):
    """The compiler gathered the values of all heads, 4.3 GB a step for 8B, to write one token."""
    pytest.importorskip("libtpu", reason="needs the extra tpu")
    mesh = make_mesh(*sizes, devices=open_topology("v5p:2x2x2").devices)
    config = dataclasses.replace(
        CONFIG, num_heads=8, num_kv_heads=8, head_dim=128, max_position_embeddings=256
    )
    model = Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    sampler = Sampler(model, mesh, batch_size=16, context_length=256)
    cache = with_shardings(jax.eval_shape(sampler._init_cache), sampler.cache_shardings)
    weights = abstract(sampler.mesh, abstract_params(model))
    row = jax.ShapeDtypeStruct((16,), jnp.int32)
    noise = {"seed": np.uint32(0), "temperature": np.float32(0), "top_p": np.float32(1)}
    lowered = sampler._decode.lower(weights, cache, *[row] * 5, np.int32(1), nucleus=False, **noise)
    collectives = read_collectives(lowered.compile().as_text())
    values = cache.v.size * 2 // mesh.size  # bytes of a device's part
    assert sum(traffic.bytes for traffic in collectives.values()) < values


def test_weights_stay_where_copies_would_not_fit(monkeypatch):
    mesh = make_mesh(1, 8, 1)
    weights = CONFIG.num_parameters * 4 / 2  # bytes a device, in groups of two
    for times, fsdp in ((3.1, 1), (2.9, 8)):
        monkeypatch.setattr(weights_module, "memory_bytes", lambda _, n=times: n * weights)
        assert decoding_mesh(mesh, CONFIG, jnp.float32).shape["fsdp"] == fsdp


def test_moving_weights_leaves_no_copy_on_the_host(model, params):
    mesh = make_mesh(1, 8, 1)
    sampler = Sampler(model, mesh, batch_size=8, context_length=CONTEXT)
    on_mesh = jax.device_put(params, shardings(mesh, params))
    sampler.generate(on_mesh, PROMPTS[:1], IDS[:1], GREEDY)
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(on_mesh))


@pytest.mark.parametrize("sizes,stay", [((1, 1, 1), False), ((1, 4, 2), False), ((1, 4, 2), True)])
def test_layers_apart_decode_the_same(model, monkeypatch, sizes, stay):
    """As on a GPU, which reads the weights of each layer in place; with adapters, also where the
    weights stay cut over fsdp."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    adapted = model.clone(lora=LoraConfig(rank=1, alpha=8.0, targets="layers/.*(q|down)"))
    params = jax.tree.map_with_path(
        lambda path, x: jnp.ones_like(x) if path[-1].key == "lora_b" else x, make_params(adapted)
    )
    expected = Sampler(adapted, one_device_mesh(), batch_size=4, context_length=CONTEXT)
    monkeypatch.setattr(sampler_module, "layers_apart_pay", lambda *_, **__: True)
    if stay:
        monkeypatch.setattr(weights_module, "memory_bytes", lambda devices: 0.0)
    apart = Sampler(adapted, mesh, batch_size=4, context_length=CONTEXT)
    assert (apart.mesh == mesh) == (stay or math.prod(sizes) == 1)
    on_mesh = jax.device_put(params, shardings(mesh, params))
    layers = apart._for_decoding(jax.device_put(on_mesh, shardings(apart.mesh, params)))
    assert "lora_a" in layers["layer_1"]["attention"]["q"]
    for leaf, wanted in zip(
        jax.tree.leaves(layers), jax.tree.leaves(shardings(apart.mesh, layers)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    assert tokens_of(apart.generate(on_mesh, *SHORT, SAMPLED)) == tokens_of(
        expected.generate(params, *SHORT, SAMPLED)
    )


def test_bf16_weights_are_cast_once_with_the_same_result(params):
    """Casting up front equals the model's own cast at every use; norm scales stay float32."""
    model = Llama(CONFIG, dtype=jnp.bfloat16)
    sampler = Sampler(model, one_device_mesh(), batch_size=4, context_length=CONTEXT)
    cast = cast_weights(params, jnp.bfloat16)
    again = cast_weights(cast, jnp.bfloat16)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (cast, again)), strict=True))
    assert cast["layers"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16
    assert cast["final_norm"]["scale"].dtype == jnp.float32
    tokens = jnp.asarray([PROMPTS[5]])
    np.testing.assert_array_equal(
        model.apply({"params": params}, tokens), model.apply({"params": cast}, tokens)
    )
    assert sampler._init_cache().k.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "kind,limit,bytes_of_it",
    [
        ("cpu", None, math.inf),
        ("TPU v5p", None, 95 * GIB),
        ("NVIDIA H100 80GB HBM3", 60 * GIB + 5, 60 * GIB),  # JAX takes three quarters
        ("NVIDIA A100-SXM4-40GB", 30 * GIB, 30 * GIB),  # not the 80 GB of its larger twin
        ("NVIDIA L40S", 36 * GIB, 36 * GIB),  # a chip that we do not know
        ("TPU v5p", "compiled for", 95 * GIB),
    ],
)
def test_the_memory_of_a_device(kind, limit, bytes_of_it):
    def memory_stats():
        if limit == "compiled for":
            raise jax.errors.JaxRuntimeError("only supported for addressable devices")
        return {"bytes_limit": limit} if limit else None

    here = types.SimpleNamespace(device_kind=kind, process_index=0, memory_stats=memory_stats)
    elsewhere = types.SimpleNamespace(device_kind=kind, process_index=1)
    assert memory_bytes([elsewhere, here]) == bytes_of_it
