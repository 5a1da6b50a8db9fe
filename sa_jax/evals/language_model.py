"""A model of sa_jax for lm_eval: a `TemplateLM` over the sampler and the scorer."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sa_jax.data.conversations import Message
from sa_jax.errors import UserError
from sa_jax.evals.protocol import EvalContext, digest
from sa_jax.files import KeyedStore
from sa_jax.llama.sampler import Completion, Sampler, SamplingSettings
from sa_jax.llama.scorer import Query, Scorer

TOO_LONG = ("truncate", "skip")
DEFAULT_NEW_TOKENS = 2048  # for a task that names no limit; lm_eval's 256 cuts many a solution
OnDone = Callable[[int, Any], None]  # (place among what was asked, its answer)
_CONTEXT_STEP = 128  # tokens: the cache's capacity is a multiple, so that few programs are compiled


def open_store(path: Path) -> KeyedStore:
    """Saved scores and completions, from which a stopped eval resumes. A launch of several
    processes saves none."""
    return KeyedStore(path if jax.process_count() == 1 else None, {"value": None})


def language_model(
    context: EvalContext,
    params: Any,
    *,
    too_long: str = "truncate",
    store: KeyedStore | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Any:
    """An lm_eval model that keeps its answers in `store`; for `should_stop` see `Sampler.generate`.

    Prompts have one beginning-of-text token. A prompt that does not fit the context is skipped or
    shortened from the left (this token stays), as `too_long` (of `TOO_LONG`) says. A prompt for
    generation is shortened to half of the context, so that there is room for an answer.
    `notes[task, doc_id]` has what applies of: "truncated", "skipped", "cut_by_context",
    "stop_reason", "new_tokens".
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    saved = KeyedStore(None, {"value": None}) if store is None else store
    skipped = [(-float("inf"), False)]
    chat = context.chat_format
    backend = chat.tokenizer.backend_tokenizer
    bos = chat.tokenizer.bos_token_id
    # Special tokens may be stop strings; an answer's text, decoded without them, never has them.
    added = chat.tokenizer.added_tokens_decoder.items()
    special = {token.content: number for number, token in added if token.special}
    limit = context.model.config.max_position_embeddings
    dtype = jnp.dtype(context.model.dtype).name

    class SamplerLM(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = chat.tokenizer
            self.notes: dict[tuple[str, int], dict[str, Any]] = {}
            self._ids_of_prompt: dict[str, list[int]] = {}
            self.scorer = Scorer(context.model, context.mesh)

        @property
        def eot_token_id(self) -> int:
            return chat.stop_token_ids[0]

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            return chat.tokenizer_sha256

        def chat_template(self, chat_template: bool | str = False) -> str:
            return chat.template if chat_template else ""

        def apply_chat_template(
            self, chat_history: list[Message], add_generation_prompt: bool = True
        ) -> str:
            """The text of a prompt; its ids are kept: the text may not give the same ids."""
            if add_generation_prompt:
                ids = chat.prompt_ids(chat_history)
            else:  # the answer's beginning is given as the last message
                *history, last = chat_history
                ids = chat.prompt_ids(history) + self._encode(last["content"])
            text = chat.decode(ids)
            self._ids_of_prompt[text] = ids
            return text

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            if string in self._ids_of_prompt:
                return self._ids_of_prompt[string]
            ids = list(self._encode(string))
            wanted = add_special_tokens is not False and bos is not None
            return [bos, *ids] if wanted and ids[:1] != [bos] else ids

        # Every choice of a question brings the same context, one after the other.
        @staticmethod
        @functools.lru_cache(maxsize=8)
        def _encode(text: str) -> list[int]:
            return backend.encode(text, add_special_tokens=False).ids

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            rows: list[tuple[Any, list[int], list[int]]] = []
            for request in requests:
                text, continuation = request.args
                if text:
                    context_ids, ids = self._encode_pair(text, continuation)
                else:
                    context_ids = [self.prefix_token_id]
                    ids = self.tok_encode(continuation, add_special_tokens=False)
                rows.append((request, context_ids, ids))

            def question(row: tuple[Any, list[int], list[int]]) -> tuple:
                return row[0].task_name, row[0].doc_id, row[1]

            groups = [list(group) for _, group in itertools.groupby(rows, question)]
            queries = [Query(group[0][1], [ids for *_, ids in group]) for group in groups]
            scores = self._score(queries, [self._note(group[0][0]) for group in groups])
            return list(itertools.chain(*scores))

        def _note(self, request: Any) -> dict[str, Any]:
            return self.notes.setdefault((request.task_name, request.doc_id), {})

        def _saved_or(
            self,
            keys: list[str],
            ask: Callable[[list[int], OnDone], list],
            to_json: Callable[[Any], Sequence],
        ) -> list[Any]:
            """The values of the keys, as `to_json` makes them: the saved ones, and for the others
            the answers of `ask(their numbers, on_done)`, saved as soon as they are done."""
            values = [known["value"] if (known := saved.get(key)) else None for key in keys]
            todo = [number for number, value in enumerate(values) if value is None]

            def on_done(place: int, answer: Any) -> None:
                saved.put(keys[todo[place]], {"value": to_json(answer)})

            for number, answer in zip(todo, ask(todo, on_done) if todo else (), strict=True):
                values[number] = to_json(answer)
            return values

        def _score(self, queries: list[Query], notes: list[dict]) -> list[list[tuple[float, bool]]]:
            """The log-probability of each continuation, and whether it is the greedy one."""
            fitted: dict[int, Query] = {}  # by number; without those that are skipped
            for number, (query, note) in enumerate(zip(queries, notes, strict=True)):
                longest = max(map(len, query.continuations))
                ids = self._shorten(list(query.context), limit + 1 - longest, note)
                if ids is not None:
                    fitted[number] = Query(ids, query.continuations)
            asked = list(fitted.values())
            values = self._saved_or(
                [digest(["score", dtype, query.context, query.continuations]) for query in asked],
                lambda todo, on_done: self.scorer.score(
                    params, [asked[i] for i in todo], should_stop, on_done
                ),
                lambda scores: [dataclasses.astuple(score) for score in scores],
            )
            pairs = dict(zip(fitted, values, strict=True))
            return [
                [tuple(pair) for pair in pairs.get(number, skipped * len(query.continuations))]
                for number, query in enumerate(queries)
            ]

        def _shorten(self, ids: list[int], room: int, note: dict) -> list[int] | None:
            """At most `room` tokens; None for a prompt that is skipped. The note says so."""
            if len(ids) <= room:
                return ids
            if too_long == "skip" or room < 2:
                note["skipped"] = True
                return None
            note["truncated"] = True
            return ids[:1] + ids[1 - room :] if ids[0] == bos else ids[-room:]

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            queries = [Query(context, [continuation]) for _, context, continuation in requests]
            return [pair for [pair] in self._score(queries, [{} for _ in queries])]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            sums = []
            for request in requests:
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=limit,
                    context_len=1,
                )
                rows = [(None, *make_disjoint_window(window)) for window in windows]
                sums.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(rows)))
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = [""] * len(requests)
            todo: dict[SamplingSettings, list[tuple[int, list[int]]]] = {}
            for index, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                room = limit // 2 if len(ids) >= limit else limit
                fitted = self._shorten(ids, room, self._note(request))
                if fitted is not None:
                    until = _listed(request.args[1].get("until"))
                    stops = [*chat.stop_token_ids, *(special[s] for s in until if s in special)]
                    settings = _sampling(request.args[1], tuple(dict.fromkeys(stops)))
                    todo.setdefault(settings, []).append((index, fitted))
            for settings, prompts in todo.items():
                completions = self._generate(settings, [ids for _, ids in prompts])
                for (index, _), completion in zip(prompts, completions, strict=True):
                    text = chat.decode(completion.tokens, skip_special_tokens=True)
                    texts[index] = _until(text, requests[index].args[1].get("until"))
                    ended = texts[index] != text  # by a stop string; what came after it is cut
                    self._note(requests[index]).update(
                        new_tokens=len(completion.tokens),
                        stop_reason="stop" if ended else completion.stop_reason,
                        cut_by_context=not ended and completion.is_cut_by_context(settings),
                    )
            return texts

        def _generate(
            self, settings: SamplingSettings, prompts: list[list[int]]
        ) -> list[Completion]:
            fixed = dataclasses.astuple(settings)

            def ask(todo: list[int], on_done: OnDone) -> list[Completion]:
                longest = max(map(len, prompts)) + settings.max_new_tokens
                sampler = Sampler(
                    context.model,
                    context.mesh,
                    batch_size=min(context.sampler.batch_size, len(todo)),
                    context_length=min(limit, -(-longest // _CONTEXT_STEP) * _CONTEXT_STEP),
                )
                asked = [prompts[i] for i in todo]
                return sampler.generate(params, asked, todo, settings, should_stop, on_done)

            keys = [digest(["generate", dtype, i, ids, *fixed]) for i, ids in enumerate(prompts)]
            values = self._saved_or(keys, ask, dataclasses.astuple)
            return [Completion(*value) for value in values]

    return SamplerLM()


def _sampling(kwargs: dict[str, Any], stop_token_ids: tuple[int, ...]) -> SamplingSettings:
    """A task's generation_kwargs, as lm_eval reads them."""
    from lm_eval.models.utils import normalize_gen_kwargs

    given = {name: value for name, value in kwargs.items() if value is not None}
    asked: dict[str, Any] = {**normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS)}
    for name in ("top_k", "num_beams"):
        if asked.get(name) not in (None, 0, 1, -1):
            raise UserError(f"the task asks for {name}={asked[name]}, which our sampler lacks")
    greedy = not asked["do_sample"] or asked.get("top_k") == 1
    temperature = 0.0 if greedy else float(asked.get("temperature") or 0.0)
    return SamplingSettings(
        asked["max_gen_toks"],
        temperature,
        float(asked.get("top_p") or 1.0) if temperature else 1.0,
        stop_token_ids=stop_token_ids,
    )


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to the stop string that is complete first."""
    found = [stop for stop in _listed(stops) if stop and stop in text]
    first = min(found, key=lambda stop: text.find(stop) + len(stop), default="")
    return text[: text.find(first)] if first else text


def _listed(stops: str | Sequence[str] | None) -> Sequence[str]:
    return [stops] if isinstance(stops, str) else stops or []
