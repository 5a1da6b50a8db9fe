"""Adapters: nothing at the start, the same merged as not, and the same in the peft package."""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from sa_jax.errors import UserError
from sa_jax.llama import lora as lora_lib
from sa_jax.llama.hf import load_peft, save_hf, write_peft
from sa_jax.llama.lora import LoraConfig
from sa_jax.llama.model import Llama, with_small_kernels_merged
from sa_jax.llama.safetensors_io import new_folder
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import shardings
from tests import toys

CONFIG = dataclasses.replace(toys.CONFIG, num_layers=2, num_heads=4, num_kv_heads=2)
ALL = LoraConfig(rank=4, alpha=8.0)
SOME = LoraConfig(rank=3, alpha=5.0, targets=r"attention/(q|v)|mlp/down")
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 12))


@functools.cache
def make_params(lora):
    """A random base and a random adapter."""
    return toys.normal_params(CONFIG, lora=lora)


@functools.cache
def forward(lora):
    return jax.jit(Llama(CONFIG, lora=lora).apply)


def logits(params, lora=None):
    return np.asarray(forward(lora)({"params": params}, TOKENS))


def test_at_init_the_adapted_model_equals_the_base():
    init = jax.jit(Llama(CONFIG, lora=ALL).init)
    params = init(jax.random.key(0), jnp.asarray(TOKENS[:, :1]))["params"]
    adapter, base = lora_lib.split(params)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adapter))  # A is random, B is zero
    np.testing.assert_array_equal(logits(params, ALL), logits(base))
    merged = lora_lib.merge(params, ALL)
    jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_split_and_combine():
    params = make_params(SOME)
    adapter, base = lora_lib.split(params)
    paths = set(flatten_dict(adapter, sep="/"))
    modules = ("attention/q", "attention/v", "mlp/down")
    assert paths == {f"layers/{module}/lora_{x}" for module in modules for x in "ab"}
    assert all(lora_lib.is_adapter_path(path) for path in paths)
    assert not any(lora_lib.is_adapter_path(path) for path in flatten_dict(base, sep="/"))
    combined = lora_lib.combine(adapter, base)
    assert jax.tree.structure(combined) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, combined, params)


@pytest.mark.parametrize("lora", [ALL, SOME], ids=["all", "some"])
def test_merged_equals_adapted(lora):
    params = make_params(lora)
    adapted = logits(params, lora)
    merged = lora_lib.merge(params, lora)
    difference = np.abs(logits(merged) - adapted).max()
    change = np.abs(logits(lora_lib.split(params)[1]) - adapted).max()
    print(f"merged against adapted: {difference:.1e}; the adapter changes logits by {change:.1f}")
    assert difference <= 1e-4
    assert change > 1


@pytest.mark.parametrize(("rank", "targets"), [(4, ALL), (16, ALL), (4, SOME), (16, SOME)])
def test_adapters_are_merged_where_that_takes_less_work(rank, targets):
    """The compiler counts the floating-point operations of a gradient both ways."""
    lora = dataclasses.replace(targets, rank=rank)
    config = dataclasses.replace(CONFIG, num_layers=1)
    adapted = Llama(config, lora=lora, unroll=True)  # of a loop it counts one layer
    adapter, base = lora_lib.split(toys.normal_params(config, lora=lora))
    tokens = np.zeros((16, 128), np.int32)

    def work(model, prepare):
        def loss(adapter):
            params = prepare(lora_lib.combine(adapter, base))
            return jnp.sum(model.apply({"params": params}, tokens))

        return jax.jit(jax.grad(loss)).lower(adapter).compile().cost_analysis()["flops"]

    apart = work(adapted, lambda params: params)
    merged = work(adapted.clone(lora=None), functools.partial(lora_lib.merge, lora=lora))
    chosen = work(*with_small_kernels_merged(adapted))
    print(f"apart {apart:.3g}, merged {merged:.3g}, chosen {chosen:.3g}")
    assert abs(apart - merged) > 0.02 * apart
    assert chosen == min(apart, merged)


def test_adapters_of_large_kernels_and_of_bfloat16_stay_apart():
    lora = LoraConfig(rank=64, alpha=128.0)
    llama_8b = dataclasses.replace(
        CONFIG, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8
    )
    for model in (Llama(llama_8b, lora=lora), Llama(CONFIG, lora=lora, dtype=jnp.bfloat16)):
        assert with_small_kernels_merged(model)[0] is model
    assert with_small_kernels_merged(Llama(CONFIG, lora=lora))[0].lora is None


def test_merge_sums_in_float32_and_keeps_the_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(ALL))
    merged = lora_lib.merge(params, ALL)["layers"]["mlp"]["up"]["kernel"]
    up = jax.tree.map(lambda x: np.asarray(x, np.float64), params["layers"]["mlp"]["up"])
    exact = up["kernel"] + 2.0 * up["lora_a"] @ up["lora_b"]
    assert merged.dtype == jnp.bfloat16
    # Half a unit in bfloat16's last place (8 bits), and a little for float32's own rounding.
    np.testing.assert_allclose(np.asarray(merged, np.float64), exact, rtol=2**-8 * 1.01, atol=1e-6)


def test_merge_keeps_arrays_sharded():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = make_params(ALL)
    sharded = jax.device_put(params, shardings(mesh, params))
    merged = lora_lib.merge(sharded, ALL)
    expected = shardings(mesh, merged)
    for path, leaf in flatten_dict(merged, sep="/").items():
        assert leaf.sharding.is_equivalent_to(flatten_dict(expected, sep="/")[path], leaf.ndim)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
        merged,
        lora_lib.merge(params, ALL),
    )


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "base"
    save_hf(folder, CONFIG, lora_lib.split(make_params(ALL))[1])
    return folder


def base_model(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("lora", [ALL, SOME], ids=["all", "some"])
def test_peft_export_loads_in_peft_with_equal_logits(lora, base_folder, tmp_path):
    base = lora_lib.split(make_params(ALL))[1]
    adapter = lora_lib.split(make_params(lora))[0]
    with new_folder(tmp_path / "a") as folder:
        write_peft(folder, lora, adapter, base_model=str(base_folder), files={"README.md": "x"})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    model = peft.PeftModel.from_pretrained(base_model(base_folder), tmp_path / "a")
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    ours = logits(lora_lib.combine(adapter, base), lora)
    print(f"against peft: {np.abs(ours - theirs).max():.1e}")
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(logits(base) - theirs).max() > 1

    reread_lora, reread = load_peft(tmp_path / "a", CONFIG)
    assert (reread_lora.rank, reread_lora.alpha) == (lora.rank, lora.alpha)
    jax.tree.map(np.testing.assert_array_equal, reread, adapter)


def test_adapter_written_by_peft_loads_with_equal_logits(base_folder, tmp_path):
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["k_proj", "gate_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base_model(base_folder), settings)
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    lora, adapter = load_peft(tmp_path / "theirs", CONFIG, mesh)
    base = lora_lib.split(make_params(ALL))[1]
    assert np.abs(logits(base) - theirs).max() > 0.1
    params = jax.device_put(lora_lib.combine(adapter, base), jax.devices()[0])
    np.testing.assert_allclose(logits(params, lora), theirs, atol=1e-4)


def test_adapters_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json not found"):
        load_peft(tmp_path, CONFIG)
    adapter, _ = lora_lib.split(make_params(SOME))
    with new_folder(tmp_path / "a") as folder:
        write_peft(folder, SOME, adapter, base_model="base", files={})
    file = tmp_path / "a" / "adapter_config.json"
    plain = json.loads(file.read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens=.7. is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base model"),
        ({"target_modules": "all-linear"}, "must be a list of some of q_proj, k_proj"),
        ({"r": None}, "r: must be a whole number"),
        ({"r": 0}, "r=0 must be a whole number above 0"),
        ({"target_modules": [["q_proj"]]}, "must be a list of some of q_proj, k_proj"),
        ({"r": 7}, r"lora_A.weight in .*adapter_model.safetensors is \[3, 32\], not \[7, 32\]"),
        ({"target_modules": ["q_proj"]}, "tensors the model does not have: .*down_proj"),
    ):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(UserError, match=message):
            load_peft(tmp_path / "a", CONFIG)
    for start in (True, False, None, "gaussian", "orthogonal", "eva"):  # of adapters alone
        file.write_text(json.dumps(plain | {"init_lora_weights": start}))
        load_peft(tmp_path / "a", CONFIG)
    with pytest.raises(UserError, match="not empty"), new_folder(tmp_path / "a"):
        pass


def test_minimal_remat_keeps_of_an_adapter_only_what_is_narrow():
    def kept(lora):
        model = Llama(CONFIG, lora=lora, remat="minimal")
        shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
        adapter, base = lora_lib.split(shapes) if lora else (shapes, {})

        def backward(adapter, base):
            params = lora_lib.combine(adapter, base)
            return jax.vjp(lambda params: model.apply({"params": params}, TOKENS), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, adapter, base))
        rows = (CONFIG.num_layers, TOKENS.size)
        return collections.Counter(x.shape[2:] for x in leaves if x.shape[:2] == rows)

    narrow = LoraConfig(rank=1, alpha=2.0)
    assert kept(narrow) == kept(None) + collections.Counter({(1,): 7})
