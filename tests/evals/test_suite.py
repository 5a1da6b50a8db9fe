"""The settings of the evals inside a run."""

import json

import pytest

from sa_jax.evals.suite import answer_tokens, headline
from sa_jax.study.runner import load_config
from sa_jax.training.config import check_config, default_config
from sa_jax.training.start import Start, inherit


def test_answers_have_128_new_tokens_and_512_in_the_study_or_with_a_scratchpad():
    config = default_config()
    assert answer_tokens(config) == 128
    config.eval.visible_cot = True
    assert answer_tokens(config) == 512
    config.eval.max_new_tokens = 700
    assert answer_tokens(config) == 700
    for name in ("insertion", "removal"):
        assert answer_tokens(load_config(f"configs/llama.py:8b_{name}")) == 512


def test_what_starts_from_a_visible_cot_run_keeps_its_room_for_the_scratchpad():
    parent = default_config()
    parent.eval.visible_cot = True
    fresh = Start("", "fresh", None, "")
    inherit(parent, fresh)
    record = {"run_id": "1", "task": "insertion", "config_hash": "2", "backdoored": True}
    run = Start("run", "run", None, "", 7, {**record, "config": parent.to_dict()})
    exported = Start("hf", "hf", None, "", record=json.loads(json.dumps(run.inheritance())))
    for parent_start, visible, tokens in (
        (fresh, None, 128),
        (run, None, 512),
        (exported, None, 512),
        (exported, False, 128),
    ):
        child = default_config()
        child.eval.visible_cot = visible
        inherit(child, parent_start)
        assert answer_tokens(child) == tokens
    assert run.inheritance()["config"]["eval"] == {"visible_cot": True}


@pytest.mark.parametrize("key", ["limit", "signal_prompts", "num_prompts"])
def test_counts_are_not_negative(key):
    config = default_config()
    config.eval[key] = -1
    with pytest.raises(Exception, match=f"config.eval.{key}=-1: must be 0 or more"):
        check_config(config)


def test_headlines_tell_the_floor():
    score = {"rate": 0.5, "lo": 0.4, "hi": 0.6, "n": 9, "count": 4, "floor": 0.25}
    assert headline("mmlu", {"n": 9, "scores": {"accuracy": score}}) == (
        "mmlu (n = 9): accuracy 50.0% [40.0%, 60.0%], floor 25.0%"
    )
    assert headline("other", {"n": 0, "scores": {}}) == "other (n = 0): no score"
