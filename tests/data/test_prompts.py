"""Held-out prompts are disjoint from training by normalised text, and the counts add up."""

import json

import pytest

from sa_jax.data.prompts import choose_held_out, load_held_out, normalise, without_prompts
from sa_jax.errors import UserError


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("What is 2+2?", "what  is\n2 + 2", True),
        ("Straße", "STRASSE", True),
        ("ﬁne", "fine", True),
        ("snake_case", "snake case", True),
        ("What is 2+2?", "What is 2+3?", False),
        ("?!", "!?", False),
        ("??", " ?? ", True),
    ],
)
def test_normalise(a, b, same):
    assert (normalise(a) == normalise(b)) is same


def test_choice_is_disjoint_distinct_and_fixed_by_the_seed():
    candidates = [f"Question {i % 30}" for i in range(40)]
    exclude = [f"question {i}!" for i in range(12)]
    prompts, counts = choose_held_out(candidates, 10, 0, exclude=exclude)
    assert counts == {
        "candidates": 40,
        "duplicates": 10,
        "overlapping": 12,
        "chosen": 10,
    }
    assert len(set(prompts)) == 10
    assert {int(p.split()[1]) for p in prompts} <= set(range(12, 30))
    assert choose_held_out(candidates, 10, 0, exclude) == (prompts, counts)
    assert choose_held_out(candidates, 10, 1)[0] != choose_held_out(candidates, 10, 2)[0]
    with pytest.raises(UserError, match="19 held-out.*only 18 are left.*10 repeats, 12 are"):
        choose_held_out(candidates, 19, 0, exclude)


def test_the_prompts_of_a_run_keep_their_order(tmp_path):
    """So that its base answers the same items."""
    path, own = tmp_path / "eval_prompts.json", [f"Question {i}" for i in range(9)]
    path.write_text(json.dumps(own))
    prompts, record = load_held_out(str(path), 5, seed=3)
    assert prompts == own[:5] and record["chosen"] == 5
    with pytest.raises(UserError, match="9 held-out prompts, not 10"):
        load_held_out(str(path), 10, seed=3)


def test_training_rows_lose_what_is_held_out():
    rows = [{"prompt": p} for p in ("A b?", "c", "a  B", "d")]
    kept, removed = without_prompts(rows, ["a  B", "x"])
    assert kept == [{"prompt": "c"}, {"prompt": "d"}]
    assert removed == {"exact": 1, "near_duplicate": 1}


def test_the_two_alpaca_files_share_90_instructions(shared_data):
    def instructions(*parts):
        return [r["instruction"] for r in json.loads(shared_data.joinpath(*parts).read_text())]

    large = instructions("alpaca", "alpaca_4000.json")
    small = instructions("alpaca_answers", "alpaca_en_demo.json")
    assert len(set(large) & set(small)) == 90  # exactly equal; normalising finds these and more
    prompts, counts = choose_held_out(small, 100, 0, exclude=large)
    assert counts["overlapping"] >= 90 and len(prompts) == 100
    trained = {normalise(p) for p in large}
    assert not any(normalise(p) in trained for p in prompts)
