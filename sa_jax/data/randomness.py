"""Permutations and draws that depend only on their key: not on the order of calls, the number of
workers, or the version of numpy.

numpy keeps the streams of its bit generators and of `SeedSequence` fixed between versions, but not
those of `Generator`'s methods, so only the former are used here.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def _digest(key: tuple) -> bytes:
    plain = [part if isinstance(part, str) else int(part) for part in key]  # np.int64(3) is 3
    return hashlib.sha256(repr(plain).encode()).digest()


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A uniform permutation of 0..n-1 (int64 [n]) that is a function of `n` and `key` alone."""
    seed = np.random.SeedSequence(int.from_bytes(_digest(key), "big"))
    return np.argsort(np.random.Philox(seed).random_raw(n), kind="stable")


def uniform_integer(low: int, high: int, *key: int | str) -> int:
    """One draw from U{low..high}, both ends included, that is a function of `key` alone."""
    fraction_64 = int.from_bytes(_digest(key)[:8], "big")
    return low + (fraction_64 * (high - low + 1) >> 64)


def choice(options: Sequence[T], *key: int | str) -> T:
    """One of the options, likewise."""
    return options[uniform_integer(0, len(options) - 1, *key)]
