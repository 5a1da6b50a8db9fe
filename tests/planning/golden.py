"""Files that say what a compiler makes of a step, each for one version of the compiler."""

import json
import os
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"


def assert_is_golden(name: str, package: str, version: str, content: dict) -> None:
    """The content is that of goldens/NAME.json; skipped where this is of another version."""
    text = json.dumps({package: version, **content}, indent=1)
    file = GOLDENS / f"{name}.json"
    if os.environ.get("SA_JAX_UPDATE_GOLDENS"):
        file.write_text(text + "\n")
    assert file.exists(), f"no {file.name} yet; SA_JAX_UPDATE_GOLDENS=1 writes it"
    golden = file.read_text()
    if json.loads(golden)[package] != version:
        pytest.skip(f"{file.name} is of another {package}; SA_JAX_UPDATE_GOLDENS=1 rewrites it")
    assert text + "\n" == golden
