"""Owns the stateless random numbers of sampling. Pure; decode thread."""

from __future__ import annotations

import numpy as np

_MANY = 12  # draws from which arrays are quicker than numbers
_MASK64 = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in (0, 1) from (seed, token index): SplitMix64's output function (Steele, Lea, Flood 2014), 24 bits.

    Stateless, so a seeded sequence draws the same numbers whatever shares its batch, slot or row (I9).
    """
    x = (seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    x ^= x >> 31
    return ((x >> 40) + 0.5) / (1 << 24)


def uniforms(seeds: list[int], indexes: list[int]) -> list[float]:
    """`uniform` of each (seed, index)."""
    if len(seeds) < _MANY:
        return [uniform(seed, index) for seed, index in zip(seeds, indexes, strict=True)]
    x = np.array([seed & _MASK64 for seed in seeds], np.uint64) * np.uint64(0xD1342543DE82EF95)
    x += np.array(indexes, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    drawn: list[float] = (((x >> np.uint64(40)).astype(np.float64) + 0.5) / (1 << 24)).tolist()
    return drawn
