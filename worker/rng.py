"""Owns the stateless random numbers of sampling. Pure; decode thread."""

from __future__ import annotations

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
