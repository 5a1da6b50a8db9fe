"""Log-probabilities of given continuations. A shared prefix is run once, and continuations that
differ in one token (the letters of a question) are scored in one forward pass."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import Preempted, UserError
from sa_jax.llama.attention import prompt_attention
from sa_jax.llama.cache import KVCache, init_cache
from sa_jax.llama.model import Llama, with_small_kernels_merged
from sa_jax.llama.weights import cast_weights

MIN_SHARED = 64  # tokens: a shorter common beginning is not worth a program of its own
MIN_SHARERS = 8  # rows


@dataclasses.dataclass(frozen=True)
class Query:
    """Continuations of a context; context and continuations have at least one token each."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Score:
    """Sum of a continuation's log-probabilities, and whether greedy decoding would produce it."""

    logprob: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of a forward pass: continuations that differ at most in their last token.

    `targets_cn` are their tokens; all but the last are also the end of `tokens`.
    """

    tokens: tuple[int, ...]
    targets_cn: tuple[tuple[int, ...], ...]
    query: int
    numbers: tuple[int, ...]  # of the continuations

    @property
    def free(self) -> int:
        """How many tokens may come from a shared prefix."""
        return len(self.tokens) - len(self.targets_cn[0])


class Scorer:
    """Scores queries with a small set of compiled programs."""

    def __init__(self, model: Llama, mesh: Mesh, *, batch_tokens: int | None = None):
        """Compiles nothing yet.

        Args:
          model: computes; its adapters may be merged, see `with_small_kernels_merged`.
          mesh: of the parameters; rows are sharded over (data, fsdp).
          batch_tokens: tokens of one forward pass, padding included. By default 16,384; on CPU
            1,024 per device, whose attention scores fit its cache: half the time of 16,384.
        """
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._batch_tokens = batch_tokens or (1024 * mesh.size if on_cpu else 16384)
        self._multiple = mesh.shape["data"] * mesh.shape["fsdp"]
        self._max_length = model.config.max_position_embeddings
        model, self._merge = with_small_kernels_merged(model.clone(mesh=mesh))
        forward = functools.partial(target_logprobs, model)
        self._forward = jax.jit(forward, out_shardings=NamedSharding(mesh, P()))
        # The shared beginning is one row, so it cannot be cut over the mesh.
        self._prefix = jax.jit(functools.partial(_run_prefix, model.clone(mesh=None)))
        self._dtype = jnp.dtype(model.dtype)

    def score(
        self,
        params: Any,
        queries: Sequence[Query],
        should_stop: Callable[[], bool] = lambda: False,
        on_done: Callable[[int, list[Score]], None] = lambda index, scores: None,
    ) -> list[list[Score]]:
        """The scores of every query's continuations, in order.

        Args:
          params: the model's parameters, on the scorer's mesh.
          queries: with each continuation, at most max_position_embeddings + 1 tokens; UserError for
            an empty or a longer one.
          should_stop: asked between device calls; must answer alike in every process. True raises
            Preempted.
          on_done: called with a query's index and its scores as soon as they are known.
        """
        rows = [row for index, query in enumerate(queries) for row in self._rows(index, query)]
        params = cast_weights(self._merge(params), self._dtype)
        scores: list[list[Any]] = [[None] * len(query.continuations) for query in queries]
        for group, shared in share_prefixes(rows):
            prefix = None
            if shared:
                padded = np.zeros((1, bucket(shared, self._max_length)), np.int32)
                padded[0, :shared] = group[0].tokens[:shared]
                prefix = self._prefix(params, padded)
            for batch in self._batches(group, shared):
                if should_stop():
                    raise Preempted("stopped while scoring")
                self._score_batch(params, batch, shared, prefix, scores)
                for index in dict.fromkeys(row.query for row in batch):
                    if None not in scores[index]:
                        on_done(index, list(scores[index]))
        return scores

    def _rows(self, index: int, query: Query) -> Iterator[_Row]:
        context = tuple(query.context)
        longest = max(map(len, query.continuations), default=0)
        if not context or not min(map(len, query.continuations), default=0):
            raise UserError(f"query {index}: context and continuation need a token each")
        if len(context) + longest - 1 > self._max_length:
            raise UserError(
                f"query {index} has {len(context) + longest} tokens; the model's context is "
                f"{self._max_length}"
            )
        by_beginning: dict[tuple[int, ...], list[int]] = {}
        for number, continuation in enumerate(query.continuations):
            by_beginning.setdefault(tuple(continuation[:-1]), []).append(number)
        for beginning, numbers in by_beginning.items():
            targets = tuple(tuple(query.continuations[number]) for number in numbers)
            yield _Row(context + beginning, targets, index, tuple(numbers))

    def _batches(self, rows: Sequence[_Row], shared: int) -> Iterator[list[_Row]]:
        """Batches of rows with the same padded length, as many as the budget allows."""
        by_length: dict[int, list[_Row]] = {}
        for row in rows:
            length = bucket(len(row.tokens) - shared, self._max_length)
            by_length.setdefault(length, []).append(row)
        for length, group in sorted(by_length.items()):
            size = self._batch_size(length)
            yield from (group[i : i + size] for i in range(0, len(group), size))

    def _batch_size(self, length: int) -> int:
        return max(1, self._batch_tokens // length // self._multiple) * self._multiple

    def _score_batch(self, params, batch, shared, prefix, scores) -> None:
        length = bucket(max(len(row.tokens) for row in batch) - shared, self._max_length)
        # A short last batch is padded to a power of four, so that few programs are compiled.
        size = 4 ** math.ceil(math.log(len(batch), 4))
        size = min(self._batch_size(length), -(-size // self._multiple) * self._multiple)
        places = bucket(max(len(row.targets_cn[0]) for row in batch), length)
        options = max(len(row.targets_cn) for row in batch)
        tokens_bs = np.zeros((size, length), np.int32)
        first_b = np.zeros(size, np.int32)
        targets_bnc = np.zeros((size, places, options), np.int32)
        for i, row in enumerate(batch):
            tokens_bs[i, : len(row.tokens) - shared] = row.tokens[shared:]
            first_b[i] = row.free - shared
            targets_nc = np.transpose(row.targets_cn)
            targets_bnc[i, : targets_nc.shape[0], : targets_nc.shape[1]] = targets_nc
        logprobs_bnc, greedy_bnc = jax.device_get(
            self._forward(params, tokens_bs, first_b, targets_bnc, np.int32(shared), prefix)
        )
        for i, row in enumerate(batch):
            n = len(row.targets_cn[0])
            sums_c = logprobs_bnc[i, :n].astype(np.float64).sum(0)
            greedy_c = greedy_bnc[i, :n].all(0)
            for c, number in enumerate(row.numbers):
                scores[row.query][number] = Score(float(sums_c[c]), bool(greedy_c[c]))


@dataclasses.dataclass
class _Beginning:
    """Rows that begin with the same `length` tokens."""

    length: int
    groups: list[tuple[list[_Row], int]] = dataclasses.field(default_factory=list)  # share more
    others: list[_Row] = dataclasses.field(default_factory=list)

    def add(self, part: "_Beginning") -> None:
        self.groups += part.groups
        self.others += part.others

    def share(self) -> None:
        """Makes one more group, if this runs no more tokens: of the other rows, and of groups whose
        longer prefix costs more than it saves beside this one."""
        kept, joined, now = [], list(self.others), 0  # now: tokens that groups save as they are
        for rows, shared in self.groups:
            if len(rows) * (shared - self.length) > shared:
                kept.append((rows, shared))
            else:
                joined += rows
                now += (len(rows) - 1) * shared
        worth_a_program = self.length >= MIN_SHARED and len(joined) >= MIN_SHARERS
        if worth_a_program and (len(joined) - 1) * self.length >= now:
            self.groups, self.others = [*kept, (joined, self.length)], []


def share_prefixes(rows: Sequence[_Row]) -> list[tuple[list[_Row], int]]:
    """Groups of rows, with the length of the prefix that all rows of a group share.

    Of the prefixes within each other (a header, the examples of a subject after it), a row is given
    one with which few tokens are run: each prefix is decided once, the longest first. Rows that
    share too few tokens, or with too few others, form one group without a prefix.
    """
    ordered = sorted(rows, key=lambda row: row.tokens[: row.free])
    begun = [_Beginning(0)]  # each has the one before as its beginning
    for row, after in itertools.zip_longest(ordered, ordered[1:]):
        common = _common(row, after) if after else 0
        part = _Beginning(row.free, others=[row])
        while begun[-1].length > common:
            begun[-1].add(part)
            part = begun.pop()
            part.share()
        if begun[-1].length < common:
            begun.append(_Beginning(common))
        begun[-1].add(part)
    (everything,) = begun
    unshared = [(everything.others, 0)] if everything.others else []
    return everything.groups + unshared


def _common(a: _Row, b: _Row) -> int:
    """How many tokens both may take from one prefix."""
    length = min(a.free, b.free)
    differ = (i for i in range(length) if a.tokens[i] != b.tokens[i])
    return next(differ, length)


def bucket(n: int, most: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least n, but at most `most`."""
    power = 1 << max(0, n - 1).bit_length()
    return min(most, 3 * power // 4 if power >= 4 and 3 * power // 4 >= n else power)


def target_logprobs(
    model: Llama,
    params: Any,
    tokens_bs: jax.Array,
    first_b: jax.Array,
    targets_bnc: jax.Array,
    start: jax.Array | int = 0,
    prefix: KVCache | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of alternatives for the tokens after given places.

    Args:
      tokens_bs: int [B, S], padded on the right.
      first_b: int [B]; place n of row b is first_b[b] + n, and predicts the token after it.
      targets_bnc: int [B, N, C], the alternatives after each of the N places.
      start: the number of tokens before all rows.
      prefix: their keys and values, or None.

    Returns:
      Log-probabilities float32 [B, N, C], and whether each target is the most likely token.
    """
    b, s = tokens_bs.shape
    implementation = prompt_attention(model.mesh, model.config.num_kv_heads, model.dtype, s)
    model = model.clone(attention=implementation)
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    if prefix is None:
        hidden_bsd = apply(tokens_bs, method="hidden")
    else:
        positions_bs = jnp.broadcast_to(start + jnp.arange(s), (b, s))
        hidden_bsd = apply(tokens_bs, positions_bs, prefix, method="extend")
    places_bn = jnp.minimum(first_b[:, None] + jnp.arange(targets_bnc.shape[1]), s - 1)
    hidden_bnd = jnp.take_along_axis(hidden_bsd, places_bn[..., None], axis=1)

    def place(hidden_bd_targets_bc):  # one at a time: [B, N, V] may not fit
        hidden_bd, targets_bc = hidden_bd_targets_bc
        logits_bv = apply(hidden_bd, method="logits")
        chosen_bc = jnp.take_along_axis(logits_bv, targets_bc, axis=-1)
        logprobs_bc = chosen_bc - jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
        return logprobs_bc, targets_bc == jnp.argmax(logits_bv, axis=-1, keepdims=True)

    logprobs_nbc, greedy_nbc = jax.lax.map(
        place, (hidden_bnd.swapaxes(0, 1), targets_bnc.swapaxes(0, 1))
    )
    return logprobs_nbc.swapaxes(0, 1), greedy_nbc.swapaxes(0, 1)


def _run_prefix(model: Llama, params: Any, tokens_1s: jax.Array) -> KVCache:
    """Keys and values of one row; those after its own tokens are never used."""
    length = tokens_1s.shape[1]
    cache = init_cache(model.config, 1, length, model.dtype)
    positions_1s = jnp.arange(length)[None]
    apply: Callable[..., Any] = functools.partial(model.apply, {"params": params})
    return apply(tokens_1s, positions_1s, cache, method="decode")[1]
