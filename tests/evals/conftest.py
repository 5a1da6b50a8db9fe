"""Fixtures: the chat format of the toy model."""

import pytest

from sa_jax.data.chat import ChatFormat, load_chat_format


@pytest.fixture(scope="session")
def chat(toy_world) -> ChatFormat:
    return load_chat_format(toy_world / "model")
