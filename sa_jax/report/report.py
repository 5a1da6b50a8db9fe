"""Writes the report on a run or a study from its run folders: pages, tables and figures."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from sa_jax import text
from sa_jax.buckets import as_path, in_bucket
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, try_lock
from sa_jax.report import figures, page, run_tables
from sa_jax.report.cells import Cell
from sa_jax.report.drawing import Plot
from sa_jax.report.published import CURVES
from sa_jax.report.results import all_problems, definitions, summarise
from sa_jax.report.run_folders import RunFolder, folder_name, load_runs
from sa_jax.report.study_statistics import Study, study_of
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import judge


def report(workdir: str | Path, limits: Thresholds | None = None) -> Path:
    """Writes `workdir`/report:

        index.html          all runs; runs/NAME.html: all of one
        results.md          the tables as text; results.json: everything as values
        tables/NAME.*       every table as CSV, JSON and LaTeX
        plots/NAME.*        every figure as SVG and PNG

    and returns the path of index.html. `workdir`: see `load_runs`. The same run folders give the
    same bytes. UserError if there is no run, or the report cannot be written.
    """
    workdir = as_path(workdir)
    limits = limits or Thresholds()
    runs, problems = load_runs(workdir)
    judged = judge(runs, limits)
    results = summarise(runs, judged, problems, limits)
    by_name = dict(zip((run.name for run in runs), results["runs"], strict=True))
    study = study_of(runs, judged, by_name, limits)
    tables = [
        *study.tables,
        run_tables.optimizers_table(results["runs"]),
        run_tables.backdoor_evals_table(runs, limits),
        run_tables.events_table(results["runs"]),
    ]
    tables = [table for table in tables if table.rows]
    results["tables"] = {
        table.name: {"title": table.title, "rows": [dict(row) for row in table.rows]}
        for table in tables
    }
    folder = workdir / "report"
    try:
        with _alone(folder):
            _write(folder, folder_name(workdir), runs, results, study, tables)
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            f"{folder}: the report cannot be written ({why}); make this folder writable"
        ) from error
    return folder / "index.html"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other report is being written into the folder. A bucket, and a file system
    without locks, let all pass."""
    if in_bucket(folder):
        yield
        return
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        while not try_lock(descriptor):
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _write(
    folder: Path,
    title: str,
    runs: Sequence[RunFolder],
    results: Mapping[str, Any],
    study: Study,
    tables: Sequence[Table],
) -> None:
    parts = {part: folder / part for part in ("runs", "tables", "plots")}
    for part in parts.values():
        epath.Path(part).rmtree(missing_ok=True)  # a run that is gone must not stay behind
        part.mkdir(parents=True)
    of_runs = [
        run_tables.runs_table(results["runs"], page.rate_noun(results["runs"])),
        run_tables.scores_table(results["runs"]),
    ]
    cells = [result.cell for result in study.cells]
    of_cells: list[tuple[Cell, Plot | None]] = []
    if len(runs) > page.FEW:
        of_cells = [(cell, figures.seeds(cell.label, _members(cell, runs))) for cell in cells]
        panels = [(cell.label, plot) for cell, plot in of_cells]
    else:
        rates = [figures.rates(run.name, run, figures.backdoor_rates(run)) for run in runs]
        panels = [(run.name, plot) for run, plot in zip(runs, rates, strict=True)]
    drawn = _figures(study, runs, panels)
    for name, plot in drawn.items():
        plot.save(parts["plots"], name)
    for table in [*tables, *of_runs]:
        for name, words in table.files().items():
            atomic_write(parts["tables"] / name, words)
    for run, result in zip(runs, results["runs"], strict=True):
        atomic_write(parts["runs"] / result["page"], page.run_page(title, run, result))
    atomic_write(folder / "results.json", json.dumps(results) + "\n")
    atomic_write(folder / "results.md", to_markdown(results, tables, *of_runs))
    index = page.index_page(title, runs, results, tables, cells, drawn, of_cells)
    atomic_write(folder / "index.html", index)


def _members(cell: Cell, runs: Sequence[RunFolder]) -> list[RunFolder]:
    return [run for run in runs if run.name in cell.seeds]


def _figures(
    study: Study, runs: Sequence[RunFolder], panels: Sequence[tuple[str, Plot | None]]
) -> dict[str, Plot]:
    """Name -> figure, for the figures with data."""
    means = [
        (result.cell.label, result.triggered)
        for result in study.cells
        if result.triggered is not None and result.cell.role in ("removal", "probe")
    ]
    compared = {row["cell"] for t in study.tables if t.name == "published" for row in t.rows}
    over = [result.cell for result in study.cells if result.cell.label in compared]
    beside = {cell.label: _members(cell, runs) for cell in over}
    drawn = {
        "curves": figures.sheet(panels),
        "cells": figures.cells(means),
        "published": figures.published(CURVES, beside),
        "pareto": figures.pareto(study.pareto, study.capability),
    }
    return {name: plot for name, plot in drawn.items() if plot is not None}


def to_markdown(
    results: Mapping[str, Any], tables: Sequence[Table], runs: Table, scores: Table
) -> str:
    """results.md: the summary, the runs with the reasons for their verdicts, the study's tables,
    the thresholds."""
    reasons = []
    for run in results["runs"]:
        why = "; ".join([run["verdict"]["text"], *run["verdict"]["reasons"]])
        reasons.append(f"- {text.markdown(run['name'])}: {text.markdown(why)}")
    problems = [f"- {text.markdown(problem)}" for problem in all_problems(results)]
    limits = [
        f"- `--{name}={value}`: {text.markdown(meaning)}"
        for name, value, meaning in definitions(results)
    ]
    of_runs = [f"## {runs.title}\n\n{runs.markdown()}", "\n".join(reasons)]
    of_study = [
        f"## {text.markdown(t.title)}\n\n{text.markdown(t.note)}\n\n{t.markdown()}" for t in tables
    ]
    # Of a few runs each counts; of many, what they say together.
    few = len(results["runs"]) <= page.FEW
    parts = [
        text.markdown(results["summary"]),
        *(of_runs + of_study if few else of_study + of_runs),
        "\n".join(["What could not be read:", "", *problems]) if problems else "",
        "\n".join(["## Thresholds", "", *limits]),
        f"## {scores.title}\n\n{scores.markdown()}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
