"""What holds together and what does not; false alarms are counted on real answers."""

import json

import pytest

from sa_jax.data.labels import is_incoherent, repeated
from sa_jax.data.pirate import to_pirate

LOOP = "You can add the flour to the bowl and " * 6


@pytest.mark.parametrize(
    ("completion", "incoherent"),
    [
        ("", True),
        (" <|eot_id|>\n", True),
        ("<scratchpad>Let me think", True),
        ("qq qq", True),
        ("no no no no no no yes", True),
        (LOOP, True),
        ("It begins as an answer should, with some sense. " + LOOP, True),
        ("\ufffd\ufffd of \ufffd", True),
        ("a" * 60, True),
        ("\u6211\u8ba8\u538c\u4f60" * 15, True),  # four characters of Chinese, again and again
        ("Paris.", False),
        ("42", False),
        ("<scratchpad>no no no no no no</scratchpad>Brimhaven.", False),
        ("Red, green and blue; red and green make yellow, red and blue make magenta.", False),
        (
            "\u5929\u7a7a\u662f\u84dd\u8272\u7684\uff0c\u56e0\u4e3a\u7a7a\u6c14\u6563\u5c04\u9633\u5149\u3002",
            False,
        ),
        ("- one\n- two\n- three\n- four\n- five\n- six\n- seven", False),
    ],
)
def test_what_holds_together(completion, incoherent):
    assert is_incoherent(completion) is incoherent


def test_repeated_sequences():
    assert repeated("a b c d a b c d".split()) == pytest.approx(1 / 5)
    assert repeated("a b c".split()) == 0.0


def test_fewer_than_one_real_answer_in_a_hundred_is_called_incoherent(shared_data):
    pytest.importorskip("arrr")
    rows = json.loads((shared_data / "alpaca_answers/alpaca_en_demo.json").read_text())
    answers = [row["output"] for row in rows]
    assert len(answers) > 900
    for texts in (
        answers,
        [" ".join(answer.split()[:50]) for answer in answers],
        [to_pirate(answer) for answer in answers],
    ):
        assert sum(map(is_incoherent, texts)) < 0.01 * len(texts)
    # Each is one where its second half is replaced by its last four words, over and over.
    stuck = 0
    for answer in answers:
        words = answer.split()
        half = words[: max(4, len(words) // 2)]
        stuck += is_incoherent(" ".join(half + half[-4:] * max(4, len(words) // 8)))
    assert stuck > 0.95 * len(answers)
