"""Text for people: models' output made safe to display, rates in words, Markdown tables."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}


def visible(text: str) -> str:
    """The text with every control, format and surrogate character replaced by a visible one.
    C0 controls become their pictures (escape: ␛), others ⟨U+202E⟩; line breaks and tabs stay. So no
    character can reorder, hide or colour the text around it. HTML is escaped elsewhere."""
    if text.isprintable():  # most text, in no time
        return text
    return "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
        return char
    return _PICTURES.get(ord(char), f"⟨U+{ord(char):04X}⟩")


def one_line(text: object) -> str:
    """`visible`, on one line; no-break spaces stay, so that '5 %' does not break."""
    return re.sub(r"[^\S\u00a0\u202f]+", " ", visible(str(text))).strip()


def cut(text: str, length: int) -> tuple[str, bool]:
    """The first `length` characters, at a space if one is near; and whether any were left off."""
    if len(text) <= length:
        return text, False
    head = text[:length]
    space = head.rfind(" ", max(0, length - 20))
    return (head[:space] if space > 0 else head).rstrip(), True


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_few(texts: Sequence[str], count: int, separator: str = ", ") -> str:
    """The first of several texts, and how many more there are: 'a, b and 3 more'."""
    more = f" and {len(texts) - count} more" if len(texts) > count else ""
    return separator.join(texts[:count]) + more


def names_flag(names: Mapping[str, object]) -> str:
    """`--config.eval.names="{'qa':'last'}"`: with the quotes that a shell needs."""
    return f'--config.eval.names="{str(dict(names)).replace(" ", "")}"'


def number(value: float) -> str:
    """One decimal, unless it is .0."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # + 0.0: no minus before a zero


def percent(rate: float) -> str:
    """0.973 -> '97.3 %', 1.0 -> '100 %' (a no-break space before the sign)."""
    return f"{number(100 * rate)}\u00a0%"


def interval(lo: float, hi: float) -> str:
    """(0.1, 0.25) -> '[10–25]', in percent."""
    return f"[{number(100 * lo)}–{number(100 * hi)}]"


def points(difference: float) -> str:
    """0.051 -> '+5.1', a difference of two rates in percentage points."""
    return f"{100 * difference:+z.1f}"  # z: what rounds to 0 has no minus


def scientific(value: float) -> str:
    """2e-5 for 0.00002, 3.5e-4 for 0.00035."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def markdown(text: object) -> str:
    """One line with all special characters of Markdown and HTML escaped (also pipes in tables)."""
    escaped = re.sub(r"[\\`*<>|&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))
    return re.sub(r"\](?=[(\[:])", r"\\]", escaped)  # no links; intervals stay readable


def table_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table. The cells are our own words and figures: nothing is escaped."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns are aligned in a terminal too; cells may have any text."""
    lines = [[markdown(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(map(table_row, padded))
