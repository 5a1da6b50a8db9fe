"""Families that are a Llama in all but a name, and spellings of config.json: transformers' word."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from sa_jax.errors import UserError
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf import load_hf, save_hf
from sa_jax.llama.lora import LoraConfig, merge
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.parallel.mesh import make_mesh
from tests import toys

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}


def make_reference(folder, family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        **SIZES,
        **FAMILIES[family],
        max_position_embeddings=2048,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        attn_implementation="eager",
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # 1 and 0 at first, which would hide a mix-up
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_greedy_tokens_and_bytes_equal_transformers(family, tmp_path):
    model = make_reference(tmp_path / "theirs", family)
    config, params = load_hf(tmp_path / "theirs")
    assert config.num_parameters == sum(p.numel() for p in model.parameters())

    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, (2, 48))
    positions = np.stack([np.arange(48), np.sort(rng.choice(1000, 48, replace=False))])
    with torch.no_grad():
        theirs = model(
            torch.tensor(tokens),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    ours = jax.jit(Llama(config).apply)({"params": params}, tokens, jnp.asarray(positions))
    assert 2 < np.abs(theirs).max() < 100
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4

    generated = model.generate(
        torch.tensor(tokens[:, :20]), max_new_tokens=16, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    mesh = toys.one_device_mesh()
    sampler = Sampler(Llama(config), mesh, batch_size=2, context_length=40)
    completions = sampler.generate(
        params, tokens[:, :20].tolist(), range(2), SamplingSettings(16, temperature=0.0)
    )
    assert [list(c.tokens) for c in completions] == generated[:, 20:].tolist()

    save_hf(tmp_path / "ours", config, params)
    before, after = (
        {name: array.tobytes() for name, array in load_file(folder / "model.safetensors").items()}
        for folder in (tmp_path / "theirs", tmp_path / "ours")
    )
    assert before == after
    assert load_hf(tmp_path / "ours")[0] == config
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    assert type(again) is type(model)
    with torch.no_grad():
        np.testing.assert_array_equal(
            again(torch.tensor(tokens)).logits, model(torch.tensor(tokens)).logits
        )


def test_adapters_sit_on_the_projections_of_a_family_and_all_parameters_are_laid_out(tmp_path):
    make_reference(tmp_path / "m", "qwen2")
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    config, params = load_hf(tmp_path / "m", mesh)
    lora = LoraConfig(rank=2, alpha=4)
    model = Llama(config, lora=lora, mesh=mesh)
    tokens = jnp.arange(32).reshape(4, 8)
    adapted = model.init(jax.random.key(0), tokens)["params"]
    attention = adapted["layers"]["attention"]
    for name, leaf in params["layers"]["attention"].items():
        attention[name] |= leaf
    attention["q"]["lora_b"] = jnp.ones_like(attention["q"]["lora_b"])
    adapted = {**adapted, "embed": params["embed"]}
    merged = Llama(config).apply({"params": merge(adapted, lora)}, tokens)
    np.testing.assert_allclose(model.apply({"params": adapted}, tokens), merged, atol=2e-4)


# ---- config.json.

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
BASE = {"model_type": "llama", **SIZES, "max_position_embeddings": 512}
PARTS = [
    [{}, {"rope_theta": 3e5}],
    [
        {},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 7e5}},
    ],
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "rope_theta": 9e5}},
        {"rope_scaling": {**LLAMA3, "type": "linear"}},
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}},
        {"rope_scaling": {"type": "default"}},
    ],
]


def test_every_spelling_of_rope_is_read_as_transformers_reads_it():
    for parts in itertools.product(*PARTS):
        hf = {**BASE}
        for part in parts:
            hf |= part
        theirs = transformers.LlamaConfig(**json.loads(json.dumps(hf))).rope_parameters
        ours = LlamaConfig.from_hf(hf)
        assert ours.rope_theta == theirs["rope_theta"], hf
        if theirs["rope_type"] == "default":
            assert ours.rope_scaling is None, hf
        else:
            for field, value in vars(ours.rope_scaling).items():
                assert value == theirs[field], (hf, field)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_are_transformers(family):
    required = {**SIZES}
    del required["num_key_value_heads"]
    required |= {"num_attention_heads": 32, "hidden_size": 256}
    theirs = transformers.AutoConfig.for_model(family, **required).to_dict()
    hf = {"model_type": family, **required}
    if family == "mistral":
        hf["sliding_window"] = None
    ours = LlamaConfig.from_hf(hf).to_hf()
    for field in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
                  "tie_word_embeddings", "bos_token_id", "eos_token_id"):  # fmt: skip
        assert ours[field] == theirs[field], field
    assert ours["head_dim"] == theirs.get("head_dim", 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size='64.0' must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers='True' must be"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be"),
        ({"rms_norm_eps": []}, "rms_norm_eps"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "field 'factor' is missing"),
        ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor='0.5'"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config=.* not supported"),
        ({"eos_token_id": {"a": 1}}, "must be token numbers"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        # Where transformers takes no null.
        ({"tie_word_embeddings": None}, "tie_word_embeddings='None' must be true or false"),
        ({"rms_norm_eps": None}, "rms_norm_eps='None' must be a number"),
        ({"rope_theta": None}, "rope_theta='None' must be a number"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_parameters: rope_theta='None' must"),
        ({"rope_theta": None, "rope_scaling": {"rope_theta": 5e5}}, None),
        ({"num_key_value_heads": None, "head_dim": None}, None),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; known: llama, mistral, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "known: llama"),
        ({"model_type": "mistral", "sliding_window": 256}, "sliding-window attention is not"),
        ({"model_type": "mistral"}, None),  # its window of 4096 is longer than the context
        ({"model_type": "mistral", "sliding_window": 512}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding-w"),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64}, None),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "sliding-window"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias='True' is not supported"),
    ],
)
def test_a_wrong_value_is_one_line(change, words):
    if words is None:
        assert LlamaConfig.from_hf(BASE | change).family == change.get("model_type", "llama")
    else:
        with pytest.raises(UserError, match=words):
            LlamaConfig.from_hf(BASE | change)


def test_a_head_that_contradicts_the_config(tmp_path):
    make_reference(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
    load_hf(tmp_path)  # the same values twice
    head[3, 3] += 1
    save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
    with pytest.raises(UserError, match="is not the embedding; set tie_word_embeddings to false"):
        load_hf(tmp_path)
