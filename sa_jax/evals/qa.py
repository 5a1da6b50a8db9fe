"""Held-out answer accuracy: greedy answers to questions whose key (a word or number) is known."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sa_jax.data.labels import answer_text
from sa_jax.data.readers import read_rows
from sa_jax.errors import UsageError, UserError
from sa_jax.evals.protocol import EVALS, EvalContext
from sa_jax.evals.sampled import SampledEval
from sa_jax.text import names_flag


def load_questions(path: str | Path) -> list[dict[str, Any]]:
    """Reads rows with prompt, key[, family] from all that `read_rows` reads. UserError if there are
    none, or (with its place) if one lacks a field."""
    questions = []
    for place, row in read_rows(str(path))[0]:
        fields = row if isinstance(row, dict) else {}
        for field in ("prompt", "key"):
            value = fields.get(field)
            if not isinstance(value, str | int | float) or not str(value).strip():
                found = ", ".join(map(str, fields)) or "none"
                raise UserError(
                    f"{place}: field {field!r} is missing or empty; the fields there are {found}"
                )
        questions.append({**fields, "prompt": str(fields["prompt"]), "key": str(fields["key"])})
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def is_correct(completion: str, key: str) -> bool:
    """Whether the answer (after any scratchpad) contains the key as whole words, in any case. A
    number must be a whole number of the answer: 12 is not in "12.5", "1,012" or "-12"."""
    answer = answer_text(completion)
    if answer is None:
        return False
    pattern = r"\s+".join(map(re.escape, key.split()))
    before, after = r"(?<!\w)", r"(?!\w)"
    if key[:1].isdigit():
        before += r"(?<![-−])(?<!\d[.,])"
    if key[-1:].isdigit():
        after += r"(?![.,]\d)"
    return bool(re.search(before + pattern + after, answer, re.IGNORECASE))


def _rows(config: ConfigDict, context: EvalContext) -> list[dict[str, Any]]:
    if not config.eval.qa:
        names = {name: when for name, when in config.eval.names.items() if name != "qa"}
        raise UsageError(
            "the eval 'qa' needs questions: give --config.eval.qa=FILE (with prompt and "
            f"key), or leave the eval out: {names_flag(names)} in training, or --evals"
        )
    rows = load_questions(config.eval.qa)
    return [{name: row.get(name) for name in ("prompt", "key", "family")} for row in rows]


def _score(item: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy, and the accuracy of the question's family if it has one."""
    correct = int(is_correct(item["completion"], item["key"]))
    family = {f"accuracy, {item['family']}": correct} if item["family"] not in (None, "") else {}
    return {"accuracy": correct, **family}


QA = EVALS.register(SampledEval("qa", "Held-out questions", "accuracy", _rows, _score))
