"""Text generation: bucketed prefill, and one decode program over slots refilled as rows finish.

Results are reproducible by construction: the same program always prefills a prompt (its bucket
depends only on its length), rows do not interact, and noise is a function of (seed, prompt id,
position). So a prompt's tokens do not depend on its slot, its neighbours or the order of refills.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import Preempted, UsageError, UserError
from sa_jax.llama.attention import prompt_attention
from sa_jax.llama.cache import CACHE_BLOCK, KVCache, cache_specs, init_cache
from sa_jax.llama.model import Llama, layers_apart, with_small_kernels_merged
from sa_jax.llama.sampling import SamplingSettings, noise_arguments, sample_tokens
from sa_jax.llama.self_test import decoding_takes_kernel
from sa_jax.llama.weights import cast_weights, decoding_mesh, layers_apart_pay, move_weights

PREFILL_BATCH = 8  # prompts that are prefilled together, rounded up like `batch_size`
SMALLEST_BUCKET = 16  # tokens; shorter prompts are padded to it, which costs next to nothing


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer generated for one prompt."""

    tokens: list[int]  # generated ids, without the stop token
    stop_reason: str  # "stop" (a stop token came) or "length" (max_new_tokens or the context ended)
    logprobs: list[float]  # of each token under the model itself (temperature 1, no top-p)

    def is_cut_by_context(self, settings: SamplingSettings) -> bool:
        """Whether the context ended it before max_new_tokens."""
        return self.stop_reason == "length" and len(self.tokens) < settings.max_new_tokens


@dataclasses.dataclass
class SamplerStats:
    """Statistics of a `Sampler.generate` call; its seconds include compilation."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0  # of prefills, and of preparing the weights
    seconds: float = 0.0  # of the whole call

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_per_step(self) -> float:
        """Seconds per decode step, including the host's work, without `prefill_seconds`."""
        return (self.seconds - self.prefill_seconds) / max(1, self.decode_steps)


class Sampler:
    """Generates for many prompts at once with a fixed set of compiled programs.

    Attributes:
      mesh: where answers are sampled, see `decoding_mesh`.
      batch_size: slots decoded together (the argument, rounded up to a multiple of data x fsdp).
      context_length: prompt and completion together, in tokens; the cache's capacity.
      cache_shardings: of the cache, with its layout.
      prompt_attention: padded length of a prompt -> its attention implementation; {} if prompts use
        decoding's attention.
      decode_kernel: whether decoding takes the kernel of GPUs.
      stats: of the latest `generate` call.
    """

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        *,
        batch_size: int,
        context_length: int,
        steps_per_call: int = 16,
    ):
        """Compiles nothing yet, except that GPUs check the kernel that decoding takes.

        Args:
          model: computes; its adapters may be merged, see `with_small_kernels_merged`.
          mesh: of the parameters. On its `decoding_mesh`, slots are sharded over (data, fsdp), and
            kv heads over tensor if it divides them.
          batch_size: number of slots.
          context_length: tokens; at most the model's max_position_embeddings.
          steps_per_call: most decode steps between two checks of which rows have finished.

        Raises:
          UsageError: sizes below 1, or a context longer than the model's.
        """
        config = model.config
        for name, value in (("batch_size", batch_size), ("steps_per_call", steps_per_call)):
            if value < 1:
                raise UsageError(f"sampler {name}={value} must be at least 1")
        if not 2 <= context_length <= config.max_position_embeddings:
            raise UsageError(
                f"sampler context_length={context_length} must be between 2 and the model's "
                f"max_position_embeddings={config.max_position_embeddings}"
            )
        params_mesh, mesh = mesh, decoding_mesh(mesh, config, model.dtype)
        self.mesh, self._moves = mesh, mesh != params_mesh
        if self._moves:
            logging.info("answers are sampled on the mesh %s", dict(mesh.shape))
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // rows) * rows
        self.context_length = context_length
        powers = (1 << n for n in range(32))
        fitting = (power for power in powers if SMALLEST_BUCKET <= power < context_length)
        self._buckets = [*fitting, context_length]
        self.stats = SamplerStats()
        self._dtype = jnp.dtype(model.dtype)
        self._prefill_batch = -(-min(PREFILL_BATCH, batch_size) // rows) * rows
        specs = cache_specs(mesh, config.num_kv_heads)
        keys: Any = NamedSharding(mesh, specs.k)
        values: Any = NamedSharding(mesh, specs.v)
        platform = mesh.devices.flat[0].platform
        if platform in ("gpu", "tpu"):  # heads before tokens in memory, or all values are moved
            values = Format(Layout((0, 1, 2, 4, 3, 5)), values)
        self.cache_shardings = cache = KVCache(keys, values)
        host = NamedSharding(mesh, P())
        model, self._merge = with_small_kernels_merged(model.clone(mesh=mesh))
        self.prompt_attention: dict[int, str] = {}
        if platform != "cpu" and specs.k[3]:
            self.prompt_attention = {
                length: prompt_attention(mesh, config.num_kv_heads, model.dtype, length)
                for length in self._buckets
            }
            logging.info("attention of prompts, by their padded length: %s", self.prompt_attention)
        empty = functools.partial(init_cache, config, self.batch_size, context_length, self._dtype)
        self._init_cache = jax.jit(empty, out_shardings=cache)
        jit = functools.partial(jax.jit, static_argnames="nucleus", donate_argnames="cache")
        self._prefill = jit(
            functools.partial(_prefill, model, self.prompt_attention),
            out_shardings=(cache, host, host),
        )
        apart = layers_apart_pay(mesh, config, model.dtype, copies=2 if self._moves else 1)
        self._for_decoding = jax.jit(layers_apart) if apart else lambda params: params
        block = min(CACHE_BLOCK, context_length)
        self.decode_kernel = kernel = decoding_takes_kernel(mesh, config, self._dtype, block)
        decoding = model.clone(layers_apart=apart, decode_kernel=kernel)
        self._decode = jit(
            functools.partial(_decode, decoding, steps_per_call),
            out_shardings=(cache, host, host, host),
        )

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt leaves room in the context for at least one new token."""
        return 0 < len(prompt) < self.context_length

    def generate(
        self,
        params: dict,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        settings: SamplingSettings,
        should_stop: Callable[[], bool] = lambda: False,
        on_done: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """Completes every prompt, in order; `self.stats` then has tokens and time.

        Args:
          params: the model's parameters, which are copied if they are on another mesh.
          prompts: token ids of everything before the answer; UserError unless each `fits`.
          prompt_ids: an id for each prompt, 0 ≤ id < 2^32, for the noise.
          should_stop: asked between device calls; must answer alike in every process. True raises
            Preempted.
          on_done: called with a prompt's index and its completion as soon as it is complete.
        """
        start = time.perf_counter()
        self.stats = stats = SamplerStats(prompt_tokens=sum(map(len, prompts)))
        for index, prompt in enumerate(prompts):
            if not self.fits(prompt):
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens, but the context of "
                    f"{self.context_length} needs 1 to {self.context_length - 1}; raise the "
                    "context length or drop the prompt"
                )
        rows: list[_Row] = []
        for prompt, prompt_id in zip(prompts, prompt_ids, strict=True):
            end = min(len(prompt) + settings.max_new_tokens, self.context_length)
            rows.append(_Row(len(rows), list(prompt), prompt_id, end))
        # Rows of one bucket come together, so prefill batches are full.
        pending = collections.deque(sorted(rows, key=lambda row: -self._bucket(row.prompt)))
        slots: dict[int, _Row] = {}
        cache = self._init_cache()
        params = cast_weights(self._merge(params), self._dtype)
        if self._moves:
            params = move_weights(params, self.mesh)
        decoding_params = self._for_decoding(params)
        # Ready before the prefill, which has collectives too: two such programs at once may wait
        # for each other for ever where a CPU has more devices than cores.
        jax.block_until_ready((params, decoding_params))
        stats.prefill_seconds = time.perf_counter() - start
        while pending or slots:
            if should_stop():
                raise Preempted("stopped while sampling")
            # Free slots wait until they make a whole prefill, a quarter of all slots, or what the
            # next bucket has left.
            refill = min(len(self._next(pending)), -(-self.batch_size // 4))
            if pending and self.batch_size - len(slots) >= refill:
                cache = self._refill(params, cache, slots, pending, settings)
            else:
                least = self.batch_size - refill + 1 if pending else 1
                cache = self._advance(decoding_params, cache, slots, least, settings)
            for slot, row in sorted(slots.items()):
                if row.stop_reason:
                    del slots[slot]
                    on_done(row.index, row.completion())
        stats.new_tokens = sum(len(row.tokens) for row in rows)
        stats.seconds = time.perf_counter() - start
        line = "sampled %d tokens for %d prompts in %.1f s: %.0f tokens/s"
        logging.info(line, stats.new_tokens, len(rows), stats.seconds, stats.tokens_per_s)
        return [row.completion() for row in rows]

    def _bucket(self, prompt: Sequence[int]) -> int:
        """The padded length of a prompt: a power of two that depends only on its length."""
        return next(bucket for bucket in self._buckets if len(prompt) <= bucket)

    def _next(self, pending: collections.deque["_Row"]) -> list["_Row"]:
        """The first rows of one bucket, as many as a prefill takes."""
        rows = list(itertools.islice(pending, self._prefill_batch))
        buckets = [self._bucket(row.prompt) for row in rows]
        return rows[: buckets.count(buckets[0])] if rows else []  # sorted by their bucket

    def _refill(self, params, cache, slots, pending, settings) -> KVCache:
        """Prefills the next prompts of one bucket into free slots and takes their first tokens."""
        start = time.perf_counter()
        free = [slot for slot in range(self.batch_size) if slot not in slots]
        length = self._bucket(pending[0].prompt)
        taken = self._next(pending)[: len(free)]
        for _ in taken:
            pending.popleft()
        tokens_bs = np.zeros((self._prefill_batch, length), np.int32)
        lengths_b = np.ones(self._prefill_batch, np.int32)
        ids_b = np.zeros(self._prefill_batch, np.uint32)
        # Rows of padding go to slots past the end, which the write drops; each to its own, so that
        # no two are equal.
        slots_b = np.arange(self._prefill_batch, dtype=np.int32) + self.batch_size
        for i, row in enumerate(taken):
            tokens_bs[i, : len(row.prompt)] = row.prompt
            lengths_b[i], ids_b[i], slots_b[i] = len(row.prompt), row.prompt_id, free[i]
        cache, tokens, logprobs = self._prefill(
            params, cache, tokens_bs, lengths_b, slots_b, ids_b, **noise_arguments(settings)
        )
        tokens, logprobs = jax.device_get((tokens, logprobs))
        is_stop_b = np.isin(tokens, settings.stop_token_ids)
        for i, row in enumerate(taken):
            row.extend(tokens[i : i + 1], logprobs[i : i + 1], is_stop_b[i : i + 1])
            slots[free[i]] = row
        self.stats.prefill_seconds += time.perf_counter() - start
        return cache

    def _advance(self, params, cache, slots, least, settings) -> KVCache:
        """Up to `steps_per_call` decode steps for all rows, while at least `least` go on."""
        token_b, position_b, end_b = np.zeros((3, self.batch_size), np.int32)
        ids_b = np.zeros(self.batch_size, np.uint32)
        for slot, row in slots.items():
            token_b[slot], position_b[slot] = row.tokens[-1], row.length - 1
            end_b[slot], ids_b[slot] = row.end, row.prompt_id
        stop_tokens_k = np.asarray(settings.stop_token_ids, np.int32)
        per_row = token_b, position_b, end_b, ids_b
        cache, *decoded = self._decode(
            params, cache, *per_row, stop_tokens_k, np.int32(least), **noise_arguments(settings)
        )
        tokens_tb, logprobs_tb, steps = jax.device_get(decoded)
        is_stop_tb = np.isin(tokens_tb[:steps], settings.stop_token_ids)
        for slot, row in slots.items():
            row.extend(tokens_tb[:steps, slot], logprobs_tb[:steps, slot], is_stop_tb[:, slot])
        self.stats.decode_steps += int(steps)
        return cache


@dataclasses.dataclass
class _Row:
    """A prompt that is being sampled; it ends at the length `end` (prompt and completion)."""

    index: int
    prompt: list[int]
    prompt_id: int
    end: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    stop_reason: str = ""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def extend(self, tokens_t: np.ndarray, logprobs_t: np.ndarray, is_stop_t: np.ndarray) -> None:
        """Takes the decoded tokens up to a stop token or the row's end, and drops the rest."""
        room = self.end - self.length
        stops = np.flatnonzero(is_stop_t[:room])
        count = int(stops[0]) if stops.size else min(room, len(tokens_t))
        self.tokens += tokens_t[:count].tolist()
        self.logprobs += logprobs_t[:count].tolist()
        if stops.size:
            self.stop_reason = "stop"
        elif self.length == self.end:
            self.stop_reason = "length"

    def completion(self) -> Completion:
        return Completion(self.tokens, self.stop_reason, self.logprobs)


def _prefill(model, attention, params, cache, tokens_bs, lengths_b, slots_b, prompt_ids_b, **noise):
    """Runs right-padded prompts and writes their keys and values into the cache's slots.

    It writes padding too: this is after the prompt, and decoding overwrites each place before a
    query can see it. `slots_b` are unique, and XLA must know: for equal ones its deterministic
    programs for GPUs sort every number that is written (--xla_gpu_deterministic_ops).
    """
    batch, length = tokens_bs.shape
    positions_bs = jnp.broadcast_to(jnp.arange(length), (batch, length))
    new = init_cache(model.config, batch, length, model.dtype)
    variables = {"params": params}
    run = model.clone(attention=attention[length]) if attention else model
    hidden_bsd, new = run.apply(
        variables, tokens_bs, positions_bs, new, prefill=bool(attention), method="decode"
    )
    blocks, block = new.v.shape[1], new.v.shape[3]
    unique = {"mode": "drop", "unique_indices": True}
    cache = KVCache(
        cache.k.at[:, :blocks, slots_b, :, :, :block].set(new.k, **unique),
        cache.v.at[:, :blocks, slots_b, :block].set(new.v, **unique),
    )
    hidden_bd = hidden_bsd[jnp.arange(batch), lengths_b - 1]
    logits_bv = model.apply(variables, hidden_bd, method="logits")
    return cache, *sample_tokens(logits_bv, prompt_ids_b, lengths_b, **noise)


def _decode(
    model,
    steps,
    params,
    cache,
    token_b,
    position_b,
    end_b,
    prompt_ids_b,
    stop_tokens_k,
    least,
    **noise,
):
    """Up to `steps` tokens for every row; ends early if fewer than `least` rows are active.

    A row is active while its next position is before its end. Other rows compute without use: they
    write to their own slots, which the next prefill overwrites.

    Returns:
      The cache, tokens [steps, B], their log-probabilities [steps, B], and how many steps ran.
    """
    variables = {"params": params}

    def unfinished(carry):
        step, _, _, _, active_b, _, _ = carry
        return (step < steps) & (jnp.sum(active_b) >= least)

    def advance(carry):
        step, cache, token_b, position_b, active_b, tokens_tb, logprobs_tb = carry
        hidden_bsd, cache = model.apply(
            variables, token_b[:, None], position_b[:, None], cache, method="decode"
        )
        logits_bv = model.apply(variables, hidden_bsd[:, 0], method="logits")
        next_b, logprob_b = sample_tokens(logits_bv, prompt_ids_b, position_b + 1, **noise)
        tokens_tb = tokens_tb.at[step].set(next_b)
        logprobs_tb = logprobs_tb.at[step].set(logprob_b)
        stopped_b = jnp.any(next_b[:, None] == stop_tokens_k, axis=-1)
        active_b = active_b & ~stopped_b & (position_b + 2 < end_b)
        position_b = jnp.where(active_b, position_b + 1, position_b)
        return step + 1, cache, next_b, position_b, active_b, tokens_tb, logprobs_tb

    batch = token_b.shape[0]
    carry = (
        jnp.int32(0),
        cache,
        token_b,
        position_b,
        position_b + 1 < end_b,
        jnp.zeros((steps, batch), jnp.int32),
        jnp.zeros((steps, batch), jnp.float32),
    )
    step, cache, _, _, _, tokens_tb, logprobs_tb = jax.lax.while_loop(unfinished, advance, carry)
    return cache, tokens_tb, logprobs_tb, step
