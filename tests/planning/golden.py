"""Files that say what a compiler makes of a step, each for one version of the compiler."""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cpu import xla_flags

GOLDENS = Path(__file__).parent / "goldens"
CLOCK = ("step_s", "products", "attention", "fusions", "copies", "collectives")


def held(file: Path, text: str) -> str:
    """What a golden file holds: this text, where SA_JAX_UPDATE_GOLDENS asks for it anew."""
    if os.environ.get("SA_JAX_UPDATE_GOLDENS"):
        file.write_text(text)
    assert file.exists(), f"no {file.name} yet; SA_JAX_UPDATE_GOLDENS=1 writes it"
    return file.read_text()


def assert_is_golden(name: str, package: str, version: str, content: dict) -> None:
    """The content is that of goldens/NAME.json; skipped where this is of another version."""
    text = json.dumps({package: version, **content}, indent=1)
    file = GOLDENS / f"{name}.json"
    golden = held(file, text + "\n")
    if json.loads(golden)[package] != version:
        pytest.skip(f"{file.name} is of another {package}; SA_JAX_UPDATE_GOLDENS=1 rewrites it")
    changes = difflib.unified_diff(golden.splitlines(), text.splitlines(), file.name, "now")
    assert text + "\n" == golden, "\n".join(changes)


def compiled_plan(file: Path, config: str, topology: str, *flags: str) -> dict[str, Any]:
    """What scripts/plan.py writes, compiled as a person's plan is."""
    environment = {**os.environ, "XLA_FLAGS": xla_flags(8, optimized=True)}
    command = [sys.executable, "scripts/plan.py", f"--config=configs/{config}", *flags]
    done = subprocess.run(
        [*command, f"--topology={topology}", f"--out={file}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


def plan_content(plan: dict[str, Any], digits: int = 2) -> dict[str, Any]:
    """What of a plan for TPUs is golden; memory to so many digits of a GiB."""
    memory = {k: v for k, v in plan["memory_gib_per_chip"].items() if k != "source"}
    predicted = {key: round(plan["clock"][key], digits + 2) for key in CLOCK if plan["clock"]}
    return {
        "settings": plan["settings"],
        "memory_gib_per_chip": {key: round(value, digits) for key, value in memory.items()},
        "collectives": plan["collectives"]["kinds"],
        "predicted_s": predicted,
    }
