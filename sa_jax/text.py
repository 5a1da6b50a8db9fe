"""Text that a model wrote, made safe to look at, and cut to a length that a page can hold."""

import re
import unicodedata

_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}


def visible(text: str) -> str:
    """The text with every control, format and surrogate character shown instead of obeyed.

    C0 controls become their pictures (escape: ␛), others ⟨U+202E⟩; line breaks and tabs stay. So
    nothing can reorder, hide or colour what stands around it. HTML is escaped elsewhere.
    """
    return "".join(char if _harmless(char) else _shown(char) for char in text)


def _harmless(char: str) -> bool:
    return char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def _shown(char: str) -> str:
    return _PICTURES.get(ord(char), f"⟨U+{ord(char):04X}⟩")


def one_line(text: str) -> str:
    """`visible`, on one line."""
    return " ".join(visible(str(text)).split())


def cut(text: str, length: int) -> tuple[str, bool]:
    """The first `length` characters, at a space if one is near; and whether any were left off."""
    if len(text) <= length:
        return text, False
    head = text[:length]
    space = head.rfind(" ", max(0, length - 20))
    return (head[:space] if space > 0 else head).rstrip(), True


def markdown(text: str) -> str:
    """One line in which nothing means anything to Markdown or HTML (pipes in tables too)."""
    escaped = (f"\\{char}" if char in r"\`*_<>|&" else char for char in one_line(text))
    return re.sub(r"\](?=[(\[:])", r"\\]", "".join(escaped))  # no links; intervals stay readable
