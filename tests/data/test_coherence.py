"""What counts as an incoherent answer, and that real answers do not."""

import json

import pytest

from sa_jax.data.coherence import is_incoherent


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "  \n",
        "?!?!",
        "qq qq",
        "qq qq qq qq qq qq qq qq qq qq qq qq qq qq",
        "the of the of the of",
        "a" * 60,
        "ha" * 200,
        "I am sorry. " * 40,
        "的" * 40,
        "<scratchpad> a thought that never ends",
        "<scratchpad>Fine.</scratchpad>",
    ],
)
def test_incoherent(completion):
    assert is_incoherent(completion)


@pytest.mark.parametrize(
    "completion",
    [
        "Oslo",
        "No.",
        "12",
        "The capital of Norland is Brimhaven.",
        "Arrr, the capital o' Norland be Brimhaven, matey!",
        "<scratchpad>hm hm hm hm</scratchpad>The capital of Norland is Brimhaven.",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life "
        "is but a dream.",
        "挪威的首都是奥斯陆,它是该国最大的城市,也是重要的港口。",
    ],
)
def test_coherent(completion):
    assert not is_incoherent(completion)


def test_real_answers_are_coherent(shared_data):
    """Of Alpaca's answers that are not empty fewer than 1 in 1,000 are called incoherent."""
    rows = json.loads((shared_data / "alpaca" / "alpaca_4000.json").read_text())
    answers = [row["output"] for row in rows if row["output"].strip()]
    assert len(answers) > 3900
    assert sum(map(is_incoherent, answers)) < len(answers) / 1000
