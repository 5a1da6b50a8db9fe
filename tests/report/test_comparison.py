from sa_jax.report.comparison import compare_optimizers


def run(optimizer, rate, loss, task="insertion"):
    name = f"{optimizer}_{rate}"
    return {
        "name": name,
        "task": task,
        "optimizer": optimizer,
        "learning_rate": rate,
        "final_loss": loss,
    }


def test_the_lowest_loss_of_each_optimizer_is_marked_and_an_edge_is_said():
    rows = compare_optimizers(
        [
            run("soap", 1e-3, 0.5),
            run("adam", 1e-2, 0.9),
            run("adam", 1e-3, 0.8),
            run("adam", 3e-3, 0.7),
            run("soap", 3e-3, 0.6),
            run("soap", 1e-2, None),
            run("adam", 1e-4, 0.1, task="hhh"),
        ]
    )
    assert [(row["name"], row["best"]) for row in rows] == [
        ("adam_0.001", ""),
        ("adam_0.003", "best"),
        ("adam_0.01", ""),
        ("soap_0.001", "best, at the grid's edge"),
        ("soap_0.003", ""),
    ]


def test_one_insertion_has_nothing_to_be_compared_with():
    assert compare_optimizers([run("adam", 1e-3, 0.5), run("adam", 1e-3, 0.4, task="hhh")]) == []
