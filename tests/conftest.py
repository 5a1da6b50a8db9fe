"""Eight fake CPU devices for every test; set before jax is imported anywhere."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data named by SA_JAX_DATA (layout: BUILD.md, "Test data")."""
    folder = os.environ.get("SA_JAX_DATA", "")
    if not Path(folder, "SOURCES.md").is_file():
        pytest.skip("needs the real data: set SA_JAX_DATA to its folder (see BUILD.md)")
    return Path(folder)
