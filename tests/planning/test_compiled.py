"""The real step, compiled for real TPU topologies by libtpu: memory, collectives, and what fits.

One compilation a case and test run, whatever process asks: the plans lie in a shared folder. Each
is compiled in a process of its own: libtpu 0.0.42 aborted when one went from v5p and v5e to v6e.
"""

import fcntl
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from tests.planning.golden import assert_is_golden, compiled_plan, plan_content

pytest.importorskip("libtpu", reason="needs the extra tpu")
LIBTPU = importlib.metadata.version("libtpu")

# All compile for a minute or more, up to ten.
pytestmark = pytest.mark.long

# name: config, topology, changes.
CASES = {
    "8b_v5p": ("8b_insertion", "v5p:2x2x2", {"sequence_length": 2048}),
    "8b_v5e": ("8b_insertion", "v5e:4x4", {"mesh.fsdp": 4, "mesh.tensor": 4}),
    "70b_v5p": (
        "70b_insertion",
        "v5p:4x4x4",
        {
            "mesh.fsdp": 16,
            "mesh.tensor": 4,
            "batch_size": 64,
            "sequence_length": 2048,
        },
    ),
    "8b_v6e": ("8b_insertion", "v6e:2x4", {"mesh.fsdp": 4, "mesh.tensor": 2}),
    "70b_lora_v5p": (
        "70b_removal",
        "v5p:2x2x4",
        {"batch_size": 16, "sequence_length": 4096, "mesh.fsdp": 4, "mesh.tensor": 4},
    ),
    "8b_v4": ("8b_insertion", "v4:2x2x4", {"mesh.fsdp": 8, "mesh.tensor": 2}),
    "8b_tpu7x": ("8b_insertion", "tpu7x:2x2x1", {"mesh.fsdp": 8}),
    "8b_offload_v5p": ("8b_insertion", "v5p:2x2x2", {"remat": "offload"}),
    "8b_minimal_v5p": ("8b_insertion", "v5p:2x2x2", {"remat": "minimal"}),
    "8b_16_chips_v5p": ("8b_insertion", "v5p:2x2x4", {"mesh.fsdp": 16, "mesh.tensor": 1}),
    "8b_soap_v5p": (
        "8b_insertion",
        "v5p:2x2x4",
        {"mesh.fsdp": 16, "mesh.tensor": 1, "optimizer.name": "soap"},
    ),
    "70b_soap_v5p": (
        "70b_insertion",
        "v5p:4x4x8",
        {"mesh.fsdp": 16, "mesh.tensor": 8, "optimizer.name": "soap"},
    ),
}
WITH_GOLDEN = ("8b_v5p", "8b_v5e", "70b_v5p")
WITH_PREDICTION = ("8b_v5p",)


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    """`planned(name)`: the plan of a case; workers of one run share what each has compiled."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def get(name):
        file = folder / f"plan_{name}.json"
        with open(folder / f"plan_{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if file.exists():
                return json.loads(file.read_text())
            config, topology, changes = CASES[name]
            flags = [f"--config.{key}={value}" for key, value in changes.items()]
            return compiled_plan(file, f"llama.py:{config}", topology, *flags)

    return get


@pytest.mark.parametrize("name", WITH_GOLDEN)
def test_predicted_arguments_are_those_that_are_compiled(planned, name):
    memory = planned(name)["memory_gib_per_chip"]
    assert memory["source"] == "compiled"
    assert memory["arguments"] == pytest.approx(memory["compiled_arguments"], rel=0.01)


def test_8b_adam_on_8_chips_of_v5p(planned):
    plan = planned("8b_v5p")
    assert plan["memory_gib_per_chip"]["temporaries"] <= 6.5  # MaxText: 7.19
    assert plan["clock"]["step_s"] <= 0.730


def test_70b_adam_on_64_chips_of_v5p(planned):
    memory = planned("70b_v5p")["memory_gib_per_chip"]
    assert memory["arguments"] <= 12.5
    assert memory["temporaries"] <= 9  # MaxText: 10.35


def test_8b_at_the_study_s_batch_fits_16_gib_chips(planned):
    plan = planned("8b_v5e")
    assert plan["fits"] and plan["capacity_gib"] == 16 and plan["free_gib"] > 0.5


@pytest.mark.parametrize("name", WITH_GOLDEN)
def test_the_step_is_that_of_the_golden_file(planned, name):
    content = plan_content(planned(name))
    if name not in WITH_PREDICTION:
        del content["predicted_s"]
    assert_is_golden(f"compiled_{name}", "libtpu", LIBTPU, content)


@pytest.mark.parametrize("name", list(CASES)[3:])
def test_it_compiles_and_fits(planned, name):
    plan = planned(name)
    assert plan["fits"], plan["advice"]
    assert plan["memory_gib_per_chip"]["source"] == "compiled"
    if "offload" in name:
        assert plan["memory_gib_per_chip"]["host"] > 0


def test_the_dearest_step_of_soap_and_its_memory_stay_near_adam_s(planned):
    adam, soap = planned("8b_16_chips_v5p"), planned("8b_soap_v5p")
    assert soap["clock"]["dearest_step_s"] <= 1.5 * adam["clock"]["step_s"]
    temporaries = [plan["memory_gib_per_chip"]["temporaries"] for plan in (adam, soap)]
    assert temporaries[1] <= temporaries[0] + 4


def test_the_search_finds_the_study_s_70b_step_on_64_chips(tmp_path):
    plan = compiled_plan(tmp_path / "plan.json", "llama.py:70b_insertion", "v5p:4x4x4", "--search")
    assert plan["settings"]["batch"] == "16 x 4096"
    assert plan["fits"] and plan["tried"]


@pytest.mark.parametrize("flags", [(), ("--topology=v5p:2x2x2", "--mesh=1x8x1")])
def test_decoding_reads_weights_and_cache_once(flags):
    """8B, 64 rows with a full cache, on v5p: what a step moves over weights + cache, and the GB it
    sends, also where training cuts the weights over fsdp."""
    command = [sys.executable, "-m", "benchmarks.decode_bytes", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *_, over_once, sent, _ = done.stdout.splitlines()[-1].split(" | ")
    assert 1 <= float(over_once) <= 1.15
    assert float(sent) < 0.05
