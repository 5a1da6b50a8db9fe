"""What the benchmarks record beside their figures, and how. Those that are scripts import it."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sa_jax.text import table_row


def versions(*packages: str) -> dict[str, str]:
    """Package -> the version that is installed here."""
    return {package: importlib.metadata.version(package) for package in packages}


def write_record(path: Path | str, record: dict[str, Any]) -> None:
    """Writes a benchmark's figures as a JSON file."""
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def table_head(columns: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{table_row(columns)}\n{'|---' * len(columns)}|"
