"""Scores against a full forward of each context and continuation by itself."""

import dataclasses

import jax
import numpy as np
import pytest

from sa_jax.errors import Preempted, UserError
from sa_jax.llama.model import Llama
from sa_jax.llama.scorer import Query, Scorer, _Row, bucket, share_prefixes
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


def check(params, scores, queries=QUERIES):
    for query, found in zip(queries, scores, strict=True):
        expected = oracle(params, query)
        np.testing.assert_allclose([s.logprob for s in found], [e[0] for e in expected], atol=1e-4)
        assert [score.is_greedy for score in found] == [e[1] for e in expected]


def test_scores_are_those_of_the_full_forward(scorer, params):
    done = []
    scores = scorer.score(params, QUERIES, on_done=lambda i, found: done.append((i, found)))
    check(params, scores)
    assert sorted(index for index, _ in done) == list(range(len(QUERIES)))
    assert all(scores[index] == found for index, found in done)


def test_a_shared_beginning_is_run_once_and_letters_in_one_row(scorer, params, monkeypatch):
    runs = toys.ScorerRuns(scorer, monkeypatch)
    scorer.score(params, QUERIES[:9])
    assert (runs.rows, len(runs.prefixes)) == (9, 1)
    # 9 x (100 + suffix) tokens are asked about; the 100 are run once (as 128), not 9 times.
    query_tokens = sum(len(query.context) for query in QUERIES[:9])
    assert runs.tokens < 128 + 9 * 64 < query_tokens
    scorer.score(params, QUERIES[9:])
    assert len(runs.prefixes) == 1


HEADER, FEW = 100, 1000  # tokens: of a header, and of a subject's examples with it


def beginnings(*sizes):
    """A row of one token for each question: (questions, tokens of their beginning), all of which
    begin alike for the first `HEADER` tokens."""
    rows = []
    for subject, (count, length) in enumerate(sizes):
        beginning = (*range(HEADER), *[-1 - subject] * (length - HEADER))
        rows += [_Row((*beginning, i, 7), ((7,),), len(rows) + i, (0,)) for i in range(count)]
    return rows


@pytest.mark.parametrize(
    ("sizes", "optimum", "prefixes"),
    [
        # Five subjects of MMLU: a header that all share must not hide what each has of its own.
        ([(50, FEW)] * 5, 5 * FEW + 250 * 2, [FEW] * 5),
        # Beside them, questions with the header alone.
        ([(50, FEW), (20, HEADER)], FEW + HEADER + 70 * 2, [HEADER, FEW]),
        # Beginnings that are hardly longer: 9 x 5 tokens are less than the 105 of one more prefix.
        ([(9, HEADER + 5)] * 5, HEADER + 45 * (5 + 2), [HEADER]),
        ([(9, HEADER + 10), (9, FEW)], HEADER + 10 + FEW + 18 * 2, [HEADER + 10, FEW]),
        # With only few others the header is worth no program.
        ([(50, FEW), (7, HEADER)], FEW + 50 * 2 + 7 * (HEADER + 2), [0, FEW]),
        ([(7, FEW)], 7 * (FEW + 2), [0]),
        ([], 0, []),
    ],
)
def test_of_beginnings_within_each_other_those_with_the_fewest_tokens(sizes, optimum, prefixes):
    rows = beginnings(*sizes)
    groups = share_prefixes(rows)
    assert sorted(row.query for group, _ in groups for row in group) == list(range(len(rows)))
    assert all(row.tokens[:n] == group[0].tokens[:n] for group, n in groups for row in group)
    tokens_run = sum(n + sum(len(row.tokens) - n for row in group) for group, n in groups)
    assert (tokens_run, sorted(n for _, n in groups)) == (optimum, prefixes)


def test_scores_with_a_prefix_of_each_subject_are_those_of_the_full_forward(
    scorer, params, monkeypatch
):
    runs = toys.ScorerRuns(scorer, monkeypatch)
    subjects = [SHARED[:70] + tokens(50) for _ in range(2)]
    queries = [Query(subject + tokens(5), [[1], [2]]) for subject in subjects for _ in range(9)]
    queries += [Query(SHARED[:70] + tokens(9), [[3]]) for _ in range(9)]
    check(params, scorer.score(params, queries), queries)
    assert len(runs.prefixes) == 3
    # Beginnings of 120, 120 and 70 tokens, as 128, 128 and 96; then batches of 16 rows.
    assert runs.tokens == 128 + 128 + 96 + 16 * (6 + 6 + 12)


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
