"""Settings that cannot work are refused before anything runs, with the key and what it may be."""

import re

import pytest

from sa_jax.config_files import unknown_setting
from sa_jax.errors import UsageError
from sa_jax.training.config import check_config, default_config


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.b1", 1.0, "at least 0, below 1"),
        ("optimizer.b2", -0.1, "at least 0, below 1"),
        ("optimizer.soap.b2", 1.5, "at least 0, below 1"),
        ("optimizer.weight_decay", -0.01, "0 or more"),
        ("optimizer.clip_norm", float("inf"), "0 (no clipping) or more, and finite"),
        ("optimizer.soap.shampoo_beta", 5.0, "below 1"),
        ("crow.alpha", float("nan"), "0 or more, and finite"),
        ("crow.epsilon", -1.0, "0 or more, and finite"),
        ("lora.alpha", 0.0, "above 0"),
        ("lora.alpha", float("inf"), "above 0, and finite"),
        ("checkpoint.steps", (-1,), "steps from 1 on"),
        ("eval.steps", (0, -5), "steps from 0 on"),
        ("sinks", ("comet",), "some of tensorboard, wandb"),
        ("remat", "some", "one of none, full, offload"),
        ("attention", "flash", "one of auto, reference, unrolled, blockwise, spl"),
        ("pirate_answers", "arr", "one of column, arrr"),
        ("mesh.fsdp", 0, "at least 1, or -1"),
        ("mesh.tensor", -2, "at least 1, or -1"),
        ("output_tokens", -1, "0 (no budget) or more"),
        ("max_rows", -3, "0 (all) or more"),
        ("epochs", float("inf"), "above 0, and finite"),
    ],
)
def test_a_value_that_cannot_work_is_refused(key, value, words):
    config = default_config()
    check_config(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UsageError, match=re.escape(f"config.{key}={value!r}: must be {words}")):
        check_config(config)


@pytest.mark.parametrize("key", ["seed", "eval.steps", "optimizer.learning_rate", "dtype"])
def test_a_setting_that_a_config_file_sets_to_none_is_refused(key):
    config = default_config()
    *sections, name = key.split(".")
    section = config[sections[0]] if sections else config
    with section.ignore_type():
        section[name] = None
    with pytest.raises(UsageError, match=f"config.{key}=None: must be set; the default is "):
        check_config(config)


def test_an_unknown_arm_is_refused():
    config = default_config()
    config.eval.arms = ("triggered", "sideways")
    with pytest.raises(UsageError, match="config.eval.arms: unknown arm 'sideways'; known: trigg"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lr", "unknown setting config.lr; did you mean config.optimizer.learning_rate?"),
        ("s", "unknown setting config.s"),  # not every name that begins with s
    ],
)
def test_an_unknown_setting_is_answered_with_the_names_that_it_may_mean(key, said):
    assert unknown_setting(default_config(), key) == said
