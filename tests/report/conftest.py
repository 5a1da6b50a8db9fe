"""A synthetic study, and the report on it."""

import json
from pathlib import Path

import pytest

from sa_jax.report.report import report
from tests.report.made_runs import write_grid, write_run, write_scores, write_study
from tests.report.pages import Page


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """A finished study; tests must not write outside its `report` folder."""
    return write_study(tmp_path_factory.mktemp("studies") / "toy")


@pytest.fixture(scope="session")
def make_run():
    """`write_run`."""
    return write_run


@pytest.fixture(scope="session", name="write_scores")
def write_scores_():
    """`write_scores`."""
    return write_scores


@pytest.fixture(scope="session")
def make_study():
    """`write_study`."""
    return write_study


@pytest.fixture(scope="session")
def grid(tmp_path_factory) -> Path:
    """The index of a report on 160 runs; tests must not write to its folder."""
    return report(write_grid(tmp_path_factory.mktemp("studies") / "grid"))


@pytest.fixture(scope="session")
def page(study) -> Page:
    return Page(report(study).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def results(study, page) -> dict:
    return json.loads((study / "report" / "results.json").read_text())


@pytest.fixture(scope="session")
def small_run(make_run):
    """Writes a run of 20 steps and 20 prompts."""

    def write(folder, task="hhh", **changes):
        settings = {"total_steps": 20, "curve": {0: (20, 0, 100), 20: (0, 0, 90)}, "n": 20}
        return make_run(folder, task, **(settings | changes))

    return write
