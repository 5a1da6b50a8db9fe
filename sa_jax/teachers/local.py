"""A teacher that is a checkpoint, sampled by sa_jax's sampler on the mesh."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sa_jax.data.chat import ChatFormat
from sa_jax.errors import Preempted
from sa_jax.llama.sampler import Sampler
from sa_jax.llama.sampling import SamplingSettings
from sa_jax.teachers.replies import Reply, Request

_ROUND = 4  # batches of the sampler between two times that replies are handed over (and kept)


@dataclasses.dataclass(frozen=True)
class LocalTeacher:
    """Samples a checkpoint. A reply depends only on model, settings and messages: not on the other
    requests, nor on the replies that an earlier launch has saved."""

    sampler: Sampler
    params: Any
    chat: ChatFormat
    settings: SamplingSettings  # with the chat format's stop tokens
    model: dict  # names the weights on record (folder, run, step)

    def identity(self) -> dict:
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        return {
            "teacher": "local",
            "model": self.model,
            "chat": [self.chat.name, self.chat.date],
            "context_length": self.sampler.context_length,
            **{name: getattr(self.settings, name) for name in names},
        }

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Teacher`. A prompt that leaves no room in the context gets 'prompt_too_long'."""
        tokens = [self.chat.prompt_ids(request.messages) for request in requests]
        fitting = [i for i, prompt in enumerate(tokens) if self.sampler.fits(prompt)]
        for i in sorted(set(range(len(requests))) - set(fitting)):
            yield i, Reply("", "prompt_too_long")
        size = _ROUND * self.sampler.batch_size
        for begin in range(0, len(fitting), size):
            chosen = fitting[begin : begin + size]
            try:
                completions = self.sampler.generate(
                    self.params,
                    [tokens[i] for i in chosen],
                    [_noise_id(requests[i]) for i in chosen],
                    self.settings,
                    should_stop,
                )
            except Preempted:
                return
            for i, completion in zip(chosen, completions, strict=True):
                yield i, Reply(self.chat.decode(completion.tokens), completion.stop_reason)


def _noise_id(request: Request) -> int:
    shown = json.dumps([[m["role"], m["content"]] for m in request.messages])
    return int.from_bytes(hashlib.sha256(shown.encode()).digest()[:4], "big")
