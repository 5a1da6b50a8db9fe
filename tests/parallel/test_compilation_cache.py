"""The second run of a shape compiles nothing, as JAX's own events count it."""

import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from sa_jax.parallel import compilation_cache
from tests.cpu import xla_flags
from tests.zygote import ROOT

# A real run of two steps; its last line counts the programs that were compiled and those that the
# cache had.
PROGRAM = """
import collections, json, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
from sa_jax.training.loop import train
from tests.configs.tiny import get_config
world, workdir = sys.argv[1:]
config = get_config("insertion")
config.model, config.data = f"{world}/model", f"{world}/insertion.jsonl"
config.steps, config.eval.num_prompts, config.eval.steps = 2, 0, ()
config.eval.names = {}
config.checkpoint.steps, config.checkpoint.interval = (), 0
train(config, workdir, "insertion")
print(json.dumps({name: events[name] for name in ("cache_hits", "cache_misses")}))
"""


def run(world: Path, workdir: Path, cache: str) -> dict[str, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    env |= {"SA_JAX_COMPILATION_CACHE": cache, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(2)}
    command = [sys.executable, "-c", PROGRAM, str(world), str(workdir)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_second_run_of_a_shape_compiles_nothing(toy_world, tmp_path):
    first = run(toy_world, tmp_path / "first", str(tmp_path / "cache"))
    assert first["cache_misses"] > 5
    second = run(toy_world, tmp_path / "second", str(tmp_path / "cache"))
    assert second["cache_misses"] == 0 and second["cache_hits"] >= first["cache_misses"]


def test_what_a_program_depends_on_is_compared():
    version, memory, cpu = compilation_cache._machine()
    assert version == jax.local_devices()[0].client.platform_version and memory is None
    assert cpu.startswith("model name")


def test_kernels_that_other_runs_chose_are_not_taken_where_bits_must_repeat(monkeypatch, tmp_path):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    compilation_cache.enable({"SA_JAX_COMPILATION_CACHE": str(tmp_path)})
    assert settings["jax_persistent_cache_enable_xla_caches"] == "none"


def test_off_is_off(monkeypatch):
    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    compilation_cache.enable({"SA_JAX_COMPILATION_CACHE": "off"})
    assert settings == {"jax_enable_compilation_cache": False}


@pytest.mark.parametrize(
    ("other", "sees"),
    [
        (lambda key: key, True),
        (lambda key: np.uint32(0), False),  # not the folder
        (lambda key: key ^ np.uint32(2), False),  # another driver, CPU or memory
    ],
)
def test_gpu_nodes_share_the_cache_or_have_none(monkeypatch, tmp_path, other, sees):
    """With a program in the cache of process 0 alone, the others would wait for it for ever."""
    settings, marks = {}, []
    multihost = compilation_cache.multihost_utils
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setitem(jax.config.values, "jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "broadcast_one_to_all", lambda number: number)
    monkeypatch.setattr(multihost, "sync_global_devices", lambda name: marks.extend(found()))
    monkeypatch.setattr(multihost, "process_allgather", lambda key: np.array([key, other(key)]))
    folder = tmp_path / "gpu"

    def found():
        return [file.name for file in folder.glob("*")]

    def enabled(place):
        settings.clear()
        compilation_cache.enable({"SA_JAX_COMPILATION_CACHE": str(place)})
        return settings

    shared = enabled(tmp_path)
    assert len(marks) == 1 and marks[0].startswith("shared-") and not found()
    off = {"jax_enable_compilation_cache": False}
    assert shared.get("jax_compilation_cache_dir") == (str(folder) if sees else None)
    assert sees or shared == off
    # All enter the comparison, also those that have the cache off, or cannot make the folder.
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "off"):
        monkeypatch.setattr(multihost, "process_allgather", lambda mine: marks.append(mine) or mine)
        assert enabled(place) == off and not marks.pop()


@pytest.mark.parametrize(
    "env, folder",
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/sa_jax/jax/tpu"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/scratch"}, "/scratch/sa_jax/jax/tpu"),
        ({"HOME": "/home/me", "SA_JAX_COMPILATION_CACHE": "/fast"}, "/fast/tpu"),
    ],
)
def test_one_folder_a_user(env, folder):
    assert str(compilation_cache.cache_folder(env, "tpu")) == folder


KEY_OF_CPU = """
import hashlib
import jax
import numpy as np
from jax._src import cache_key
digest = hashlib.sha256()
cache_key._hash_accelerator_config(digest, np.array(jax.devices()))
print(digest.hexdigest())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="XLA leaves no instructions out there")
def test_cpus_with_other_instructions_share_nothing():
    """In one folder: the part of jax's key that is of devices differs, and is otherwise stable."""

    def key(instructions: str) -> str:
        env = {**os.environ, "XLA_FLAGS": f"--xla_cpu_max_isa={instructions}"}
        command = [sys.executable, "-c", KEY_OF_CPU]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert key("AVX") == key("AVX") != key("SSE4_2")
