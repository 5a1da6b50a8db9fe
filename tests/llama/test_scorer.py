"""Scores against a full forward of each context and continuation by itself."""

import dataclasses

import jax
import numpy as np
import pytest

from sa_jax.errors import Preempted, UserError
from sa_jax.llama.model import Llama
from sa_jax.llama.scorer import Query, Scorer, bucket
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import shardings
from tests import toys

CONFIG = dataclasses.replace(toys.CONFIG, max_position_embeddings=256)
RNG = np.random.default_rng(0)


def tokens(n):
    return RNG.integers(0, CONFIG.vocab_size, n).tolist()


SHARED = tokens(100)
QUERIES = [
    *(Query(SHARED + tokens(int(n)), [[1], [2], [3], [4]]) for n in RNG.integers(1, 40, 9)),
    *(Query(tokens(int(n)), [[5]]) for n in (1, 7, 60)),
    *(Query(tokens(20), [tokens(3), tokens(1), tokens(9)]) for _ in range(2)),
    Query(SHARED + tokens(3), [tokens(2)]),
    Query(tokens(20), [[7, 1], [8], [7, 2], [7, 1, 3]]),  # the first and the third are one row
]


@pytest.fixture(scope="module")
def params():
    return toys.doubled(toys.random_params(CONFIG))


@pytest.fixture(scope="module")
def scorer():
    return Scorer(Llama(CONFIG), toys.one_device_mesh(), batch_tokens=512)


@jax.jit
def forward(params, tokens_bs):
    return jax.nn.log_softmax(Llama(CONFIG).apply({"params": params}, tokens_bs))


def oracle(params, query):
    """(sum of log-probabilities, greedy) of each continuation, by a forward of its own."""
    found = []
    for continuation in query.continuations:
        row = np.zeros((1, 160), np.int32)
        row[0, : len(query.context) + len(continuation)] = [*query.context, *continuation]
        logprobs = np.asarray(forward(params, row))[0]
        places = len(query.context) - 1 + np.arange(len(continuation))
        chosen = logprobs[places, continuation].sum()
        found.append((chosen, bool((logprobs[places].argmax(-1) == continuation).all())))
    return found


def check(params, scores):
    for query, found in zip(QUERIES, scores, strict=True):
        expected = oracle(params, query)
        np.testing.assert_allclose([s.logprob for s in found], [e[0] for e in expected], atol=1e-4)
        assert [score.is_greedy for score in found] == [e[1] for e in expected]


def test_scores_are_those_of_the_full_forward(scorer, params):
    done = []
    scores = scorer.score(params, QUERIES, on_done=lambda i, found: done.append((i, found)))
    check(params, scores)
    assert sorted(index for index, _ in done) == list(range(len(QUERIES)))
    assert all(scores[index] == found for index, found in done)


def test_a_shared_beginning_is_run_once_and_letters_in_one_row(scorer, params):
    scorer.score(params, QUERIES[:9])
    stats = scorer.stats
    assert (stats.rows, stats.shared_prefixes) == (9, 1)
    # 9 x (100 + suffix) tokens are asked about; the 100 are run once (as 128), not 9 times.
    assert stats.query_tokens == sum(len(query.context) for query in QUERIES[:9])
    assert stats.forward_tokens < 128 + 9 * 64 < stats.query_tokens
    scorer.score(params, QUERIES[9:])
    assert scorer.stats.shared_prefixes == 0


@pytest.mark.long
def test_on_a_mesh(params):
    mesh = make_mesh(2, 2, 2)
    scorer = Scorer(Llama(CONFIG), mesh, batch_tokens=1024)
    check(params, scorer.score(jax.device_put(params, shardings(mesh, params)), QUERIES))


def test_a_continuation_may_end_one_past_the_context(scorer, params):
    limit = CONFIG.max_position_embeddings
    assert len(scorer.score(params, [Query(tokens(limit), [[1]])])) == 1
    for bad in (Query(tokens(limit + 1), [[1]]), Query(tokens(limit), [[1, 2]])):
        with pytest.raises(UserError, match="context is 256"):
            scorer.score(params, [bad])
    for empty in (Query([], [[1]]), Query([1], [[]])):
        with pytest.raises(UserError, match="need a token each"):
            scorer.score(params, [empty])


def test_stops_between_batches(scorer, params):
    with pytest.raises(Preempted):
        scorer.score(params, QUERIES, should_stop=lambda: True)


def test_buckets():
    assert [bucket(n, 100) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 65, 97)] == [
        *(1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 96, 100)
    ]
