"""Random numbers as a function of (seed, purpose, counters), the same as csrc/core/random.h."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _combine(seed: Words, counter: Words) -> Words:
    return _mix(seed + _GOLDEN * (counter + np.uint64(1)))


def words(seed: int, *purpose: int, shape: tuple[int, ...]) -> Words:
    """64 random bits for every element of ``shape``; other purposes give other, independent words."""
    key = np.array([seed], dtype=np.uint64)
    for part in purpose:
        key = _combine(key, np.array([part], dtype=np.uint64))
    return _combine(key, np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint64)).reshape(shape)


def permutations(seed: int, *purpose: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """A random permutation along the last dimension."""
    return np.argsort(words(seed, *purpose, shape=shape), axis=-1)
