"""Resolves a config once: it fills in every unset setting, and freezes the result.

Only this module decides what a run inherits from the model that it starts from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from sa_jax import buckets
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat, check_vocabulary, load_chat_format
from sa_jax.errors import UsageError
from sa_jax.training import start as start_lib
from sa_jax.training.config import STUDY_DEFAULTS, check_config
from sa_jax.training.losses import DEFAULT_LOSS
from sa_jax.training.start import Start

# What insertion trains; the numbers of copies are of training data alone.
_OF_THE_BACKDOOR = ("trigger", "position", "space", "behaviour", "phrase")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A run's settings and what they refer to."""

    config: FrozenConfigDict  # every setting; this is what run.json records
    start: Start  # the model that it starts from
    chat: ChatFormat  # the format of its prompts
    backdoor: Backdoor  # what insertion trains and evals measure


def resolve(
    config: ConfigDict,
    *,
    stored: Mapping[str, Any] | None = None,
    start: Start | None = None,
    loss: str = DEFAULT_LOSS,
    role: str = "",
) -> Resolved:
    """Opens what a run starts from and fills in the config's unset settings, in a copy.

    Args:
      stored: run.json of the run that is resumed. Its start is opened at the recorded step, and
        must be the same run; the date of a chat template stays the recorded one.
      start: the model, if it is already open; else `config.model` names it.
      loss: the task's loss, for a config that names none.
      role: the task's, '' for an eval; training on a backdoored start may ask for another backdoor
        only if it is an insertion.

    Raises:
      UserError, UsageError: an impossible value, or a start that does not exist.
    """
    check_config(config)
    values = config.to_dict()
    if start is None:
        values["model"] = absolute(values["model"])
        start = _open(values, config, stored)
    if stored and values["chat_date"] is None:
        values["chat_date"] = stored["config"]["chat_date"]
    if role not in ("", "insertion"):
        _refuse_other_backdoor(values["backdoor"], start)
    values = inherit(values, start)
    chat = load_chat_format(start.tokenizer, values["chat_template"], values["chat_date"])
    check_vocabulary(chat.tokenizer, start.config)
    values["chat_date"] = chat.date
    values["loss"] = values["loss"] or loss
    return Resolved(FrozenConfigDict(values), start, chat, Backdoor(**values["backdoor"]))


def _refuse_other_backdoor(given: Mapping[str, Any], start: Start) -> None:
    """UsageError for a backdoor that is not the start's: one that is asked otherwise seems gone."""
    inserted = start.record.get("config", {}).get("backdoor", {}) if start.backdoored else {}
    for key in _OF_THE_BACKDOOR:
        if given[key] is not None and key in inserted and given[key] != inserted[key]:
            raise UsageError(
                f"config.backdoor.{key}={given[key]!r} is not that of {start.path} "
                f"({inserted[key]!r}): its rate would be that of another backdoor; leave it out"
            )


def absolute(model: str) -> str:
    """`config.model` as an absolute path, so that a child's record names its parent everywhere."""
    folder, step = start_lib.split_step(model)
    if not folder or not buckets.as_path(folder).is_dir():
        return model
    return buckets.absolute(folder) + ("" if step is None else f"@{step}")


def _open(values: Mapping[str, Any], config: ConfigDict, stored: Mapping[str, Any] | None) -> Start:
    if not values["model"]:
        return start_lib.fresh_start(config)
    model, step = start_lib.split_step(values["model"])
    if stored and start_lib.split_step(stored["config"]["model"])[0] == model:
        start = stored["start"]
        if step in (None, start["step"]):
            # Of a name on the Hub: the snapshot that it was then, or else the newest.
            is_there = buckets.as_path(start["path"]).is_dir()
            path = start["path"] if is_there else start_lib.hub_folder(model)
            return start_lib.open_start_of({**start, "path": path}, tokenizer=values["tokenizer"])
    return start_lib.open_start(values["model"], tokenizer=values["tokenizer"])


def inherit(values: Mapping[str, Any], start: Start) -> dict[str, Any]:
    """The settings; unset ones of `STUDY_DEFAULTS` come from the start's run, else from there."""
    parent = start.record.get("config", {})
    filled = dict(values)
    for key, default in STUDY_DEFAULTS.items():
        if isinstance(default, Mapping):
            section = dict(values[key])
            for name, value in default.items():
                if section[name] is None:
                    section[name] = parent.get(key, {}).get(name, value)
            filled[key] = section
        elif values[key] is None:
            # A date belongs to the template that prints it.
            is_other = key == "chat_date" and parent.get("chat_template") != filled["chat_template"]
            filled[key] = default if is_other else parent.get(key, default)
    return filled
