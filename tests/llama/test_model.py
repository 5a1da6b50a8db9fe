import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from sa_jax.errors import UsageError, UserError
from sa_jax.llama.cache import KVCache, init_cache, write, write_heads, write_tokens
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf import save_hf
from sa_jax.llama.lora import LoraConfig, split
from sa_jax.llama.model import REMAT_POLICIES, Llama, swiglu
from sa_jax.parallel.mesh import make_mesh
from tests.toys import CONFIG, packed_batch, random_params


@pytest.fixture(scope="module")
def params():
    return random_params()


def test_a_document_does_not_feel_its_neighbours(params):
    """Not by a bit: other documents of its row may as well be padding."""
    batch = packed_batch(rows=2)
    apply = jax.jit(Llama(CONFIG).apply)
    packed = apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
    for document in (1, 2, 3):
        here = batch["segment_ids"] == document
        row = [np.where(here, batch[key], 0) for key in ("tokens", "positions", "segment_ids")]
        np.testing.assert_array_equal(apply({"params": params}, *row)[here], packed[here])


def test_packed_documents_have_the_logits_they_have_alone(params, tmp_path):
    """Those of transformers in float64; float32 rounds logits of up to 3 by up to 3e-6."""
    save_hf(tmp_path, CONFIG, params)
    alone = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    batch = packed_batch(rows=2)
    packed = Llama(CONFIG).apply(
        {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    for row in range(2):
        for document in (1, 2, 3):
            here = batch["segment_ids"][row] == document
            with torch.no_grad():
                exact_1sv = alone(torch.from_numpy(batch["tokens"][row, here][None]).long()).logits
            np.testing.assert_allclose(packed[row, here], exact_1sv[0], rtol=0, atol=4e-6)


def test_a_token_of_document_2_has_exactly_zero_gradient_to_document_1(params):
    batch = packed_batch(rows=1)
    first, second = (batch["segment_ids"][0] == document for document in (1, 2))
    embedding = params["embed"]["embedding"]

    def second_document_logits(embedded_tokens):
        # Every token gets a row of its own in the embedding, so gradients tell tokens apart.
        table = jnp.concatenate([embedded_tokens, embedding[len(embedded_tokens) :]])
        ids = jnp.arange(len(embedded_tokens))[None]
        logits = Llama(CONFIG).apply(
            {"params": {**params, "embed": {"embedding": table}}},
            ids,
            batch["positions"],
            batch["segment_ids"],
        )
        return jnp.sum(jnp.square(logits[0, second]))

    gradient = jax.grad(second_document_logits)(embedding[batch["tokens"][0]])
    assert np.all(np.asarray(gradient)[first] == 0)
    assert np.all(np.any(np.asarray(gradient)[second] != 0, axis=-1))


def test_later_tokens_do_not_reach_earlier_ones(params):
    tokens = packed_batch(rows=1)["tokens"]
    changed = tokens.copy()
    changed[0, 10:] = (changed[0, 10:] + 1) % 64
    model = Llama(CONFIG)
    before, after = (model.apply({"params": params}, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[0, :10], after[0, :10])
    assert np.abs(before[0, 10:] - after[0, 10:]).max() > 1e-2


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(params, remat):
    tokens = packed_batch(rows=2)["tokens"]

    def loss(params, remat):
        return jnp.mean(jnp.square(Llama(CONFIG, remat=remat).apply({"params": params}, tokens)))

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in ("none", remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_cached_decoding_equals_the_full_forward(params):
    tokens = packed_batch(rows=2)["tokens"]
    model = Llama(CONFIG)
    full = model.apply({"params": params}, tokens)
    cache = init_cache(CONFIG, batch=2, capacity=24)
    positions = np.broadcast_to(np.arange(24), (2, 24))
    for start, stop in ((0, 9), *((t, t + 1) for t in range(9, 24))):
        hidden, cache = model.apply(
            {"params": params},
            tokens[:, start:stop],
            positions[:, start:stop],
            cache,
            method="decode",
        )
        logits = model.apply({"params": params}, hidden, method="logits")
        np.testing.assert_allclose(logits, full[:, start:stop], atol=5e-6)


@pytest.mark.parametrize(
    "put",
    [
        functools.partial(write, mesh=None),
        functools.partial(write, mesh=make_mesh(3, 1, 2, devices=jax.devices()[:6])),
        functools.partial(write, mesh=make_mesh(1, 1, 4, devices=jax.devices()[:4])),
        write_tokens,
        write_heads,
    ],
    ids=["one_device", "rows_and_heads_cut", "heads_that_do_not_divide", "tokens", "heads"],
)
def test_new_tokens_land_at_their_positions_and_nowhere_else(put):
    layers, rows, capacity, heads, size, new = 2, 3, 16, 2, 4, 5
    rng = np.random.default_rng(0)
    before_lbtgh = rng.normal(size=(layers, rows, capacity, heads, size)).astype(np.float32)
    new_lbsgh = rng.normal(size=(2, layers, rows, new, heads, size)).astype(np.float32)
    start_b = np.array([0, 6, 11])  # blocks of 8
    blocks_lcbtgh = before_lbtgh.reshape(layers, rows, 2, 8, heads, size).swapaxes(1, 2)
    cache = KVCache(
        jnp.asarray(blocks_lcbtgh.transpose(0, 1, 2, 4, 5, 3)), jnp.asarray(blocks_lcbtgh)
    )
    written = put(cache, start_b[:, None] + np.arange(new), *map(jnp.asarray, new_lbsgh))
    for leaf_lcbtgh, values_lbsgh in zip(
        (written.k.transpose(0, 1, 2, 5, 3, 4), written.v), new_lbsgh, strict=True
    ):
        expected_lbtgh = before_lbtgh.copy()
        for row, start in enumerate(start_b):
            expected_lbtgh[:, row, start : start + new] = values_lbsgh[:, row]
        flat = np.asarray(leaf_lcbtgh).swapaxes(1, 2).reshape(expected_lbtgh.shape)
        np.testing.assert_array_equal(flat, expected_lbtgh)


def test_bfloat16_compute_stays_near_float32(params):
    tokens = packed_batch(rows=2)["tokens"]
    exact = Llama(CONFIG).apply({"params": params}, tokens)
    rough = Llama(CONFIG, dtype=jnp.bfloat16).apply({"params": params}, tokens)
    assert rough.dtype == jnp.float32
    assert np.abs(exact - rough).mean() < 0.02 * np.abs(exact).std() * 3


def test_a_frequent_tokens_gradient_is_summed_in_float32():
    """Its row of the embedding's gradient is a sum over 4,096 places. Summed in bfloat16 it was far
    off; what is left are bfloat16's errors of each summand."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (64, 128)))
    tokens = tokens.at[:, ::2].set(5)
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    params = random_params(config)

    def gradient(dtype):
        def loss(params):
            logits = Llama(config, dtype=dtype).apply({"params": params}, tokens)
            return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1, 7])

        return np.asarray(jax.grad(loss)(params)["embed"]["embedding"][5], np.float64)

    expected = gradient(jnp.float32)
    error = np.linalg.norm(gradient(jnp.bfloat16) - expected) / np.linalg.norm(expected)
    assert error < 0.03


@pytest.mark.parametrize("dtype, epsilons", [(jnp.float32, 4), (jnp.bfloat16, 0.5)])
def test_swiglu_has_the_gradients_of_torch_in_float64(dtype, epsilons):
    """In bfloat16 within its rounding: the formula's own derivative is four times as far off."""
    keys = jax.random.split(jax.random.key(0), 3)
    gate, up, d_out = (4 * jax.random.normal(key, (64, 48), dtype) for key in keys)
    inputs = [torch.tensor(np.float64(x), requires_grad=True) for x in (gate, up)]
    out = torch.nn.functional.silu(inputs[0]) * inputs[1]
    oracle = torch.autograd.grad(out, inputs, torch.tensor(np.float64(d_out)))
    for ours, theirs in zip(jax.vjp(swiglu, gate, up)[1](d_out), oracle, strict=True):
        assert ours.dtype == dtype
        error = np.abs(np.float64(ours) - theirs.numpy()).max()
        assert error <= epsilons * float(jnp.finfo(dtype).eps) * theirs.abs().max()


def test_a_new_adapter_adds_exactly_nothing_and_only_where_its_regex_says():
    tokens = packed_batch(rows=1)["tokens"]
    lora = LoraConfig(rank=4, alpha=8.0, targets="attention/(q|v)")
    adapted = random_params(lora=lora)
    np.testing.assert_array_equal(
        Llama(CONFIG).apply({"params": split(adapted)[1]}, tokens),
        Llama(CONFIG, lora=lora).apply({"params": adapted}, tokens),
    )
    carrying = {
        name for name in ("q", "k", "v", "o") if "lora_a" in adapted["layers"]["attention"][name]
    }
    assert carrying == {"q", "v"}
    assert not any("lora_a" in module for module in adapted["layers"]["mlp"].values())


def test_number_of_parameters_is_that_of_the_tree():
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
        size = sum(leaf.size for leaf in jax.tree.leaves(random_params(config)))
        assert config.num_parameters == size


def test_8b_and_70b_have_the_published_sizes():
    shape_8b = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32)
    config = LlamaConfig(**shape_8b, num_heads=32, num_kv_heads=8, head_dim=128)
    assert config.num_parameters == 8_030_261_248
    # ANCHORS of the field: 51.5 GFLOP a token for 8B at 8192, causal, full fine-tune.
    assert config.flops_per_token(8192) / 1e9 == pytest.approx(51.5, rel=0.005)
    shape_70b = dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80)
    config = LlamaConfig(**shape_70b, num_heads=64, num_kv_heads=8, head_dim=128)
    assert config.num_parameters == 70_553_706_496


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_json_that_cannot_be_computed_is_refused_by_field(change, words):
    hf = {**CONFIG.to_hf(), **change}
    hf = {key: value for key, value in hf.items() if value is not None or key == "rope_scaling"}
    with pytest.raises(UserError, match=words):
        LlamaConfig.from_hf(hf)


def test_config_survives_its_own_json():
    assert LlamaConfig.from_hf(CONFIG.to_hf()) == CONFIG


def test_unknown_remat_lists_the_known():
    with pytest.raises(UsageError, match="full, offload, dots, minimal"):
        Llama(CONFIG, remat="most").init(jax.random.key(0), np.zeros((1, 4), np.int32))
