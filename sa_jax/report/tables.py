"""Tables of a report, as values and in the forms Markdown, HTML, CSV, JSON and LaTeX."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from sa_jax import text
from sa_jax.training.run_record import flat_config

# TeX's own characters, and what unicode a plain pdflatex lacks.
_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "→": r"$\rightarrow$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "·": r"$\cdot$",
    "\u00a0": "~",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values under columns.

    A value is text, a number, None (not measured), a rate {"rate", "lo", "hi", "n", ...}, a
    difference {"difference", "lo", "hi", ...}, or {"before", "after"} of two of these; CSV and JSON
    keep all their numbers.
    """

    name: str  # the name of its files
    title: str
    columns: Mapping[str, str]  # key of a row's value -> its heading, in order
    rows: tuple[Mapping[str, Any], ...]
    note: str = ""  # what a reader needs to know to understand it

    def _values(self) -> list[dict[str, Any]]:
        """The rows' values under the columns, in their order."""
        return [{key: row.get(key) for key in self.columns} for row in self.rows]

    def words(self) -> list[list[str]]:
        """Every cell as text."""
        return [list(map(in_words, row.values())) for row in self._values()]

    def markdown(self) -> str:
        return text.markdown_table(list(self.columns.values()), self.words())

    def csv(self) -> str:
        """One column per number: 'triggered.rate', 'triggered.lo', ..."""
        rows = map(flat_config, self._values())
        flat = [{name: _no_formula(value) for name, value in row.items()} for row in rows]
        names = list(dict.fromkeys(name for row in flat for name in row))
        file = io.StringIO()
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return file.getvalue()

    def json(self) -> str:
        lines = ",\n".join(map(json.dumps, self._values()))
        about = json.dumps({"title": self.title, "note": self.note})
        return f'{about[:-1]}, "rows": [\n{lines}\n]}}\n'

    def latex(self) -> str:
        """A `tabular` for a paper; needs only the package booktabs."""
        cells = (self.columns.values(), *self.words())
        rows = [" & ".join(map(latex, row)) + r" \\" for row in cells]
        rows.insert(1, r"\midrule")
        begin = rf"\begin{{tabular}}{{{'l' * len(self.columns)}}}"
        lines = [f"% {text.one_line(self.title)}", begin, r"\toprule", *rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def files(self) -> dict[str, str]:
        """Name of a file -> its contents."""
        formats = {"csv": self.csv, "json": self.json, "tex": self.latex}
        return {f"{self.name}.{kind}": write() for kind, write in formats.items()}


def in_words(value: Any) -> str:
    """A value as text; '–' if nothing was measured."""
    if value is None or value == "":
        return "–"
    if isinstance(value, Mapping):
        if "after" in value:
            return f"{in_words(value['before'])} → {in_words(value['after'])}"
        if "difference" in value:
            return difference_in_words(value)
        return f"{text.percent(value['rate'])} {text.interval(value['lo'], value['hi'])}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return text.one_line(value)


def difference_in_words(value: Mapping[str, Any]) -> str:
    """'-3.0 [-8.1 to +2.1] points'."""
    difference, lo, hi = (value[name] for name in ("difference", "lo", "hi"))
    return f"{text.points(difference)} [{text.points(lo)} to {text.points(hi)}] points"


def learning_rate(value: Any) -> str:
    """2e-05 -> '2e-5'; '?' if it is not recorded."""
    return text.scientific(value) if isinstance(value, int | float) else "?"


def latex(words: str) -> str:
    """Text with all special characters of TeX escaped."""
    words = "".join(_LATEX.get(char, char) for char in text.one_line(words))
    return re.sub(r"^\[", "{[}", words)  # after \\ a bracket would be its argument


def _no_formula(value: Any) -> Any:
    """Text that a spreadsheet does not run as a formula; model and run names can be anything."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
