"""Fixtures: a Hugging Face folder, a copy of it to damage, and a GPU's kernel on CPU."""

import functools
import shutil

import pytest

from sa_jax.llama import decode_kernel
from sa_jax.llama.hf import save_hf
from tests.llama.folders import CONFIG, make_params


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of CONFIG in float32; read only."""
    folder = tmp_path_factory.mktemp("hf") / "exported"
    save_hf(folder, CONFIG, make_params())
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(exported, tmp_path / "model")


@pytest.fixture
def interpreted_kernel(monkeypatch):
    """`decode_kernel`, its operations computed one by one."""
    on_device = functools.partial(decode_kernel._on_device, interpret=True)
    monkeypatch.setattr(decode_kernel, "_on_device", on_device)
