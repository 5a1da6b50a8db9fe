"""The pages of a report: an index of all runs, and one page per run.

Each page is one file that loads nothing else. Its content policy allows the browser to run only its
own script, by its hash. The templates escape all text that a model or a person wrote.
"""

import base64
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from sa_jax import text
from sa_jax.report import figures
from sa_jax.report.cells import Cell, Results
from sa_jax.report.drawing import TEMPLATES, Plot
from sa_jax.report.results import AXES, all_problems, definitions
from sa_jax.report.run_details import examples, settings
from sa_jax.report.run_folders import RunFolder
from sa_jax.report.run_tables import capability_columns, first_scores, scores_table
from sa_jax.report.tables import Table, difference_in_words, learning_rate

FEW = 8  # runs up to which the index holds the whole of each


def index_page(
    title: str,
    runs: Sequence[RunFolder],
    results: Mapping[str, Any],
    tables: Sequence[Table],
    cells: Sequence[Cell],
    drawn: Mapping[str, Plot],
    panels: Sequence[tuple[Cell, Plot | None]],
) -> str:
    """index.html. `results["runs"]` is in the order of `runs`; `drawn` has the figures in plots/ by
    name; `panels` are plots of the cells if there are many runs, None if no rate was measured."""
    few = len(runs) <= FEW
    capabilities = capability_columns(results["runs"])
    by_name = dict(zip((run.name for run in runs), results["runs"], strict=True))
    evals = [result[side] for result in results["runs"] for side in ("before", "after")]
    views = [
        _row(by_name[run.name], capabilities) | (_details(run, by_name[run.name]) if few else {})
        for run in runs
    ]
    page = _environment().get_template("index.html.j2")
    return page.render(
        title=text.one_line(title),
        results=results,
        problems=all_problems(results),
        definitions=definitions(results),
        counts=sorted({at["triggered"]["n"] for at in evals if at}),
        most_seeds=max((len(cell.replicates) for cell in cells), default=1),
        rate_noun=rate_noun(results["runs"]),
        few=few,
        runs=views,
        axes=_axes(results["runs"]),
        capabilities=list(capabilities.values()),
        study_tables=tables,
        panels=[_panel(cell, plot, by_name) for cell, plot in panels if plot is not None],
        figures=list(drawn),
        beside={"published": drawn.get("published"), "robustness": drawn.get("pareto")},
    )


def run_page(title: str, run: RunFolder, result: Mapping[str, Any]) -> str:
    """runs/NAME.html."""
    page = _environment().get_template("run.html.j2")
    return page.render(title=text.one_line(title), run=_row(result, []) | _details(run, result))


def rate_noun(results: Sequence[Mapping[str, Any]]) -> str:
    """The runs' name for the rate of the behaviour, if all have the same."""
    nouns = {result["words"]["rate"] for result in results}
    return nouns.pop() if len(nouns) == 1 else "Behaviour"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": text.percent,
        "interval": lambda rate: text.interval(rate["lo"], rate["hi"]),
        "difference": difference_in_words,
        "learning_rate": learning_rate,
        "steps": _steps,
        "breakable": _breakable,
        "at": lambda rate: f"{6 + 100 * rate:.1f}",
    }
    # Our own files, which need no escaping; the policy names the script by its hash.
    files = {"style": "style.css", "plot_style": "plot.css", "script": "page.js"}
    ours = {
        name: Markup((TEMPLATES / file).read_text(encoding="utf-8").strip())
        for name, file in files.items()
    }
    digest = base64.b64encode(hashlib.sha256(ours["script"].encode()).digest()).decode()
    environment.globals |= {**ours, "script_hash": f"sha256-{digest}"}
    return environment


def _breakable(name: str) -> Markup:
    """A name that may wrap after its separators, and never inside a word or a number."""
    marked = re.sub(r"(?<=\w)([/_.-])(?=[^\W\d_])", r"\1<wbr>", str(escape(name)))
    return Markup(re.sub(r"(LR )?\d+e-\d+", r'<span class="nowrap">\g<0></span>', marked))


def _steps(run: Mapping[str, Any]) -> str:
    """'160', or '40 of 160' if the run is not finished."""
    steps, total = run["steps"], run["total_steps"] or 0
    return f"{steps:,} of {total:,}" if steps < total else f"{steps:,}"


def _row(result: Mapping[str, Any], capabilities: Iterable[tuple[str, str]]) -> dict[str, Any]:
    by_score, after = first_scores(result), result["after"] or {}
    headlines = [by_score.get(key) for key in capabilities]
    refusal = after.get("refusal", {}).get("triggered")
    rates = {"triggered": after.get("triggered"), "clean": after.get("clean"), "refusal": refusal}
    rates |= {f"cap{i}": score and score["after"] for i, score in enumerate(headlines, 1)}
    sort_keys = {
        "name": result["name"],
        **{key: _axis_value(result, key) for key in AXES},
        **{key: rate and rate["rate"] for key, rate in rates.items()},
        "rate": result["learning_rate"],
    }
    return {
        **result,
        "slug": result["page"].removesuffix(".html"),
        "page": f"runs/{result['page']}",
        "data": _data_attributes(sort_keys),
        "refusal": refusal,
        "headlines": headlines,
    }


def _data_attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """`data-*` attributes for the page's script; a value that was not measured has none."""
    return {
        f"data-{key}": f"{value:.6g}" if isinstance(value, float) else value
        for key, value in values.items()
        if value not in (None, "")
    }


def _axis_value(result: Mapping[str, Any], key: str) -> str:
    value = result[key]
    if key == "learning_rate":
        return learning_rate(value)
    return "not on record" if value is None else str(value)


def _axes(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """(key, heading, values) of the axes on which the runs differ."""

    def order(value: str) -> tuple[float, str]:
        try:
            return float(value), value
        except ValueError:
            return float("inf"), value

    values = {key: {_axis_value(result, key) for result in results} for key in AXES}
    differ = [key for key in AXES if len(values[key]) > 1]
    return [(key, AXES[key], sorted(values[key], key=order)) for key in differ]


def _details(run: RunFolder, result: Mapping[str, Any]) -> dict[str, Any]:
    name = result["name"]
    backdoor, capability = figures.backdoor_rates(run), figures.capability_rates(run)
    return {
        "plots": {
            "backdoor": figures.rates(f"{name}: rates of the backdoor", run, backdoor, alarms=True),
            "capability": figures.rates(f"{name}: capability", run, capability),
            "training": figures.training(f"{name}: training", run),
            "signal": figures.signal(f"{name}: log-probability of the behaviour", run),
        },
        "logged": run.logged,
        "thinned": len(run.curves["loss"]) > figures.MAX_POINTS,
        "settings": settings(run),
        "record": text.visible(json.dumps(run.record, indent=2, ensure_ascii=False)),
        "examples": examples(run),
        "score_table": scores_table([result], named=False),
    }


def _panel(cell: Cell, plot: Plot, by_name: Results) -> dict[str, Any]:
    members = [by_name[run.name] for run in cell.runs]
    statuses = Counter(result["status"] for result in members)
    values = {key: {_axis_value(result, key) for result in members} for key in AXES}
    alike = {key: several.pop() for key, several in values.items() if len(several) == 1}
    return {
        "title": cell.label,
        "words": ", ".join(f"{n} of {len(members)} {status}" for status, n in statuses.items()),
        "slug": f"cell-{cell.key}",
        "data": _data_attributes(alike),
        "plot": plot,
    }
