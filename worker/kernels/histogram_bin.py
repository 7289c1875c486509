"""Owns one bin of the sampling histogram: which values are in it, and the search among its ids for the place of a cut. Decode thread.

Parts of `worker.kernels.sample_histogram`: a bin holds dozens of ids mostly, so these passes are over few values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker.kernels.sample import REACH, load_logits

BINS = tl.constexpr(4096)
ONE = tl.constexpr(1099511627776.0)
"""2⁴⁰, the integer that stands for a mass of 1."""
TRIES = tl.constexpr(16)
CHUNK = tl.constexpr(256)
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
    ids_ptr,
    taken_x_ptr,
    counter_ptr,
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
    """Write the ids of a bin whose values lie above `floor` (or at it, if `with_floor`) to `ids_ptr`, their values to
    `taken_x_ptr`, in no order. `counter_ptr` is 0. Returns how many, and their least and largest value.

    A place in the list is an addition to the counter: few lanes have one, and the others wait for nobody. What is made of the
    list must not depend on its order.
    """
    tl.debug_barrier()  # what was taken before has been read by every thread
    least = tl.zeros([BLOCK], tl.float32) + best
    most = tl.zeros([BLOCK], tl.float32) + (best - REACH)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
        near = x > best - REACH
        mine = near & (bin_of(tl.where(near, best - x, 0.0)) == wanted_bin)
        mine = mine & ((x > floor) | ((x == floor) & with_floor))
        place = tl.atomic_add(counter_ptr + tl.zeros([BLOCK], tl.int32), 1, mask=mine, sem="relaxed")
        tl.store(ids_ptr + place, ids, mask=mine)
        tl.store(taken_x_ptr + place, x, mask=mine)
        least = tl.where(mine, tl.minimum(least, x), least)
        most = tl.where(mine, tl.maximum(most, x), most)
    tl.debug_barrier()  # every thread sees what the others wrote
    num = tl.load(counter_ptr, cache_modifier=".cg")  # additions are made in the L2
    return num, tl.min(least, 0), tl.max(most, 0)


@triton.jit
def mass_of(x, best):
    """exp(x − best) as an integer of 2⁻⁴⁰: sums of these are the same in any order."""
    return (tl.exp(x - best) * ONE).to(tl.int64)


@triton.jit
def mass_above(taken_x_ptr, num, best, floor, BLOCK: tl.constexpr):
    """The mass of the taken values above `floor`."""
    mass = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(taken_x_ptr + at, mask=at < num, other=-float("inf"))
        mass += tl.where(x > floor, mass_of(x, best), 0)
    return tl.sum(mass, 0).to(tl.float64) / ONE


@triton.jit
def search_taken(
    taken_x_ptr, num, best, low, high, bound, BY_COUNT: tl.constexpr, INCLUSIVE: tl.constexpr
):  # fmt: skip
    """The smallest taken value v with measure(taken x > v) < bound (≤ if INCLUSIVE), with count and mass above it.

    Each round tries 16 values between `low` and `high` at once, and goes on between the two taken values next to the first
    that fits: a round costs a few meetings of all threads, whatever the number of values it tries.
    """
    count = 0.0
    mass = tl.full([], 0.0, tl.float64)
    steps = tl.arange(0, TRIES)
    while low < high:
        middles = low + (high - low) * ((steps + 1).to(tl.float32) / (TRIES + 1))
        middles = tl.where(middles < high, middles, low)
        counts = tl.zeros([TRIES], tl.int32)
        masses = tl.zeros([TRIES], tl.int64)
        over = tl.zeros([TRIES], tl.float32) + best  # the nearest taken values on both sides of each
        under = tl.zeros([TRIES], tl.float32) + low
        for start in range(0, num, CHUNK):
            at = start + tl.arange(0, CHUNK)
            there = at < num
            x = tl.load(taken_x_ptr + at, mask=there, other=-float("inf"))
            each = tl.where(there, mass_of(x, best), 0)
            higher = x[None, :] > middles[:, None]
            lower = there[None, :] & (x[None, :] <= middles[:, None])
            counts += tl.sum(higher.to(tl.int32), 1)
            masses += tl.sum(tl.where(higher, each[None, :], 0), 1)
            over = tl.minimum(over, tl.min(tl.where(higher, x[None, :], best), 1))
            under = tl.maximum(under, tl.max(tl.where(lower, x[None, :], low), 1))
        measured = counts.to(tl.float64) if BY_COUNT else masses.to(tl.float64) / ONE
        fits = (measured <= bound) if INCLUSIVE else (measured < bound)
        first = tl.min(
            tl.where(fits, steps, TRIES), 0
        )  # a larger value has less above it: all behind it fit as well
        is_first = steps == first
        if first < TRIES:
            count = tl.sum(tl.where(is_first, counts, 0), 0).to(tl.float32)
            mass = tl.sum(tl.where(is_first, masses, 0), 0).to(tl.float64) / ONE
            high = tl.sum(tl.where(is_first, under, 0.0), 0)
        if first > 0:
            low = tl.sum(tl.where(steps == first - 1, over, 0.0), 0)
    return high, count, mass


@triton.jit
def count_taken(taken_x_ptr, num, value, BLOCK: tl.constexpr):
    """How many of the taken have this value."""
    ties = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(taken_x_ptr + at, mask=at < num, other=-float("inf"))
        ties += (x == value).to(tl.int32)
    return tl.sum(ties, 0).to(tl.float32)


@triton.jit
def tied_id(ids_ptr, taken_x_ptr, num, value, place, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Of the taken ids with this value the one that is at `place`, from 1, in order of ids: the smallest that has so many up to
    it."""
    low = 0
    high = VOCAB - 1
    while low < high:
        middle = (low + high) // 2
        found = tl.zeros([BLOCK], tl.int32)
        least = tl.zeros([BLOCK], tl.int32) + (VOCAB - 1)  # beyond the middle
        most = tl.zeros([BLOCK], tl.int32)  # up to it
        for start in range(0, num, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(taken_x_ptr + at, mask=at < num, other=-float("inf"))
            ids = tl.load(ids_ptr + at, mask=at < num, other=0)
            is_tie = x == value
            found += (is_tie & (ids <= middle)).to(tl.int32)
            least = tl.where(is_tie & (ids > middle), tl.minimum(least, ids), least)
            most = tl.where(is_tie & (ids <= middle), tl.maximum(most, ids), most)
        if tl.sum(found, 0) >= place:
            high = tl.max(most, 0)
            low = tl.where(tl.sum(found, 0) == place, high, low)  # the last of those up to it is the one
        else:
            low = tl.min(least, 0)
    return low
