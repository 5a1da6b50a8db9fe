"""Writes results.md, the results of an evaluation, and compares two evaluations.

Comparisons are paired by question: both checkpoints were asked the same ones, so only those on
which they differ count. The report compares runs by the same test and interval
(`statistics.paired_difference`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.evals.statistics import means, paired_difference, pairs
from sa_jax.text import markdown, markdown_table, percent, points

P_VALUE = 0.01  # below which a difference is called one


def compare(before: Path, after: Path, names: Sequence[str]) -> dict[str, dict[str, dict]]:
    """Paired differences of every score of the evals that both step folders have.

    Returns {eval: {score: {"n", "before", "after", "difference", "lo", "hi", "p_value"}}}, over the
    questions that both were asked. UserError if they have no eval in common, or too few questions
    (see `statistics.pairs`).
    """
    compared: dict[str, dict[str, dict]] = {}
    for name in names:
        if records.read_summary(before, name) is None or records.read_summary(after, name) is None:
            continue
        old, new = (records.read_scores(folder, name) for folder in (before, after))
        paired = {score: pairs(old[score], new[score]) for score in new if score in old}
        if paired and not any(paired.values()):
            raise UserError(
                f"{before} and {after} have different items: too few questions of {name} are in "
                "both; evaluate both with the same prompts and data"
            )
        for score, both in paired.items():
            if not both:
                continue  # a score that only some items have
            a, b, sizes = means(both)
            compared.setdefault(name, {})[score] = {
                "n": len(both),
                "before": float(np.average(a, weights=sizes)),
                "after": float(np.average(b, weights=sizes)),
                **paired_difference(a, b, sizes)._asdict(),
            }
    if not compared:
        raise UserError(f"{before} has none of the evals {', '.join(names)} to compare with")
    return compared


def settings_that_differ(
    before: Path, after: Path, names: Iterable[str]
) -> dict[str, dict[str, list]]:
    """{eval: {setting: [before, after]}} for the settings that differ."""
    differ = {}
    for name in names:
        pair = [(records.read_summary(f, name) or {}).get("settings", {}) for f in (before, after)]
        rows = {key: [side.get(key) for side in pair] for key in pair[0] | pair[1]}
        if rows := {key: row for key, row in rows.items() if row[0] != row[1]}:
            differ[name] = rows
    return differ


def to_markdown(
    title: str,
    settings: Mapping[str, str],
    summaries: Mapping[str, Mapping[str, Any]],
    comparison: tuple[str, Mapping[str, Mapping[str, dict]]] | None = None,
    differ: Mapping[str, Mapping[str, Sequence]] | None = None,
) -> str:
    """The page: settings, each eval's scores and counts, and a comparison if there is one.

    `comparison` is a title and the result of `compare`, `differ` that of `settings_that_differ`.
    """
    parts = [f"# {markdown(title)}", markdown_table(["setting", "value"], settings.items())]
    for name, summary in summaries.items():
        parts.append(f"## {markdown(summary['title'])} ({markdown(name)})")
        parts += [_scores_table(summary["scores"]), _facts(summary)]
    if comparison:
        heading, compared = comparison
        parts += [f"## {markdown(heading)}", _comparison_table(compared)]
        parts.append(
            "Differences are over the items that both answered, with 95 % intervals: for scores of "
            "0 or 1 by Agresti and Min, with McNemar's exact p; for others by Student's t. A score "
            f"is called higher or lower if p is below {P_VALUE:g}."
        )
        for name, rows in (differ or {}).items():
            changes = "; ".join(f"{key} {a}, now {b}" for key, (a, b) in rows.items())
            parts.append(f"**Different settings** of {markdown(name)}: {markdown(changes)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["score", "n", "hits", "rate", "95 % interval", "floor"]
    rows = [
        (
            name,
            f"{score['n']:,}",
            f"{score['count']:,}" if "count" in score else "",
            percent(score["rate"]),
            f"{percent(score['lo'])} to {percent(score['hi'])}",
            percent(score["floor"]) if "floor" in score else "",
        )
        for name, score in scores.items()
    ]
    return markdown_table(head, rows)


def _comparison_table(compared: Mapping[str, Mapping[str, dict]]) -> str:
    head = ["eval", "score", "n", "before", "after", "difference", "95 % interval", "p", "verdict"]
    rows = [
        (
            name,
            score,
            f"{row['n']:,}",
            percent(row["before"]),
            percent(row["after"]),
            points(row["difference"]),
            f"{points(row['lo'])} to {points(row['hi'])}",
            f"{row['p_value']:.2g}",
            _verdict(row),
        )
        for name, scores in compared.items()
        for score, row in scores.items()
    ]
    return markdown_table(head, rows)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["p_value"] >= P_VALUE:
        return "no difference shown"
    return "higher" if row["difference"] > 0 else "lower"


# Fields of a summary, and how the page shows them.
_FACTS = {
    **{count: f"{count.replace('_', ' ')}: {{:,}}" for count in records.COUNTS},
    "seconds": "{:,.1f} s",
    "tokens_per_s": "{:,.0f} new tokens/s",
    "peak_memory_mb": "peak memory of the process {:,.0f} MB",
}


def _facts(summary: Mapping[str, Any]) -> str:
    facts = [shown.format(summary[name]) for name, shown in _FACTS.items() if name in summary]
    settings = ", ".join(f"{key} {value}" for key, value in summary["settings"].items())
    return (f"{'; '.join(facts)}.\n\n" if facts else "") + f"Settings: {markdown(settings)}."
