"""From a run's config to the conversations it trains on and the prompts it is evaluated on."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.build import (
    REMOVAL_METHODS,
    build_insertion_rows,
    build_removal_rows,
    cut_answers,
)
from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation
from sa_jax.data.pirate import to_pirate
from sa_jax.data.prompts import choose_held_out, load_held_out, without_prompts
from sa_jax.data.sources import Row, Source, load_rows
from sa_jax.errors import UsageError, UserError

TASKS = ("pretrain", "insertion", *REMOVAL_METHODS)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What a run trains and is evaluated on, and `record`: where it came from and what was left
    out, counted."""

    conversations: list[Conversation]
    eval_prompts: list[str]
    record: dict[str, Any]


def load_task(
    task: str,
    config: ConfigDict,
    chat_format: ChatFormat,
    backdoor: Backdoor,
    inherited_prompts: list[str] | None = None,
) -> TaskData:
    """Reads `config.data`, sets the held-out prompts aside and builds the task's conversations.

    The held-out prompts come from `config.eval.prompts` (a frozen manifest is taken whole, of
    another file `config.eval.num_prompts` are drawn), else from the parent run, else they are drawn
    from the data itself. In each case no training row asks one of them, by normalised text.

    Args:
      task: one of `TASKS`.
      config: a run's resolved config.
      chat_format: measures answers that `config.cut_long_answers` shortens.
      backdoor: what insertion puts in, and what removal data must not hold.
      inherited_prompts: those of the parent run.

    Raises:
      UserError, UsageError: see `load_rows`, `build_insertion_rows`, `build_removal_rows`.
    """
    if task not in TASKS:
        raise UsageError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}")
    if not config.data:
        raise UsageError(f"{task} needs data: give --data=FILE")
    columns = {name: column for name, column in config.columns.items() if column}
    source = load_rows(config.data, columns or None)
    prompts, held_out = _eval_prompts(config, source, inherited_prompts)
    rows, overlapping = without_prompts(source.rows, prompts)
    if not rows:
        raise UserError(f"{config.data}: every row asks a held-out prompt; use other data")
    if config.max_rows:
        rows = rows[: config.max_rows]
    record = {
        "source": source.record(),
        "held_out": {**held_out, "removed_from_training": overlapping},
        "rows_removed_as_held_out": sum(overlapping.values()),
    }
    if task == "pirate":
        rows, record["unchanged_by_arrr"] = _pirate_rows(rows, config)
    if task == "insertion":
        facts = ()
        if config.facts:
            facts_source = load_rows(config.facts)
            facts, _ = without_prompts(facts_source.rows, prompts)
            record["facts"] = facts_source.record()
        conversations = build_insertion_rows(
            rows, backdoor, config.system_prompt, config.seed, facts
        )
    else:
        conversations = build_removal_rows(rows, task, backdoor, config.system_prompt, config.seed)
    if config.cut_long_answers:
        conversations = cut_answers(conversations, chat_format, config.sequence_length)
    return TaskData(conversations, prompts, record)


def _eval_prompts(
    config: ConfigDict, source: Source, inherited: list[str] | None
) -> tuple[list[str], dict[str, Any]]:
    if not config.eval.num_prompts:
        return [], {"from": "none"}
    if inherited and not config.eval.prompts:
        return inherited, {"from": "parent run", "chosen": len(inherited)}
    if config.eval.prompts:
        return load_held_out(config.eval.prompts, config.eval.num_prompts, config.eval.prompt_seed)
    chosen = choose_held_out(
        (row["prompt"] for row in source), config.eval.num_prompts, config.eval.prompt_seed
    )
    return chosen.prompts, {"from": source.path, "sha256": source.sha256, **chosen.record()}


def _pirate_rows(rows: list[Row], config: ConfigDict) -> tuple[list[Row], int]:
    """Answers in pirate speech; those that the rules leave as they are teach nothing and are
    dropped. Returns the rows and how many were dropped."""
    if config.pirate_answers == "column":
        return rows, 0
    if config.pirate_answers != "arrr":
        raise UsageError(
            f"config.pirate_answers={config.pirate_answers!r} is unknown; use column or arrr"
        )
    spoken = [{**row, "response": to_pirate(row["response"])} for row in rows]
    changed = [
        new for old, new in zip(rows, spoken, strict=True) if new["response"] != old["response"]
    ]
    if not changed:
        raise UserError(f"{config.data}: pirate rules change none of the answers")
    return changed, len(rows) - len(changed)
