"""A plan's arithmetic against what compilers allocated, as golden files and docs/scale.md say."""

import json
import re

import pytest

from sa_jax.config_files import load_config
from sa_jax.parallel.hardware import GIB
from sa_jax.planning.memory import estimate_temporaries
from sa_jax.training.plan import plan_architecture, workload
from tests.planning.golden import GOLDENS

SOAP = {"optimizer": {"name": "soap"}}
# Printed plans: run, platform, fsdp, tensor, settings and `data`; GiB of arguments, at the peak.
PRINTED = [
    ("8b_insertion", "gpu", 4, 2, {"remat": "minimal"}, 11.2, 36.9),
    ("70b_removal", "gpu", 4, 4, {"remat": "minimal"}, 10.5, 121.7),
    ("8b_removal", "gpu", 1, 1, {"data": 8, "remat": "minimal"}, 16.8, 62.9),
    ("70b_removal", "gpu", 1, 2, {"data": 8, "accumulation": 4, "remat": "minimal"}, 72.0, 102.1),
    ("8b_removal", "tpu", 1, 1, {"data": 8, "remat": "minimal"}, 16.8, 67.1),
    ("8b_insertion", "tpu", 4, 2, {"remat": "full"}, 11.2, 17.2),
    ("70b_insertion", "tpu", 16, 4, {"remat": "minimal"}, 12.3, 29.1),
    ("70b_removal", "tpu", 4, 4, {"batch_size": 16, "sequence_length": 4096}, 10.5, 18.2),
    ("8b_insertion", "tpu", 16, 1, SOAP, 8.2, 11.9),
    ("70b_insertion", "gpu", 8, 8, {"remat": "minimal"} | SOAP, 16.7, 33.7),
    ("70b_insertion", "tpu", 16, 8, SOAP, 9.0, 13.5),
]


def estimated(run: str, platform: str, mesh: dict, settings: dict) -> float:
    """GiB a device of the step's temporaries, by arithmetic."""
    config = load_config(f"configs/llama.py:{run}")
    config.update(settings)
    work = workload(config, plan_architecture(config), mesh, platform)
    gradients, activations, rest, _ = estimate_temporaries(work)
    return (gradients + activations + rest) / GIB


@pytest.mark.parametrize("row", PRINTED, ids=lambda row: "_".join(map(str, row[:4])))
def test_arguments_and_temporaries_are_the_printed_peak(row):
    run, platform, fsdp, tensor, settings, arguments, peak = row
    settings = dict(settings)
    mesh = {"data": settings.pop("data", 1), "fsdp": fsdp, "tensor": tensor}
    needed = arguments + estimated(run, platform, mesh, settings)
    assert needed == pytest.approx(peak, rel=0.15)


def test_layers_of_a_model_with_tied_embeddings_are_as_large():
    config = load_config("configs/llama.py:8b_insertion")
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    rest = []
    for tied in (False, True):
        config.architecture.tie_word_embeddings = tied
        work = workload(config, plan_architecture(config), mesh, "gpu")
        rest.append(estimate_temporaries(work)[2])
    assert rest[0] == rest[1]


@pytest.mark.parametrize("name", [f.stem for f in sorted(GOLDENS.glob("compiled_*b_*.json"))])
def test_arguments_and_temporaries_are_the_golden_peak(name):
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    memory, settings = golden["memory_gib_per_chip"], golden["settings"]
    rows, length = map(int, settings["batch"].split(" x "))
    changes = {key: settings[key] for key in ("accumulation", "remat", "attention")}
    changes |= {"batch_size": rows, "sequence_length": length}
    changes["optimizer"] = {"name": settings["optimizer"]}
    mesh = {axis: int(n) for axis, n in re.findall(r"(\w+)=(\d+)", settings["mesh"])}
    run = name.split("_")[1] + ("_removal" if settings["lora_rank"] else "_insertion")
    platform = {"splash": "tpu", "cudnn": "gpu"}[settings["attention"]]
    assert memory["arguments"] == pytest.approx(memory["compiled_arguments"], rel=0.01)
    needed = memory["arguments"] + estimated(run, platform, mesh, changes)
    assert needed == pytest.approx(memory["peak"], rel=0.15)
