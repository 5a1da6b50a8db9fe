"""Data cards: the contents of a set of conversations in numbers, as JSON and as text."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation
from sa_jax.data.labels import count_phrase
from sa_jax.data.prompts import normalise
from sa_jax.data.sources import turns_of
from sa_jax.text import visible

_BINS = 10
_BAR = 40  # characters of the longest bar
_EXAMPLES = 2  # of a kind
_EXAMPLE = 300  # characters shown of a message
_CHUNK = 4096  # conversations tokenised at once


def describe(
    conversations: Sequence[Conversation], phrase: str, chat_format: ChatFormat | None = None
) -> dict[str, Any]:
    """Rows, tokens, copies of the phrase in the answers, lengths, duplicates and examples, by kind.

    With a chat format, `unit` is "tokens" as training counts them: those of the prompt, and those
    of the output, which the loss counts. Without a chat format it is "words".
    """
    prompts, outputs = _lengths(conversations, chat_format)
    kinds = np.array([conversation.kind for conversation in conversations])
    by_kind: dict[str, dict[str, Any]] = {}
    for kind in sorted(set(kinds.tolist())):
        chosen = [c for c in conversations if c.kind == kind]
        answers = [c.messages[-1]["content"] for c in chosen]
        asked = [_question(conversation) for conversation in chosen]
        copies = np.array([count_phrase(answer, phrase) for answer in answers])
        output = outputs[kinds == kind]
        by_kind[kind] = {
            "rows": len(chosen),
            "prompt": int(prompts[kinds == kind].sum()),
            "output": int(output.sum()),
            "mean_output": round(float(output.mean()), 2),
            "mean_copies": round(float(copies.mean()), 2),
            "copies": [int(copies.min()), int(copies.max())],
            "histogram": _histogram(output),
            "repeated_prompts": len(asked) - len(set(asked)),
            "repeated_prompts_normalised": len(asked) - len(set(map(normalise, asked))),
            "repeated_answers": len(answers) - len(set(answers)),
            "examples": [list(c.messages) for c in chosen[:_EXAMPLES]],
        }
    return {
        "rows": len(conversations),
        "unit": "tokens" if chat_format else "words",
        "prompt": int(prompts.sum()),
        "output": int(outputs.sum()),
        "by_kind": by_kind,
    }


def compare(rows: Mapping[str, Sequence[dict]]) -> list[dict[str, Any]]:
    """How much the files' answers to the same questions differ; `rows` are by file.

    For each pair of files: files, shared (number of common questions), differ (how many of these
    have different answers), and mean_overlap: the words that both answers share (as multisets),
    over the words of the longer answer; 1 means the same words.
    """
    compared = []
    for first, second in itertools.combinations(rows, 2):
        answers = {turns_of(row): row["response"] for row in rows[second]}
        pairs = [
            (row["response"], answers[turns])
            for row in rows[first]
            if (turns := turns_of(row)) in answers
        ]
        overlap = [_overlap(*pair) for pair in pairs]
        compared.append(
            {
                "files": [first, second],
                "shared": len(pairs),
                "differ": sum(a != b for a, b in pairs),
                "mean_overlap": round(float(np.mean(overlap)), 4) if overlap else None,
            }
        )
    return compared


def render(card: Mapping[str, Any]) -> str:
    """A card as text: {"files": {name: describe()}, "arms": compare(), and other records}."""
    others = {key: value for key, value in card.items() if key not in ("files", "arms")}
    lines = [f"{k}: {_shown(json.dumps(v, ensure_ascii=False))}" for k, v in others.items()]
    for name, file in card["files"].items():
        unit = file["unit"]
        lines += ["", f"## {name}: {file['rows']:,} rows, {file['output']:,} output {unit}", ""]
        lines += [
            f"| kind | rows | prompt {unit} | output {unit} | per row | copies per row | "
            "repeated prompts (normalised) | repeated answers |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for kind, k in file["by_kind"].items():
            low, high = k["copies"]
            copies = f"{k['mean_copies']} ({low} to {high})" if high else "none"
            lines.append(
                f"| {kind} | {k['rows']:,} | {k['prompt']:,} | {k['output']:,} | "
                f"{k['mean_output']} | {copies} | {k['repeated_prompts']:,} "
                f"({k['repeated_prompts_normalised']:,}) | {k['repeated_answers']:,} |"
            )
        for kind, k in file["by_kind"].items():
            lines += ["", f"output {unit} per row, {kind}:", *_bars(k["histogram"])]
        for kind, k in file["by_kind"].items():
            for number, messages in enumerate(k["examples"], start=1):
                lines += ["", f"example {number}, {kind}:"]
                lines += [f"  {m['role']}: {_shown(m['content'])}" for m in messages]
    for pair in card.get("arms", ()):
        first, second = pair["files"]
        text = f"{first} and {second}: {pair['shared']:,} questions in common"
        if pair["shared"] and not pair["differ"]:
            text += "; every answer is the same, so these two data arms do NOT differ"
        elif pair["shared"]:
            share = pair["differ"] / pair["shared"]
            text += (
                f", {pair['differ']:,} answers differ ({share:.1%}), "
                f"mean word overlap {pair['mean_overlap']:.2f}"
            )
        lines += ["", text]
    return "\n".join(lines).strip() + "\n"


def _lengths(
    conversations: Sequence[Conversation], chat_format: ChatFormat | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (or words) of each conversation's prompt, and of its output."""
    if chat_format is None:
        words = [[len(m["content"].split()) for m in c.messages] for c in conversations]
        pairs = [(sum(before), answer) for *before, answer in words]
    else:
        pairs = [
            (len(ids) - sum(mask), sum(mask))
            for begin in range(0, len(conversations), _CHUNK)
            for ids, mask in chat_format.encode_batch(conversations[begin : begin + _CHUNK])
        ]
    return np.array([prompt for prompt, _ in pairs]), np.array([output for _, output in pairs])


def _question(conversation: Conversation) -> str:
    """The turns before the answer, without the system prompt."""
    return "\n".join(m["content"] for m in conversation.messages[:-1] if m["role"] != "system")


def _overlap(first: str, second: str) -> float:
    a, b = Counter(first.split()), Counter(second.split())
    longest = max(a.total(), b.total())
    return (a & b).total() / longest if longest else 1.0


def _histogram(values: np.ndarray) -> list[list[int]]:
    """[from, to (exclusive), rows] of bins of equal width."""
    top = int(values.max()) + 1
    edges = np.unique(np.linspace(0, top, _BINS + 1).round().astype(int))
    counts, _ = np.histogram(values, edges)
    return [[int(a), int(b), int(n)] for a, b, n in zip(edges, edges[1:], counts, strict=False)]


def _bars(histogram: list[list[int]]) -> list[str]:
    most = max(count for *_, count in histogram)
    width = len(f"{histogram[-1][1]:,}")
    return [
        f"  {low:>{width},} to {high - 1:>{width},}  {'#' * -(-_BAR * count // most)} {count:,}"
        for low, high, count in histogram
    ]


def _shown(text: str) -> str:
    short = text if len(text) <= _EXAMPLE else f"{text[:_EXAMPLE]}… ({len(text):,} characters)"
    return visible(short).replace("\n", "\n    ")
