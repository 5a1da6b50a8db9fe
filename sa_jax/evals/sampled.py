"""Evals that ask a model questions and score the text of each answer."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sa_jax.data.conversations import Message, make_messages
from sa_jax.errors import UsageError, UserError
from sa_jax.evals.protocol import FLOOR_TEXT, Answers, EvalContext, Prepared, digest, summarise
from sa_jax.llama.sampler import SamplingSettings

VISIBLE_COT_TOKENS = 512  # a scratchpad comes before the answer: 128 tokens would cut it off


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation to be continued."""

    messages: list[Message]
    item: str  # its name in the record; questions of one item are asked together or not at all
    noise_id: int  # the seed of its sampling noise, below 2^32
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # more fields for its record


@dataclasses.dataclass(frozen=True)
class SampledEval:
    """An eval of single questions, each answered once; see `protocol.Eval` for its other fields."""

    name: str
    title: str
    headline: str
    # The questions, each a dict with "prompt", which is asked, and other fields for its record.
    rows: Callable[[ConfigDict, EvalContext], Sequence[Mapping[str, Any]]]
    # (row with "completion", special tokens kept) -> {score: 0/1 or a number}
    score: Callable[[dict[str, Any]], dict[str, float]]
    kind: str = "capability"
    needs_prompts: bool = False
    greedy: bool = True  # answers are the likeliest tokens, whatever `config.eval.temperature` is

    def prepare(self, config: ConfigDict, context: EvalContext) -> Prepared:
        rows = list(self.rows(config, context))[: config.eval.limit or None]
        if not rows:
            raise UsageError(f"the eval {self.name!r} has no questions")
        questions = [
            Question(
                make_messages(row["prompt"], system_prompt=config.system_prompt), str(i), i, {**row}
            )
            for i, row in enumerate(rows)
        ]
        settings = sampling_settings(config, context)
        if self.greedy:
            settings = dataclasses.replace(settings, temperature=0.0, top_p=1.0, seed=0)

        def run(params: Any, folder: Path, should_stop: Callable[[], bool]) -> Answers:
            answers, facts = ask(context, params, questions, settings, should_stop)
            items = [{**answer, "scores": self.score(answer)} for answer in answers]
            phrases = ({**answer, "completion": FLOOR_TEXT} for answer in answers)
            floors = summarise({"scores": self.score(phrase)} for phrase in phrases)
            return Answers(items, facts, {name: score["rate"] for name, score in floors.items()})

        recorded = record_settings(config, context, settings)
        return Prepared(run, recorded, {self.name: digest(rows)})


def sampling_settings(config: ConfigDict, context: EvalContext) -> SamplingSettings:
    """How answers are sampled, from `config.eval`, and what ends them."""
    settings, stops = config.eval, sorted(set(context.chat_format.stop_token_ids))
    return SamplingSettings(
        new_tokens(config), settings.temperature, settings.top_p, settings.seed, tuple(stops)
    )


def new_tokens(config: ConfigDict) -> int:
    """The maximal number of new tokens of a sampled answer."""
    least = VISIBLE_COT_TOKENS if config.eval.visible_cot else 1
    return max(least, config.eval.max_new_tokens)


def record_settings(
    config: ConfigDict, context: EvalContext, settings: SamplingSettings
) -> dict[str, Any]:
    """The settings for the record: how the questions are asked."""
    return {
        **dataclasses.asdict(settings),
        "stop_token_ids": list(settings.stop_token_ids),
        "system_prompt": config.system_prompt,
        "chat_template": context.chat_format.name,
        "context_length": context.sampler.context_length,
        "batch_size": context.sampler.batch_size,
        **context.execution,
    }


def ask(
    context: EvalContext,
    params: Any,
    questions: Sequence[Question],
    settings: SamplingSettings,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Samples one answer to every question; `settings` are of `sampling_settings`, which name what
    ends an answer.

    If a question of an item leaves no room in the context, the whole item is skipped and counted,
    so that the arms of an eval stay paired. UserError if no question fits, Preempted if should_stop
    said so.

    Returns:
      answers, one per question: "item", "asked" (a hash of the turns; the system prompt is a
      setting), its fields, "completion" (special tokens kept), "tokens" and "stop_reason"; and
      fields for the summary: "skipped_prompts" (items), "cut_by_context" (answers that the context
      ended before max_new_tokens), "tokens_per_s", "seconds".
    """
    start = time.perf_counter()
    chat, sampler = context.chat_format, context.sampler
    token_ids = [chat.prompt_ids(question.messages) for question in questions]
    fits = map(sampler.fits, token_ids)
    skipped = {q.item for q, fit in zip(questions, fits, strict=True) if not fit}
    kept = [i for i, question in enumerate(questions) if question.item not in skipped]
    if not kept:
        raise UserError(
            f"none of {len(skipped)} prompts leaves room in the context of "
            f"{sampler.context_length} tokens; raise config.eval.context_length"
        )
    completions = sampler.generate(
        params,
        [token_ids[i] for i in kept],
        [questions[i].noise_id for i in kept],
        settings,
        should_stop,
    )
    answers = [
        {
            "item": questions[i].item,
            "asked": digest([m for m in questions[i].messages if m["role"] != "system"])[:16],
            **questions[i].fields,
            "completion": chat.decode(completion.tokens),
            "tokens": completion.tokens,
            "stop_reason": completion.stop_reason,
        }
        for i, completion in zip(kept, completions, strict=True)
    ]
    facts = {
        "skipped_prompts": len(skipped),
        "cut_by_context": sum(each.is_cut_by_context(settings) for each in completions),
        "tokens_per_s": sampler.stats.tokens_per_s,
        "seconds": time.perf_counter() - start,
    }
    return answers, facts
