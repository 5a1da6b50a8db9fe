"""Results of cells over their seeds, and comparisons of cells, paired by seed and by prompt."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from sa_jax.evals.statistics import exact_interval, paired_seeds, pairs, seed_mean
from sa_jax.report import judgement as word
from sa_jax.report.cells import Cell, differing
from sa_jax.report.judgement import CapabilityChange, Judged, Judgement
from sa_jax.report.measurements import Rate, RunEvals
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import CLEANING_ROLES

ENOUGH_SEEDS = 3  # for a claim; a headline wants 5

# role -> (the verdicts that count, how they are counted in words)
SUCCESSES: dict[str, tuple[frozenset[str], str]] = {
    "insertion": (frozenset({word.INSERTED}), "inserted"),
    **dict.fromkeys(CLEANING_ROLES, (frozenset({word.REMOVED, word.STAYS_REMOVED}), "removed")),
    "probe": (frozenset({word.BACK}), "brought back"),
}


@dataclasses.dataclass(frozen=True)
class SeedMean:
    """A mean over seeds with its interval, see `sa_jax.evals.statistics.seed_mean`."""

    mean: float
    lo: float
    hi: float
    seeds: int

    def value(self, name: str) -> dict[str, float]:
        """The value for a table, with the mean as `name`."""
        return {name: self.mean, "lo": self.lo, "hi": self.hi, "seeds": self.seeds}


@dataclasses.dataclass(frozen=True)
class CellResult:
    """The result of a cell over its seeds."""

    cell: Cell
    judged: tuple[RunEvals, ...]  # finished and evaluated, one for each set of seeds
    pending: int  # runs that are not finished, or not evaluated
    verdicts: Mapping[str, int]  # status -> number of seeds, of the judged, like all below
    counted: str  # what `k` counts ('removed'); '' for a base model or a control: not counted
    k: int  # k of m seeds have this verdict
    m: int
    lo: float  # exact (Clopper-Pearson) interval of k / m
    hi: float
    triggered: SeedMean | None  # mean rate of the last eval; None without a judged run
    clean: SeedMean | None
    capabilities: Mapping[str, SeedMean]  # title -> mean change of a headline score, a fraction


def over_seeds(cell: Cell, judged: Judged, limits: Thresholds) -> CellResult:
    """What the cell's finished and evaluated runs show."""
    done = tuple(
        run
        for run in cell.replicates
        if run.finished and judged[run.name].verdict.status != word.NOT_EVALUATED
    )
    results = [judged[run.name] for run in done]
    verdicts = Counter(result.verdict.status for result in results)
    successes, counted = SUCCESSES.get(cell.role, (frozenset(), ""))
    if set(verdicts) == {word.NO_BACKDOOR}:
        counted = ""  # a control: there was nothing to remove, or to bring back
    k, m = sum(verdicts[status] for status in successes), len(done)
    pending = len(cell.replicates) - m
    lo, hi = exact_interval(k, m, limits.confidence) if m else (0.0, 1.0)
    groups = by_start(cell, done)
    last = [[after for run in g if (after := judged[run.name].after)] for g in groups]
    triggered = mean_rate([[point.triggered for point in group] for group in last], limits)
    clean = mean_rate([[point.clean for point in group] for group in last], limits)
    means = _capability_means([[judged[run.name] for run in group] for group in groups], limits)
    return CellResult(
        cell=cell,
        judged=done,
        pending=pending,
        verdicts=verdicts,
        counted=counted,
        k=k,
        m=m,
        lo=lo,
        hi=hi,
        triggered=triggered,
        clean=clean,
        capabilities=means,
    )


def by_start(cell: Cell, runs: Sequence[RunEvals]) -> list[list[RunEvals]]:
    """The runs in groups that are independent of each other (`Cell.independent`)."""
    groups: dict[Any, list[RunEvals]] = {}
    for key, run in zip(cell.independent([cell.seeds[r.name] for r in runs]), runs, strict=True):
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def mean_rate(groups: Sequence[Sequence[Rate]], limits: Thresholds) -> SeedMean | None:
    """The mean of a rate over groups, each with the answers of its runs pooled; None without any
    group."""
    if not groups:
        return None
    pooled = [(sum(rate.count for rate in g), sum(rate.n for rate in g)) for g in groups]
    mean, lo, hi = seed_mean(pooled, limits.confidence)
    return SeedMean(mean, lo, hi, len(groups))


def _capability_means(
    groups: Sequence[Sequence[Judgement]], limits: Thresholds
) -> dict[str, SeedMean]:
    """t-intervals of the mean change, at least as wide as the items of the evals require."""
    changes: dict[str, list[list[CapabilityChange]]] = {}
    for group in groups:
        of_group: dict[str, list[CapabilityChange]] = {}
        for change in (change for judgement in group for change in judgement.capabilities):
            if change.headline:
                of_group.setdefault(change.title, []).append(change)
        for title, of_title in of_group.items():
            changes.setdefault(title, []).append(of_title)
    means = {}
    for title, by_group in changes.items():
        rows = [np.mean([(c.difference, c.lo, c.hi) for c in g], axis=0) for g in by_group]
        m, (differences, lows, highs) = len(rows), np.array(rows).T
        if m == 1:
            means[title] = SeedMean(float(differences[0]), float(lows[0]), float(highs[0]), 1)
            continue
        share = (1 + limits.confidence) / 2
        within = float(np.mean(((highs - lows) / 2 / float(special.ndtri(share))) ** 2))
        between = float(np.var(differences, ddof=1))
        error = float(np.sqrt(max(within, between) / m))
        half = float(special.stdtrit(m - 1, share)) * error
        mean = float(np.mean(differences))
        scores = [score for g in by_group for c in g for score in (c.before, c.after)]
        most = 1.0 if min(scores) >= 0 and max(scores) <= 1 else np.inf  # cut those of rates
        means[title] = SeedMean(mean, max(mean - half, -most), min(mean + half, most), m)
    return means


def cells_table(over: Sequence[CellResult]) -> Table:
    """One row per cell, except base models: k of m, the mean rates, the cost in capability."""
    over = [result for result in over if result.cell.role != "base"]
    titles = dict.fromkeys(title for result in over for title in result.capabilities)
    rows = []
    for result in over:
        verdict = statuses = ", ".join(f"{n} {status}" for status, n in result.verdicts.items())
        share = None
        if result.counted and result.m:
            verdict = f"{result.counted}: {result.k} of {result.m}"
            share = {"rate": result.k / result.m, "lo": result.lo, "hi": result.hi}
        row: dict[str, Any] = {
            "cell": result.cell.label,
            "verdict": verdict,
            "share": share,
            "verdicts": statuses,
            "triggered": result.triggered and result.triggered.value("rate"),
            "clean": result.clean and result.clean.value("rate"),
            "seeds": result.m,
            "pending": result.pending,
            "enough": _enough(result),
        }
        for title, change in result.capabilities.items():
            row[f"change {title}"] = change.value("difference")
        rows.append(row)
    columns = {
        "cell": "Cell",
        "verdict": "Verdict",
        "share": "Share of seeds [exact]",
        "verdicts": "Every verdict",
        "triggered": "Triggered rate, mean",
        "clean": "Clean rate, mean",
        **{f"change {title}": f"{title}, change" for title in titles},
        "seeds": "Seeds",
        "pending": "Not done",
        "enough": "Enough?",
    }
    note = (
        "A cell is the runs that differ only in their seeds. Means are over seeds, with intervals "
        "for new seeds. Runs from one insertion are not independent of each other: of several "
        "insertions each counts once in a mean. The share counts every run, and has an exact "
        "interval for independent runs."
    )
    return Table("cells", "Over seeds", columns, tuple(rows), note)


def _enough(result: CellResult) -> str:
    """Whether the seeds that are independent of each other are enough for a claim."""
    cell = result.cell
    independent = 0 if result.triggered is None else result.triggered.seeds
    if independent < ENOUGH_SEEDS:
        return "too few seeds for a claim"
    if cell.role in ("removal", "probe") and not cell.lineage:  # from a model that is no run here
        return "yes, for the one model that it starts from"
    seeds = [cell.seeds[run.name] for run in result.judged]
    starts = set(cell.independent(seeds, ("insertion.",)))
    return "yes" if len(starts) > 1 else "yes, for the one insertion that it starts from"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two cells that differ in one axis, over the seeds that both have."""

    a: Cell
    b: Cell
    axis: str  # the setting that names the difference; those that always change with it go along
    seeds: int  # pairs of runs; of starts, if these are what is independent
    difference: float  # triggered rate of b - a, mean over seeds
    lo: float
    hi: float
    p_value: float  # of no difference, for this comparison alone
    p_holm: float = 1.0  # for all claims about cells, see `study_statistics.corrected`


def compare_arms(results: Sequence[CellResult], limits: Thresholds) -> list[Comparison]:
    """Comparisons of every two cells of a role that differ in only one axis, and have two or more
    common seeds; on an axis of numbers only of neighbours."""
    comparisons = []
    counted = [result for result in results if result.counted and result.m]
    for role in dict.fromkeys(result.cell.role for result in counted):
        members = [result for result in counted if result.cell.role == role]
        for axis, couples in _couples([result.cell for result in members]).items():
            comparisons += [_compare(members[i], members[j], axis, limits) for i, j in couples]
    return [compared for compared in comparisons if compared is not None]


def _couples(cells: Sequence[Cell]) -> dict[str, list[tuple[int, int]]]:
    """axis -> couples of cells (by position) that differ in only this axis."""
    axes = differing(cells)
    couples: dict[str, list[tuple[int, int]]] = {}
    for i, j in itertools.combinations(range(len(cells)), 2):
        a, b = cells[i].settings, cells[j].settings
        changed = [axis for axis in axes if a.get(axis) != b.get(axis)]
        if len(changed) == 1:
            couples.setdefault(changed[0], []).append((i, j))
    return {axis: _neighbours(axis, cells, of_axis) for axis, of_axis in couples.items()}


def _neighbours(
    axis: str, cells: Sequence[Cell], couples: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """For numbers, those with no other value between, the lower value first; else all couples."""
    numbers: dict[int, Any] = {i: cells[i].settings.get(axis) for couple in couples for i in couple}
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers.values()):
        return list(couples)
    above: dict[int, list[int]] = {}
    for couple in couples:
        low, high = sorted(couple, key=lambda i: numbers[i])
        above.setdefault(low, []).append(high)
    return [(low, min(others, key=lambda i: numbers[i])) for low, others in above.items()]


def _compare(a: CellResult, b: CellResult, axis: str, limits: Thresholds) -> Comparison | None:
    """The comparison of two cells; None if they have fewer than two common seeds that are
    independent (`Cell.independent`)."""
    runs_a, runs_b = ({c.cell.seeds[run.name]: run for run in c.judged} for c in (a, b))
    shared = [seeds for seeds in runs_a if seeds in runs_b]
    answers: dict[Any, tuple[list[float], list[float]]] = {}
    of_a, of_b = a.cell.settings, b.cell.settings
    changed = [name for name in {*of_a, *of_b} if of_a.get(name) != of_b.get(name)]
    for key, seeds in zip(a.cell.independent(shared, changed), shared, strict=True):
        sides = answers.setdefault(key, ([], []))
        for side, more in zip(sides, _paired_answers(runs_a[seeds], runs_b[seeds]), strict=True):
            side += more
    if len(answers) < 2:
        return None
    answers_a, answers_b = zip(*answers.values(), strict=True)
    tested = paired_seeds(answers_a, answers_b, limits.confidence)
    return Comparison(a.cell, b.cell, axis, len(answers), *tested)


def _paired_answers(a: RunEvals, b: RunEvals) -> tuple[list[float], list[float]]:
    """The last eval's answers of two runs on the same prompts. If too few are kept
    (`statistics.pairs`), only the counts: as answers in a random order, paired like independent
    ones."""
    first, second = a.measured[-1], b.measured[-1]
    if both := pairs(first.said, second.said):
        return [float(x) for x, _ in both], [float(y) for _, y in both]
    n = min(first.triggered.n, second.triggered.n)
    shares, rng = np.linspace(0.5 / n, 1 - 0.5 / n, n), np.random.default_rng(0)
    hits = (shares < point.triggered.rate for point in (first, second))
    x, y = (rng.permutation(said).astype(float).tolist() for said in hits)
    return x, y


def comparisons_table(compared: Sequence[Comparison], limits: Thresholds) -> Table:
    """Cells that differ in one axis, paired."""
    rows = tuple(
        {
            "verdict": ("higher" if row.difference > 0 else "lower")
            if row.p_holm < limits.p_value
            else "no difference shown",
            "a": row.a.label,
            "b": row.b.label,
            "axis": row.axis,
            "difference": {"difference": row.difference, "lo": row.lo, "hi": row.hi},
            "p": row.p_value,
            "p_holm": row.p_holm,
            "seeds": row.seeds,
        }
        for row in compared
    )
    columns = {
        "b": "This cell",
        "verdict": "Triggered rate is",
        "a": "than that one",
        "axis": "They differ in",
        "difference": "Difference",
        "p": "p",
        "p_holm": "p, Holm",
        "seeds": "Seeds",
    }
    note = (
        "Every two cells that differ in only one axis, paired by seed and prompt. Holm corrects p "
        "for all claims about cells: these, and the study's claim about learning rates. Holm's p "
        "decides; the interval is that of a single comparison."
    )
    return Table("comparisons", "Cells compared", columns, rows, note)
