"""Greedy tokens against transformers' `generate`, in float32, on 64 prompts of mixed lengths.

Identical up to the first step whose two best logits differ by less than `NEAR`: there rounding
decides, and the two texts go their own ways. Such steps are counted.
"""

import numpy as np
import pytest
import torch
import transformers

from sa_jax.llama.hf import load_hf
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler, SamplingSettings
from tests import toys

NEAR = 1e-3
LENGTHS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 40, 57, 64, 90, 128, 129)


def check(folder, new_tokens, batch_size):
    """Returns (prompts, compared steps, near ties where the two parted)."""
    config, params = load_hf(folder)
    rng = np.random.default_rng(0)
    prompts = [
        [config.bos_token_id or 0, *rng.integers(3, config.vocab_size, n - 1).tolist()]
        for n in LENGTHS
        for _ in range(4)
    ]
    mesh = toys.one_device_mesh()
    sampler = Sampler(
        Llama(config), mesh, batch_size=batch_size, context_length=max(LENGTHS) + new_tokens
    )
    settings = SamplingSettings(new_tokens, temperature=0.0)
    ours = sampler.generate(params, prompts, range(len(prompts)), settings)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compared = ties = 0
    for start in range(0, len(prompts), 4):  # of one length: their batches need no padding
        with torch.no_grad():
            found = theirs.generate(
                torch.tensor(prompts[start : start + 4]),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = found.sequences[:, len(prompts[start]) :].tolist()
        logits_tbv = torch.stack(found.logits)
        for row, completion in enumerate(ours[start : start + 4]):
            best = torch.topk(logits_tbv[:, row], 2).values
            for step, (one, other) in enumerate(zip(completion.tokens, tokens[row], strict=True)):
                if one != other:
                    assert best[step, 0] - best[step, 1] < NEAR, (start + row, step)
                    ties += 1
                    break
                logprob = torch.log_softmax(logits_tbv[step, row], -1)[one]
                np.testing.assert_allclose(completion.logprobs[step], logprob, atol=1e-4)
                compared += 1
    return len(prompts), compared, ties


@pytest.mark.long
def test_on_stories260k(shared_data):
    prompts, compared, ties = check(shared_data / "stories260k/hf", new_tokens=48, batch_size=16)
    print(f"{prompts} prompts, {compared} steps identical, {ties} near ties")
    assert prompts == 64 and ties <= 2 and compared > 64 * 48 - 2 * 48


@pytest.mark.long
def test_on_a_random_llama_of_100m_parameters(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"},
    )
    model = transformers.LlamaForCausalLM(config)
    assert 90e6 < model.num_parameters() < 110e6
    model.save_pretrained(tmp_path)
    prompts, compared, ties = check(tmp_path, new_tokens=16, batch_size=64)
    print(f"{prompts} prompts, {compared} steps identical, {ties} near ties")
    # Random weights have flat logits: some steps are ties.
    assert prompts == 64 and ties <= 8
