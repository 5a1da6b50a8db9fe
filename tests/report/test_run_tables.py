from sa_jax.report.run_tables import optimizers_table


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
