"""A plan's arithmetic against what the compilers allocated, as the golden files keep it."""

import json

import pytest

from sa_jax.parallel.hardware import GIB
from sa_jax.planning.memory import estimate_temporaries
from sa_jax.study.commands import load_config
from sa_jax.training.plan import plan_architecture, workload
from tests.planning.golden import GOLDENS

FILES = sorted(GOLDENS.glob("compiled_*b_*.json"))


def estimated(name: str, settings: dict) -> float:
    """GiB a device of the step's temporaries, by arithmetic."""
    run = "removal" if settings["lora_rank"] else "insertion"
    config = load_config(f"configs/llama.py:{name.split('_')[1]}_{run}")
    rows, length = settings["batch"].split(" x ")
    config.update(
        {
            **{key: settings[key] for key in ("accumulation", "remat", "attention")},
            **{"batch_size": int(rows), "sequence_length": int(length)},
        }
    )
    mesh = {axis: int(n) for axis, n in (part.split("=") for part in settings["mesh"].split())}
    platform = {"splash": "tpu", "cudnn": "gpu"}[settings["attention"]]
    work = workload(config, plan_architecture(config), mesh, platform)
    gradients, activations, rest, _ = estimate_temporaries(work)
    return (gradients + activations + rest) / GIB


def test_the_golden_files_cover_gpus_and_tpus():
    names = " ".join(file.stem for file in FILES)
    assert all(chip in names for chip in ("v5e", "v5p", "h200", "lora"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_arguments_and_temporaries_by_arithmetic_are_the_compiled_peak(file):
    golden = json.loads(file.read_text())
    memory = golden["memory_gib_per_chip"]
    assert memory["arguments"] == pytest.approx(memory["compiled_arguments"], rel=0.01)
    needed = memory["arguments"] + estimated(file.stem, golden["settings"])
    assert needed == pytest.approx(memory["peak"], rel=0.15)
