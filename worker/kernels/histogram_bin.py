"""Owns one bin of the sampling histogram: which values are in it, and the search among its ids for the place of a cut. Decode thread.

Parts of `worker.kernels.sample_histogram`: a bin holds dozens of ids mostly, so these passes are over few values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker.kernels.sample import REACH, load_logits

BINS = tl.constexpr(4096)
FIRST_KEY = tl.constexpr((127 - 24) << 7)
"""The upper half of a float32 whose value is 2⁻²⁴: distances below it share the first bin, and the last, 87, is bin 3886."""


@triton.jit
def bin_of(distance):
    """The bin of a distance ≥ 0 from the best: the larger the distance, the larger the bin or equal."""
    key = (distance.to(tl.int32, bitcast=True) >> 16) - FIRST_KEY
    return tl.minimum(tl.maximum(key, 0), BINS - 1)


@triton.jit
def take_bin(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    taken_ptr,
    scale,
    best,
    wanted_bin,
    floor,
    with_floor,
    VOCAB: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the ids of a bin whose values lie above `floor` (or at it, if `with_floor`) to `taken_ptr`, in order.
    Returns how many, and their least and largest value."""
    tl.debug_barrier()  # what was taken before has been read by every thread
    num = 0
    least = best
    most = best - REACH
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
        near = x > best - REACH
        mine = near & (bin_of(tl.where(near, best - x, 0.0)) == wanted_bin)
        mine = mine & ((x > floor) | ((x == floor) & with_floor))
        place = num + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(taken_ptr + place, ids, mask=mine)
        num += tl.sum(mine.to(tl.int32), 0)
        least = tl.minimum(least, tl.min(tl.where(mine, x, best), 0))
        most = tl.maximum(most, tl.max(tl.where(mine, x, best - REACH), 0))
    tl.debug_barrier()  # every thread sees what the others wrote
    return num, least, most


@triton.jit
def measure(logits_ptr, taken_ptr, num, scale, best, low, middle, BLOCK: tl.constexpr):
    """Over the taken ids, of values above `middle`: count, mass and the smallest; of those up to it: the largest."""
    count = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    over = tl.zeros([BLOCK], tl.float32) + best
    under = tl.zeros([BLOCK], tl.float32) + low
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < num
        ids = tl.load(taken_ptr + at, mask=there, other=0)
        x = tl.load(logits_ptr + ids, mask=there, other=-float("inf")).to(tl.float32) * scale
        higher = x > middle
        count += tl.where(higher, 1.0, 0.0)
        mass += tl.where(higher, tl.exp(x - best), 0.0)
        over = tl.minimum(over, tl.where(higher, x, best))
        under = tl.maximum(under, tl.where(higher, low, x))
    return tl.sum(count, 0), tl.sum(mass, 0).to(tl.float64), tl.min(over, 0), tl.max(under, 0)


@triton.jit
def search_taken(
    logits_ptr,
    taken_ptr,
    num,
    scale,
    best,
    low,
    high,
    bound,
    BY_COUNT: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest taken value v with measure(taken x > v) < bound (≤ if INCLUSIVE), with count and mass above it."""
    count = 0.0
    mass = tl.full([], 0.0, tl.float64)
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)
        found_count, found_mass, over, under = measure(
            logits_ptr, taken_ptr, num, scale, best, low, middle, BLOCK
        )
        measured = found_count.to(tl.float64) if BY_COUNT else found_mass
        fits = (measured <= bound) if INCLUSIVE else (measured < bound)
        count = tl.where(fits, found_count, count)
        mass = tl.where(fits, found_mass, mass)
        high = tl.where(fits, under, high)
        low = tl.where(fits, low, over)
    return high, count, mass


@triton.jit
def count_taken(logits_ptr, taken_ptr, num, scale, value, BLOCK: tl.constexpr):
    """How many of the taken ids have this value."""
    ties = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < num
        ids = tl.load(taken_ptr + at, mask=there, other=0)
        x = tl.load(logits_ptr + ids, mask=there, other=-float("inf")).to(tl.float32) * scale
        ties += tl.where(x == value, 1.0, 0.0)
    return tl.sum(ties, 0)
