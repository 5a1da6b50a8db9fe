"""What the benchmarks record beside their figures, and how. Those that are scripts import it."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any


def versions(*packages: str) -> dict[str, str]:
    """Package -> the version that is installed here."""
    return {package: importlib.metadata.version(package) for package in packages}


def write_record(path: Path | str, record: dict[str, Any]) -> None:
    """Writes a benchmark's figures as a JSON file."""
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
