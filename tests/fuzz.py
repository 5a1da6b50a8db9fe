"""Strategies of the fuzz tests: values of any kind, records with some of them spoiled, and the
check that what reads them takes or refuses them."""

import copy
import os
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sa_jax.errors import UserError

CASES = int(os.environ.get("SA_JAX_FUZZ_CASES", 300))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def fuzz(share=1.0):
    """Settings of a format; `share` of the cases by default, where each takes its time."""
    cases = CASES if CASES > 300 else max(1, round(CASES * share))
    return settings(
        max_examples=cases,
        deadline=None,  # `read_or_refused` counts what this process took
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def objects(*names):
    """Objects with some of the fields that are read, holding anything."""
    return st.dictionaries(st.sampled_from(names), JSON, max_size=6)


def read_or_refused(read, *arguments):
    begin = time.process_time()
    try:
        read(*arguments)
    except UserError as error:
        assert str(error)  # `cli` puts it on one line
    assert time.process_time() - begin < 10


DELETED = "(deleted)"
# (place, what comes there); a place is keys from the outside in, or numbers that stand for some.
CHANGES = st.lists(
    st.tuples(st.lists(st.integers(0, 19), max_size=5), JSON | st.just(DELETED)),
    min_size=1,
    max_size=3,
)


def spoil(record, changes):
    """The record with some of its values replaced or left out, at any depth."""
    outer = [copy.deepcopy(record)]
    for place, value in changes:
        at, key = outer, 0
        for step in place:
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
            at, key = inner, step if step in keys else keys[step % len(keys)]
        if value == DELETED and isinstance(at, dict):
            del at[key]
        else:
            at[key] = value
    return outer[0]
