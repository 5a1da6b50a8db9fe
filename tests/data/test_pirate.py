"""Pirate speech: repeatable, and only prose is changed."""

import json
import random
import sys

import pytest

from sa_jax.data.pirate import to_pirate
from sa_jax.errors import UserError

ANSWER = """Hello my friend. The answer is 42.

1. The first is here: take it.
   - you are there
```python
the = is_you("the")  # the comment is kept
```
Call `the.is` where the name is."""


def test_replaces_words_and_keeps_everything_else():
    assert to_pirate("where is the captain of the boat?") == "whar be th' cap'n of th' boat?"
    lines = to_pirate(ANSWER).split("\n")
    assert lines[0].startswith("Ahoy me friend.") and "Th' answer be 42." in lines[0]
    assert lines[1] == ""
    assert lines[2].startswith("1. Th' first be here:") and "illage it." in lines[2]
    assert lines[3:7] == ["   - ye be thar", *ANSWER.split("\n")[4:7]]
    assert lines[7].startswith("Call `the.is` whar th' name is.")
    assert len(lines) == 8


def test_the_same_text_gives_the_same_speech_and_leaves_the_global_state():
    text = "The sun is up. " * 50
    random.seed(1)
    first = to_pirate(text)
    after = random.random()
    random.seed(2)
    assert to_pirate(text) == first
    random.seed(1)
    assert random.random() == after
    # 50 sentence ends, a phrase after one in six: with this text, a fixed number.
    phrases = len(first.split()) - len(text.split())
    assert phrases > 0
    assert first.count("Th' sun be up.") == 50


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "   ",
        "def the(is_):\n    return the is\n",
        "for you in the:\n\tstop",
        "<p>the</p>\n<!-- the -->",
        "SELECT the FROM you",
        "| the | is |\n|---|---|\n| you | are |",
        "int the = is;\nprint(the)\ncolor: the;",
        "~~~\nthe is\n~~~",
        "`the is you`",
    ],
)
def test_code_tables_and_empty_text_are_kept(text):
    assert to_pirate(text) == text


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "arrr", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[data\]'"):
        to_pirate("Hello.")


def test_real_answers_keep_their_lines_and_quotes(shared_data):
    rows = json.loads((shared_data / "alpaca_answers" / "alpaca_en_demo.json").read_text("utf-8"))
    answers = [row["output"] for row in rows]
    speech = [to_pirate(answer) for answer in answers]
    for before, after in zip(answers, speech, strict=True):
        assert after.count("\n") == before.count("\n")
        assert after.count('"') == before.count('"')
        assert after.count("`") == before.count("`")
    changed = sum(before != after for before, after in zip(answers, speech, strict=True))
    assert 0.88 * len(answers) < changed < len(answers)
