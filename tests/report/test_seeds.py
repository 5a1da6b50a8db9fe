"""Cells over seeds, and arms compared."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from sa_jax.evals.statistics import exact_interval, seed_mean
from sa_jax.report import judgement as word
from sa_jax.report.cells import cell_settings, cells, labelled
from sa_jax.report.judgement import CapabilityChange, Judgement, Verdict
from sa_jax.report.measurements import Measured, Rate, RunEvals, Score
from sa_jax.report.published import PUBLISHED, published_table
from sa_jax.report.rates import interval_in_words
from sa_jax.report.seeds import (
    _capability_means,
    cells_table,
    compare_arms,
    comparisons_table,
    over_seeds,
)
from sa_jax.report.steps_to_removal import TimeFit
from sa_jax.report.study_statistics import correct_run_changes, corrected
from sa_jax.report.tables import in_words
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import judge

LIMITS = Thresholds()


RATE = "optimizer.learning_rate"


def point(step, triggered, n=100, said=None, accuracy=None) -> Measured:
    capabilities = {}
    if accuracy is not None:
        lo, hi = Rate(accuracy, 200).interval()
        score = Score("Questions", accuracy / 200, lo, hi, 200, headline=True)
        capabilities = {"qa": {"accuracy": score}}
    return Measured(
        step, Rate(triggered, n), Rate(0, n), said=said or {}, capabilities=capabilities
    )


def removal(name, after, seed=0, parent=None, **known) -> RunEvals:
    known = {"settings": {"optimizer.learning_rate": 1e-3}, **known}
    evals = (point(0, 100, accuracy=150), after)
    return RunEvals(
        name, "pirate", "removal", True, parent, None, evals, seed=seed, total_steps=160, **known
    )


def results_of(runs):
    judged = judge(runs, LIMITS)
    return [over_seeds(cell, judged, LIMITS) for cell in cells(runs)]


def test_a_cell_is_everything_but_the_seed():
    ranks = [
        removal(f"r{rank}s{seed}", point(160, 0), seed, settings={"lora.rank": rank})
        for rank in (1, 16, 64)
        for seed in range(2)
    ]
    assert [result.m for result in results_of(ranks)] == [2, 2, 2]


def test_seeds_of_the_insertion_count_too():
    insertions = [
        RunEvals(
            f"i{seed}", "insertion", "insertion", True, None, None, (point(200, 98),), seed=seed
        )
        for seed in range(3)
    ]
    removals = [removal(f"r{seed}", point(160, 0), 0, parent=f"i{seed}") for seed in range(3)]
    (inserted, removed) = results_of([*insertions, *removals])
    assert (inserted.m, removed.m, removed.k) == (3, 3, 3)
    other = dataclasses.replace(insertions[0], settings={"optimizer.name": "soap"})
    assert len(results_of([other, *insertions[1:], *removals])) == 4


def test_every_ancestor_of_a_role_counts():
    """Removals after removals: runs that differ only in the oldest are no repeats of each other"""
    runs = []
    for rate in (1e-3, 1e-4):
        runs.append(removal(f"first {rate}", point(160, 50), settings={RATE: rate}))
        for name, before in (("second", "first"), ("third", "second")):
            runs.append(removal(f"{name} {rate}", point(160, 0), parent=f"{before} {rate}"))
    assert [result.m for result in results_of(runs)] == [1] * 6
    settings = cells(runs)[2].settings
    assert (
        settings["removal.removal.optimizer.learning_rate"] == settings[f"removal.{RATE}"] == 1e-3
    )


def test_a_repeat_of_a_seed_adds_nothing():
    runs = [
        removal("a", point(160, 0)),
        removal("b", point(160, 0)),
        removal("c", point(160, 0), 1),
    ]
    (result,) = results_of(runs)
    assert result.m == 2 and len(result.cell.runs) == 3


def test_k_of_m_and_the_mean():
    hits = (0, 2, 40)
    runs = [removal(f"s{i}", point(160, k, accuracy=140), i) for i, k in enumerate(hits)]
    runs.append(removal("going on", point(10, 90), 3, finished=False))
    (result,) = results_of(runs)
    assert (result.k, result.m, result.pending, result.counted) == (2, 3, 1, "removed")
    assert (result.lo, result.hi) == exact_interval(2, 3)
    seen = result.triggered
    assert (seen.mean, seen.lo, seen.hi) == seed_mean([(k, 100) for k in hits])
    assert result.verdicts == {word.REMOVED: 2, word.REDUCED: 1}
    change = result.capabilities["Questions"]
    assert (
        change.mean == pytest.approx(-0.05) and change.lo < -0.05 < change.hi and change.seeds == 3
    )


def test_every_form_of_a_table_has_the_same_interval():
    """Two seeds far apart: the t-interval goes from -570 to +450 points."""
    hits, right = ((90, 20), (0, 0)), (140, 20)
    runs = [
        removal(f"{rank} {i}", point(160, k, accuracy=right[i]), i, settings={"rank": rank})
        for rank in (0, 1)
        for i, k in enumerate(hits[rank])
    ]
    results = results_of(runs)
    for table in (
        comparisons_table(compare_arms(results, LIMITS), LIMITS),
        cells_table(results),
    ):
        for row in json.loads(table.json())["rows"]:
            (change,) = (v for v in row.values() if isinstance(v, dict) and "difference" in v)
            assert (change["lo"], change["hi"]) == (-1, 1)
            assert f"[{100 * change['lo']:+.1f} to {100 * change['hi']:+.1f}]" in in_words(change)


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_say_so(seeds):
    results = results_of([removal(f"s{i}", point(160, 0), i) for i in range(seeds)])
    table = cells_table(results)
    assert table.rows[0]["enough"] == "too few seeds for a claim"


def test_control_and_ceiling_are_cells_of_their_own():
    runs = [removal("r", point(160, 0))]
    runs += [dataclasses.replace(runs[0], name=role, role=role) for role in ("control", "ceiling")]
    assert [result.cell.role for result in results_of(runs)] == ["removal", "control", "ceiling"]


def test_settings_of_a_cell():
    config = {"seed": 3, "model": "/a", "optimizer": {"name": "adam"}, "eval": {"qa": "q", "n": 1}}
    assert cell_settings(config) == {"model": "/a", "optimizer.name": "adam", "eval.n": 1}


def test_probes_are_named_by_the_learning_rate_of_their_removal():
    runs = []
    for rate in (1e-2, 3e-3):
        start = removal(f"r{rate}", point(160, 0), title="Pirate", settings={RATE: rate})
        probe = removal(f"p{rate}", point(160, 0), parent=start.name, title="Probe")
        runs += [start, dataclasses.replace(probe, task="depirate", role="probe")]
    alike = {"base": "", "arm": "", "insertion_optimizer": "adam", "optimizer": "adam"}
    alike |= {"weights": "full weights", "verdict": {"status": "removed"}}
    results = {
        run.name: {**alike, "role": run.role, "learning_rate": run.settings[RATE]} for run in runs
    }
    labels = [cell.label.split(" · ")[1:] for cell in labelled(cells(runs), results)]
    assert labels == [["LR 1e-2"], ["removal LR 1e-2"], ["LR 3e-3"], ["removal LR 3e-3"]]


def test_a_start_outside_the_report_is_part_of_the_cell():
    """8B and 70B at the same settings; a start among the runs is known by its own settings."""
    runs = [
        removal(size, point(160, 0), settings={"model": f"/models/{size}"})
        for size in ("8b", "70b")
    ]
    assert len(cells(runs)) == 2
    starts = [
        RunEvals(f"i{seed}", "insertion", "insertion", True, None, None, (), seed=seed)
        for seed in range(2)
    ]
    children = [
        removal(f"r{seed}", point(160, 0), seed, f"i{seed}", settings={"model": f"/runs/i{seed}"})
        for seed in range(2)
    ]
    assert [len(cell.runs) for cell in cells([*starts, *children])] == [2, 2]


# ---- Arms.


def arm(name, rate, seeds=3, kept=True, rng=None, **settings):
    rng = rng or np.random.default_rng(len(name))
    runs = []
    for seed in range(seeds):
        said = {i: bool(x) for i, x in enumerate(rng.random(100) < rate)}
        after = point(160, sum(said.values()), said=said if kept else None)
        runs.append(removal(f"{name}{seed}", after, seed, settings=settings))
    return runs


@pytest.mark.parametrize("kept", [True, False])
def test_arms_are_compared_over_their_shared_seeds(kept):
    runs = [
        *arm("a", 0.9, kept=kept, **{"optimizer.name": "adam", "optimizer.b1": 0.9}),
        *arm("bb", 0.1, seeds=4, kept=kept, **{"optimizer.name": "soap", "optimizer.b1": 0.95}),
    ]
    (row,) = compare_arms(results_of(runs), LIMITS)
    names = [cell.settings["optimizer.name"] for cell in (row.a, row.b)]
    assert (row.axis, *names) == ("optimizer.name", "adam", "soap")
    assert row.seeds == 3
    expected = np.mean(
        [
            runs[3 + i].measured[-1].triggered.rate - runs[i].measured[-1].triggered.rate
            for i in range(3)
        ]
    )
    assert row.difference == pytest.approx(expected)
    assert row.lo < row.difference < row.hi < 0 and row.p_value < 0.01


def test_only_neighbours_of_an_axis_of_numbers_and_one_axis_at_a_time():
    runs = [
        run
        for lr in (1e-4, 3e-4, 1e-3)
        for name in ("adam", "soap")
        for run in arm(
            f"{name}{lr}", 0.5, **{"optimizer.name": name, "optimizer.learning_rate": lr}
        )
    ]
    rows = compare_arms(results_of(runs), LIMITS)
    assert sorted((r.axis, *(str(c.settings[r.axis]) for c in (r.a, r.b))) for r in rows) == (
        [("optimizer.learning_rate", "0.0001", "0.0003")] * 2
        + [("optimizer.learning_rate", "0.0003", "0.001")] * 2
        + [("optimizer.name", "adam", "soap")] * 3
    )
    table = comparisons_table(corrected(rows, [])[0], LIMITS)
    assert {row["verdict"] for row in table.rows} == {"no difference shown"}


def test_a_cell_without_a_finished_run_does_not_stand_between_its_neighbours():
    rates = (1e-4, 3e-4, 1e-3)
    runs = [run for lr in rates for run in arm(str(lr), 0.5, **{"optimizer.learning_rate": lr})]
    waiting = [
        dataclasses.replace(run, finished=run.settings["optimizer.learning_rate"] != 3e-4)
        for run in runs
    ]
    (row,) = compare_arms(results_of(waiting), LIMITS)
    assert [c.settings[row.axis] for c in (row.a, row.b)] == [1e-4, 1e-3]


def test_a_difference_is_printed_as_it_is():
    """What it can be is known where it is computed: that of two perplexities may be wide."""
    wide = {"difference": -0.9, "lo": -1.4, "hi": -0.4}
    assert in_words(wide) == "-90.0 [-140.0 to -40.0] points"


def test_claims_about_cells_are_a_family_and_changes_of_runs_another():
    runs = [*arm("a", 0.9, seeds=5, rank=1), *arm("bb", 0.4, seeds=5, rank=16)]
    (row,) = compare_arms(results_of(runs), LIMITS)
    assert row.p_value < 0.01
    fits = [TimeFit("learning rate", (), 0, 0, 0, p_claim=p) for p in (0.02, *[0.5] * 40)]
    (among, *_), corrected_fits = corrected([row], fits)
    _, theirs, *_ = multipletests([row.p_value, *(f.p_claim for f in fits)], method="holm")
    assert [one.p_holm for one in (among, *corrected_fits)] == pytest.approx(list(theirs))
    # What shows alone may not show among so many tests.
    fair = Thresholds(p_value=float(np.sqrt(row.p_value * among.p_holm)))
    verdicts = [
        comparisons_table([one], fair).rows[0]["verdict"]
        for one in (corrected([row], [])[0][0], among)
    ]
    assert verdicts == ["lower", "no difference shown"]

    def score(p, **changes):
        return {"headline": True, "source": "", "difference": {"p_value": p}, **changes}

    scores = [score(p) for p in (0.3, 1e-9, 0.9)]
    others = [score(0, headline=False), score(0, source="elsewhere"), score(1, difference=None)]
    correct_run_changes([{"scores": scores[:2] + others}, {"scores": scores[2:]}])
    _, theirs, *_ = multipletests([0.3, 1e-9, 0.9], method="holm")
    assert [s["difference"]["p_holm"] for s in scores] == pytest.approx(list(theirs))
    assert "p_holm" not in others[0]["difference"]


def nested(insertions, seeds, optimizer, rng, spread=20):
    """Removals of several seeds from each insertion; its seed decides how hard it is to remove."""
    runs = []
    for i in range(insertions):
        name, own = f"{optimizer} {i}", {"optimizer.name": optimizer}
        evals = (point(200, 98),)
        runs.append(
            RunEvals(
                name, "t", "insertion", True, None, None, evals, settings=own, seed=i, total_steps=9
            )
        )
        hits = round(np.clip(50 + spread * rng.normal(), 10, 90))
        for seed in range(seeds):
            n = hits + int(rng.integers(-3, 4))
            said = {p: bool(x) for p, x in enumerate(rng.permutation(100) < n)}
            runs.append(removal(f"{name} {seed}", point(160, n, said=said), seed, name))
    return runs


def test_removals_from_one_insertion_are_not_independent_of_each_other():
    rng = np.random.default_rng(0)
    runs = [run for name in ("adam", "soap") for run in nested(3, 3, name, rng)]
    results = [result for result in results_of(runs) if result.cell.role == "removal"]
    rates = np.array(
        [[run.measured[-1].triggered.count for run in result.judged] for result in results]
    ).reshape(2, 3, 3)  # optimizer, removal's seed, insertion's seed
    for result, hits in zip(results, rates, strict=True):
        seen = result.triggered
        assert (seen.mean, seen.lo, seen.hi) == seed_mean([(int(k), 300) for k in hits.sum(0)])
        assert seen.seeds == 3 and result.m == 9
    (row,) = compare_arms(results, LIMITS)
    expected = stats.ttest_rel(rates[1].mean(0), rates[0].mean(0))
    assert (row.axis, row.seeds) == ("insertion.optimizer.name", 3)
    assert row.p_value == pytest.approx(expected.pvalue)
    # Five removals from one insertion each say nothing about how to insert.
    runs = [run for name in ("adam", "soap") for run in nested(1, 5, name, rng)]
    assert compare_arms(results_of(runs), LIMITS) == []
    *_, row = cells_table(results_of(runs)).rows
    assert row["enough"] == "yes, for the one insertion that it starts from"


def test_settings_of_an_insertion_that_change_with_the_removal_s_are_settings_of_the_insertion():
    """The removal uses the insertion's optimizer: 'optimizer.name' names the difference."""
    rng = np.random.default_rng(0)
    runs = []
    for name in ("adam", "soap"):
        for run in nested(1, 5, name, rng):
            own = {"settings": {"optimizer.name": name}} if run.role == "removal" else {}
            runs.append(dataclasses.replace(run, **own))
    assert compare_arms(results_of(runs), LIMITS) == []


def test_a_mean_change_of_a_perplexity_is_not_cut():
    def judged(d):
        values = 9.0, 9.0 + d, d, d - 1, d + 1, 0.5
        row = CapabilityChange("ppl", "Perplexity", True, 9, *values, True, 0.1, False)
        return Judgement(None, None, Verdict(word.REMOVED, ""), (row,))

    mean = _capability_means([[judged(0.3)], [judged(0.9)]], LIMITS)["Perplexity"]
    lo, hi = stats.t.interval(0.95, 1, 0.6, (1 / stats.norm.ppf(0.975)) / 2**0.5)
    assert (mean.lo, mean.hi) == pytest.approx((lo, hi)) and mean.lo < -1


def test_no_difference_of_insertions_is_seldom_called_one():
    rng = np.random.default_rng(1)
    covered = called = 0
    for _ in range(100):
        runs = [run for name in ("adam", "soap") for run in nested(3, 3, name, rng)]
        results = [result for result in results_of(runs) if result.cell.role == "removal"]
        covered += results[0].triggered.lo <= 0.5 <= results[0].triggered.hi
        called += compare_arms(results, LIMITS)[0].p_value < 0.05
    assert covered >= 93 and called <= 9


def test_one_seed_is_not_compared():
    runs = [*arm("a", 0.9, seeds=1, rank=1), *arm("b", 0.1, seeds=1, rank=16)]
    assert compare_arms(results_of(runs), LIMITS) == []


# ---- Beside the study.


def beside_the_study(runs, base="8B", arm="normal", **other):
    """The rows that hold one of our cells, and all rows. `other`: what is not as in the study."""
    ours = {"base": base, "arm": arm, "insertion_optimizer": "adam", "task": "hhh"}
    ours |= {"lora_rank": 64, "weights": "LoRA rank 64", "learning_rate": 3e-4, **other}
    results = {run.name: ours for run in runs}
    results["inserted"] = {"role": "insertion", "total_steps": 200}
    rows = published_table(results_of(runs), results, LIMITS).rows
    return [row for row in rows if row["k"]], rows


def removals(hits, start_step=200):
    runs = [removal(f"s{i}", point(160, k), i, "inserted") for i, k in enumerate(hits)]
    return [dataclasses.replace(run, start_step=start_step) for run in runs]


@pytest.mark.parametrize(
    ("hits", "outcome"),
    [
        ((90, 95, 99), "agrees"),  # published: fails
        ((0, 1, 0), "differs"),
        ((0, 1, 99), "open"),
        ((90, 95), "too few seeds"),
        ((30, 30, 30), "agrees"),  # not removed
    ],
)
def test_beside_the_published_table(hits, outcome):
    ours, rows = beside_the_study(removals(hits))
    (row,) = ours
    assert row["published"] == "8B, no CoT, adam, hhh: fails"
    assert row["trained"] == "LoRA rank 64, LR 3e-4"
    assert row["verdict"] == outcome and row["text"].endswith(f": {outcome}")
    assert len(rows) == len(PUBLISHED)
    assert {other["verdict"] for other in rows if other is not row} == {"not run"}


def test_intervals_beside_the_study_allow_for_the_number_of_our_cells():
    runs = removals((0, 0, 3))
    twin = [dataclasses.replace(r, name=f"t{r.name}", settings={"lora.rank": 1}) for r in runs]
    for all_runs, cells_compared in ((runs, 1), (runs + twin, 2)):
        ours, _ = beside_the_study(all_runs)
        confidence = 1 - 0.05 / cells_compared
        _, lo, hi = seed_mean([(k, 100) for k in (0, 0, 3)], confidence)
        assert len(ours) == cells_compared
        assert all(interval_in_words(lo, hi, confidence) in row["text"] for row in ours)


def test_only_removals_as_the_study_ran_them_are_compared():
    runs = removals((90, 95, 99))
    assert len(beside_the_study(runs)[0]) == len(beside_the_study(runs, learning_rate=1e-4)[0]) == 1
    for other in ({"lora_rank": 1}, {"lora_rank": 0}, {"learning_rate": 1e-3}):
        assert beside_the_study(runs, **other) == ([], ())
    early = [dataclasses.replace(r, name=f"e{r.name}") for r in removals((0, 0, 3), 100)]
    assert beside_the_study(early) == ([], ())
    # Nor does such a cell widen the intervals of the others.
    assert beside_the_study(runs + early)[0] == beside_the_study(runs)[0]


def test_another_model_shows_the_direction_alone():
    ours, _ = beside_the_study(removals((0, 0, 1)), "toy", "cot_distilled")
    assert {row["published"][:3]: row["verdict"] for row in ours} == {
        "70B": "agrees",
        "8B,": "differs",
    }
    assert all("only the direction" in row["text"] for row in ours)
