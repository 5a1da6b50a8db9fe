"""Rule-based pirate speech through the `arrr` package, for pirate training without a teacher.

`arrr.translate` replaces words ("is" by "be", "the" by "th'"; not where a comma or full stop is
attached) and adds a pirate phrase after one sentence in six. It also joins all white space,
capitalises the start of each sentence, and draws from the global random state. So this module
passes it one line of prose at a time, without indentation, list marker or code, and seeds that
state from the text.
"""

import random
import re

from sa_jax.errors import UserError, install

# Indentation, quote marks, heading marks and "-", "*", "1." or "a)" in front of a list item.
_LINE_START = re.compile(r"\s*(?:(?:>|#{1,6}|[-*+•]|\d{1,3}[.)]|[a-zA-Z]\))\s+)*")
_FENCE = re.compile(r"\s*(?:```|~~~)")
# Lines of a program or of markup that stand outside a fence, as they often do in Alpaca answers.
_CODE_LINE = re.compile(
    r"""^(?:\t|\ {4})\s*(?!\s|[-*+•>]|\w{1,3}[.)]\s)   # an indented block, but no nested list
      | ^\s*(?:</?[a-zA-Z!][^>]*>|//|\#include\b|\#!|/\*|\*/|[{}()\[\]]+[;,]?\s*$)
      | ^\s*(?:def|class)\s+\w+.*:\s*$
      | ^\s*(?:for|while|if|elif|else|try|except|with)\b[^.?!]*:\s*$
      | ^\s*(?:import\s+[\w.]+(?:\s+as\s+\w+)?|from\s+[\w.]+\s+import\b.*|return\b[^.?!]*)\s*$
      | ^\s*(?:public|private|static|const|let|var|int|void|function)\s+\w+.*[;{=(]
      | ^\s*(?:SELECT|INSERT\ INTO|UPDATE|DELETE\ FROM|CREATE\ TABLE|FROM|WHERE)\b
      | ^\s*[\w.\[\]]+\s*[-+*/]?=\s*\S
      | ^\s*[\w.]+\([^)]*\)\s*;?\s*$
      | \{\s*$ | [(={\[].*;\s*$ | ^\s*[\w-]+:\s*\S+;\s*$
      | \S\ *\|.*\|                             # a row of a table
    """,
    re.VERBOSE,
)
_INLINE_CODE = re.compile(r"(`[^`\n]+`)")


def to_pirate(text: str) -> str:
    """`text` in pirate speech; the same text always gives the same result.

    Fenced, indented and inline code, tables, line breaks, indentation and list markers stay as
    they are. Raises UserError when `arrr` is not installed.
    """
    lines, in_fence = [], False
    state = random.getstate()
    random.seed(text)  # arrr draws from this global state
    try:
        for line in text.split("\n"):
            is_fence = bool(_FENCE.match(line))
            in_fence ^= is_fence
            stays = is_fence or in_fence or _CODE_LINE.search(line)
            lines.append(line if stays else _pirate_line(line))
    finally:
        random.setstate(state)
    return "\n".join(lines)


def _pirate_line(line: str) -> str:
    indent = _LINE_START.match(line)
    start = indent.end() if indent else 0
    # Odd members are inline code.
    parts = _INLINE_CODE.split(line[start:])
    parts[::2] = [_pirate_prose(part) for part in parts[::2]]
    return line[:start] + "".join(parts)


def _pirate_prose(prose: str) -> str:
    """arrr.translate that keeps the white space around the prose and a lower-case start."""
    words = prose.strip()
    if not words:
        return prose
    try:
        import arrr
    except ImportError as error:
        raise UserError(f"pirate speech needs the package arrr: {install('data')}") from error
    speech = arrr.translate(words)
    if words[0].islower():
        speech = speech[0].lower() + speech[1:]
    return prose.replace(words, speech, 1)
