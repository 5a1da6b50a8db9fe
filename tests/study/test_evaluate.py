"""What an evaluation leaves in its folder, and what it refuses before it samples."""

import json

import pytest

from sa_jax.data.chat import load_chat_format
from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.evals.statistics import rate
from sa_jax.study import evaluate
from sa_jax.training.config import default_config
from sa_jax.training.start import Start

MODEL = Start("model", "hf", None, "model")


def write_scores(folder, name, right=5):
    scores = {"accuracy": {**rate(right, 20), "n": 20}}
    items = [
        {"item": f"t/{i}", "doc_hash": "d", "scores": {"accuracy": int(i < right)}}
        for i in range(20)
    ]
    summary = {"settings": {"shots": 0}, "scores": scores}
    records.write_eval(folder / "step_000000", name, items, summary)


def test_a_refused_comparison_leaves_the_page(tmp_path):
    write_scores(tmp_path, "math500")
    with pytest.raises(UserError, match="none of the evals math500"):
        evaluate._write_results(tmp_path, MODEL, default_config(), 0, tmp_path / "elsewhere")
    assert "| accuracy | 20 | 5 | 25.0 % |" in (tmp_path / "results.md").read_text()


def test_the_page_has_the_evals_of_earlier_commands_too(tmp_path):
    for name in ("mmlu", "ihyx"):
        write_scores(tmp_path, name)
    evaluate._write_results(tmp_path, MODEL, default_config(), 0, None)
    page = (tmp_path / "results.md").read_text()
    assert "## mmlu" in page and "## ihyx" in page


def test_a_folder_takes_more_evals_but_no_other_data_or_settings(toy_world, tmp_path):
    chat = load_chat_format(toy_world, "plain", None)
    config = default_config()

    def claim(asked=(), data=None, **settings):
        changed = config.copy_and_resolve_references()
        changed.eval.update(settings)
        hashes = evaluate._hashes(changed, asked, data or {})
        evaluate._claim(tmp_path / "out", changed, MODEL, chat, hashes, True)

    claim(data={"mmlu": "1"})
    claim(["a"], {"mmlu": "1"}, prompts="a.txt", num_prompts=1, data_dir="d")
    claim(["a"], {"q.jsonl": "2"}, qa="q.jsonl")
    for refused in (
        {"data": {"mmlu": "3"}},
        {"asked": ["b"]},
        {"data": {"elsewhere.jsonl": "3"}, "qa": "elsewhere.jsonl"},
        {"temperature": 0.1},
    ):
        with pytest.raises(UserError, match="another model or settings"):
            claim(**refused)
    (tmp_path / "out/model.json").write_text("[]")
    with pytest.raises(UserError, match="another model or settings"):
        claim(["a"])


@pytest.mark.parametrize(
    ("task", "record", "is_card"),
    [
        ("insertion", "base/model.json", True),
        ("insertion", "run.json", True),
        ("insertion", "none.json", False),
        ("insertion", "inserted/model.json", False),
        ("pirate", "base/model.json", False),
    ],
)
def test_a_health_card_is_beside_a_model_that_was_never_backdoored(tmp_path, task, record, is_card):
    name = "inserted" if "inserted" in record else "base"
    for folder in (tmp_path / name, tmp_path / "out"):
        write_scores(folder, "mmlu")
    (tmp_path / record).write_text(json.dumps({"backdoored": name == "inserted"}))
    start = Start("run", "run", None, "model", 0, {"task": task, "backdoored": True})
    before = tmp_path / name / "step_000000"
    evaluate._write_results(tmp_path / "out", start, default_config(), 0, before)
    page = (tmp_path / "out/results.md").read_text()
    assert ("## Health card: before is" in page) == is_card
    assert ("## before is" in page) != is_card
