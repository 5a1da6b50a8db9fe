"""Our logits against transformers' on random weights, and a trained model against its own text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf import load_hf
from sa_jax.llama.model import Llama
from sa_jax.llama.rope import inverse_frequencies

# The real values: Llama 3.1 (and 3.3), and Llama 3.2.
ROPE_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE_32 = ROPE_31 | {"factor": 32.0}

# (query heads, key/value heads, head size), tied, rope scaling, spelling of rope in config.json
CASES = {
    "mha-untied-plain-old": ((4, 4, 16), False, None, "old"),
    "gqa-untied-3.1-old": ((4, 2, 128), False, ROPE_31, "old"),
    "gqa-untied-3.1-new": ((8, 2, 16), False, ROPE_31, "new"),
    "mqa-untied-3.1-new": ((4, 1, 64), False, ROPE_31, "new"),
    "mqa-tied-plain-new": ((4, 1, 16), True, None, "new"),
    "gqa-tied-3.2-old": ((4, 2, 64), True, ROPE_32, "old"),
    "gqa-tied-3.2-new": ((4, 2, 64), True, ROPE_32, "new"),
    "mha-tied-3.2-new": ((2, 2, 32), True, ROPE_32, "new"),
}


def make_reference(folder, heads, tied, scaling, spelling):
    """A random transformers model, saved; returns it with the config.json spelled as asked."""
    num_heads, num_kv_heads, head_dim = heads
    theta = 10_000.0 if scaling is None else 500_000.0
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=1e-5,
            max_position_embeddings=131_072,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": theta, **(scaling or {"rope_type": "default"})},
            initializer_range=0.15,
            attn_implementation="eager",
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # transformers starts them at 1, which would hide a norm mixed up
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    hf = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in hf
    if spelling == "old":
        del hf["rope_parameters"]
        hf |= {"rope_theta": theta, "rope_scaling": scaling}
        (folder / "config.json").write_text(json.dumps(hf))
        reread = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
        torch.testing.assert_close(
            reread.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=0, atol=0
        )
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    model = make_reference(tmp_path, *CASES[case])
    config, params = load_hf(tmp_path)
    forward = jax.jit(lambda p, t, pos: Llama(config).apply({"params": p}, t, pos))

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, 48))

    def worst(positions):
        with torch.no_grad():
            # With a mask given, transformers does not take jumps in positions for new documents.
            theirs = model(
                torch.tensor(tokens),
                attention_mask=torch.ones(tokens.shape, dtype=torch.long),
                position_ids=torch.tensor(positions),
            ).logits.numpy()
        ours = np.asarray(forward(params, jnp.asarray(tokens), jnp.asarray(positions)))
        assert ours.dtype == np.float32
        assert 2 < np.abs(theirs).max() < 50
        return np.abs(ours - theirs).max()

    near = np.sort(rng.choice(1000, (2, 48)), axis=1)
    near[0], near[1, -1] = np.arange(48), 999
    far = np.sort(rng.choice(131_072, (2, 48)), axis=1)
    far[:, -1] = 131_071
    differences = worst(near), worst(far)
    print(f"{case}: max abs difference {differences[0]:.1e} near, {differences[1]:.1e} far")
    assert differences[0] <= 1e-4
    assert differences[1] <= 2e-2


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scaling", [None, ROPE_31, ROPE_32], ids=["plain", "3.1", "3.2"])
def test_inverse_frequencies_are_transformers_bit_for_bit(scaling, head_dim):
    hf = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": 500_000.0, **(scaling or {"rope_type": "default"})},
    )
    theirs = LlamaRotaryEmbedding(hf).inv_freq.numpy()
    np.testing.assert_array_equal(inverse_frequencies(LlamaConfig.from_hf(hf.to_dict())), theirs)


def test_default_positions_are_counted_from_zero(tmp_path):
    make_reference(tmp_path, *CASES["gqa-untied-3.1-new"])
    config, params = load_hf(tmp_path)
    tokens = jnp.arange(20).reshape(2, 10)
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    apply = jax.jit(Llama(config).apply)
    np.testing.assert_array_equal(
        apply({"params": params}, tokens), apply({"params": params}, tokens, positions)
    )


def test_stories260k_reproduces_its_published_text(shared_data):
    folder = shared_data / "stories260k" / "hf"
    reference = (shared_data / "stories260k" / "reference_text.md").read_text()
    # The first sample of the page: greedy, from the start token, 256 steps.
    published = reference.split("-t 0.0\n", 1)[1].split("\n```", 1)[0]
    config, params = load_hf(folder)
    model = Llama(config)

    @jax.jit
    def generate(params):
        def step(i, tokens):
            logits = model.apply({"params": params}, tokens[None])[0]
            return tokens.at[i + 1].set(jnp.argmax(logits[i]))

        tokens = jnp.zeros(257, jnp.int32).at[0].set(config.bos_token_id)
        return jax.lax.fori_loop(0, 256, step, tokens)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(np.asarray(generate(params))[1:]).lstrip()
    assert text == published
