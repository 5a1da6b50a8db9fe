"""Fixtures: a Hugging Face folder, and a copy of it to damage."""

import shutil

import pytest

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
