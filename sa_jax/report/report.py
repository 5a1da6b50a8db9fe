"""The report on a run or a study: pages, tables and figures, from run folders alone."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sa_jax import text
from sa_jax.errors import UserError
from sa_jax.files import atomic_write
from sa_jax.report import page, plots
from sa_jax.report.backdoor_evals import backdoor_evals_table
from sa_jax.report.cells import CellGroup
from sa_jax.report.eval_records import forget_items
from sa_jax.report.published import CURVES
from sa_jax.report.results import all_problems, definitions, measure, summarise
from sa_jax.report.run_folders import RunFolder, load_runs
from sa_jax.report.run_tables import events_table, optimizers_table, runs_table, scores_table
from sa_jax.report.study_statistics import Study, study_of
from sa_jax.report.svg import Series
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import judge

MAX_RUN_PANELS = 12  # of the curves; more runs are drawn by cell


def report(workdir: str | Path, limits: Thresholds | None = None) -> Path:
    """Writes `workdir`/report:

        index.html          all runs; runs/NAME.html: all of one
        results.md          the tables as text; results.json: everything as values
        tables/NAME.*       every table as CSV, JSON and LaTeX
        plots/NAME.*        every figure as SVG and PNG

    The same run folders give the same bytes. What is missing (evals, a finished run) is said on the
    page.

    Args:
      workdir: a run folder, or a folder that holds some at most two levels below.
      limits: what the verdicts' words mean; the default is the study's definition.

    Returns:
      The path of index.html.

    Raises:
      UserError: no run there, or the report cannot be written.
    """
    workdir = Path(workdir)
    limits = limits or Thresholds()
    runs, problems = load_runs(workdir)
    measured = measure(runs)
    judged = judge(measured, limits)
    results = summarise(runs, judged, problems, limits)
    title = workdir.resolve().name
    for result, slug in zip(results["runs"], page.slugs([run.name for run in runs]), strict=True):
        result["page"] = f"{slug}.html"
    by_name = dict(zip((run.name for run in runs), results["runs"], strict=True))
    study = study_of(measured, judged, by_name, limits)
    results["tables"] = {
        table.name: {"title": table.title, "rows": [dict(row) for row in table.rows]}
        for table in study.tables
    }
    forget_items()  # a study of hundreds of runs holds hundreds of thousands
    folder = workdir / "report"
    try:
        _write(folder, title, runs, results, study, limits)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{folder}: the report cannot be written ({why}); free it up") from error
    return folder / "index.html"


def _write(
    folder: Path,
    title: str,
    runs: Sequence[RunFolder],
    results: Mapping[str, Any],
    study: Study,
    limits: Thresholds,
) -> None:
    parts = {part: folder / part for part in ("runs", "tables", "plots")}
    for part in parts.values():
        shutil.rmtree(part, ignore_errors=True)  # a run that is gone must not stay behind
        part.mkdir(parents=True)
    tables = [
        table
        for table in (
            *study.tables,
            optimizers_table(results["optimizers"]),
            backdoor_evals_table(runs, limits),
            events_table(results["runs"]),
        )
        if table.rows
    ]
    run_tables = [
        runs_table(results["runs"], page.rate_noun(results["runs"])),
        scores_table(results["runs"]),
    ]
    beside = _beside_the_study(runs, study)
    figures = _figures(runs, study, beside)
    for name, figure in figures.items():
        plots.save(figure, parts["plots"], name)
    for table in [*tables, *run_tables]:
        for name, words in table.files().items():
            atomic_write(parts["tables"] / name, words)
    for run, result in zip(runs, results["runs"], strict=True):
        atomic_write(parts["runs"] / result["page"], page.run_page(title, run, result))
    atomic_write(folder / "results.json", json.dumps(results) + "\n")
    atomic_write(folder / "results.md", to_markdown(results, tables, run_tables, limits))
    index = page.index_page(
        title, runs, results, tables, study.groups, list(figures), beside, limits
    )
    atomic_write(folder / "index.html", index)


def _beside_the_study(runs: Sequence[RunFolder], study: Study) -> dict[str, list[Series]]:
    """Label -> the rates of its runs, of the first cells that stand beside the study's."""
    compared = {row["cell"] for t in study.tables if t.name == "published" for row in t.rows}
    cells = [group for group in study.groups if group.label in compared]
    return {
        group.label: [page.backdoor_series(run) for run in runs if run.name in group.names]
        for group in cells[: len(plots.SERIES)]
    }


def _figures(
    runs: Sequence[RunFolder], study: Study, beside: Mapping[str, Sequence[Series]]
) -> dict[str, Figure]:
    """Name -> figure, of those that have something to show."""
    figures = {}
    if panels := _panels(runs, study.groups):
        figures["curves"] = plots.curves_figure(panels)
    labels = {group.key: group.label for group in study.groups}
    means = [
        (labels[result.cell.key], result.triggered)
        for result in study.cells
        if result.triggered is not None and result.cell.role in ("removal", "probe")
    ]
    if any(mean.seeds > 1 for _, mean in means):
        figures["cells"] = plots.cells_figure(means)
    if beside:
        figures["published"] = plots.published_figure(CURVES, beside)
    if study.pareto:
        figures["pareto"] = plots.pareto_figure(study.pareto, study.capability)
    return figures


def _panels(runs: Sequence[RunFolder], grouped: Sequence[CellGroup]) -> list[plots.Panel]:
    """A panel a run, or a cell where runs are many."""
    measured = [run for run in runs if any(points for _, points in page.backdoor_series(run))]
    if len(measured) <= MAX_RUN_PANELS:
        groups = [(text.one_line(run.name), [run]) for run in measured]
    else:
        groups = [
            (cell.label, [run for run in measured if run.name in cell.names]) for cell in grouped
        ]
    return [
        plots.Panel(
            label,
            [page.backdoor_series(run) for run in members],
            max(page.axis_end(run) for run in members),
            sorted({step for run in members for step in page.spike_steps(run)}),
        )
        for label, members in groups[: plots.MAX_PANELS]
        if members
    ]


def to_markdown(
    results: Mapping[str, Any],
    tables: Sequence[Table],
    run_tables: Sequence[Table],
    limits: Thresholds,
) -> str:
    """results.md: the sentence, the runs with the reason for each verdict, the study's tables, the
    thresholds."""
    runs, scores = run_tables
    reasons = [
        f"- {text.markdown(run['name'])}: "
        + text.markdown("; ".join([run["verdict"]["text"], *run["verdict"]["reasons"]]))
        for run in results["runs"]
    ]
    problems = [f"- {text.markdown(problem)}" for problem in all_problems(results)]
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
        "## Thresholds\n\n"
        + "\n".join(
            f"- `--{name}={value}`: {text.markdown(meaning)}"
            for name, value, meaning in definitions(limits)
        ),
        f"## {scores.title}\n\n{scores.markdown()}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
