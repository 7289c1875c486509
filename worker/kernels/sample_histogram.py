"""Owns sampling over a histogram: the draw of `worker.kernels.sample` in two or three passes by several programs. Decode thread.

Three launches. Slices of a row are scanned for its best logit; distances to it are counted into bins whose numbers are the
upper 16 bits of a float, so that bins are ordered as values are; then one program a row finds the bin of each cut and looks
only at the ids in it. Masses are added as integers: the order of additions changes nothing. docs/gpu.md has the reasons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.compiled import next_power_of_two, num_multiprocessors
from worker.kernels.histogram_bin import (
    BINS,
    ONE,
    bin_of,
    count_taken,
    mass_above,
    mass_of,
    search_taken,
    take_bin,
    tied_id,
)
from worker.kernels.outputs import Sinks, store_token
from worker.kernels.sample import REACH, load_logits

BLOCK = 2048
MAX_SLICES = 16
TAKE_BLOCK = (
    4096  # so many loads of a pass are on their way at once; with twice as many 784 bytes are spilled
)
TAKES = tl.constexpr(
    4
)  # bins that a row may need: of top-k, top-p, min-p and the draw; each has a counter of its own
_SETTINGS = ["words_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "rows_ptr", "outputs_ptr"]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _scan_slice(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    temperature_ptr,
    bests_ptr,
    best_ids_ptr,
    raw_bests_ptr,
    nans_ptr,
    counts_ptr,
    masses_ptr,
    counters_ptr,
    logits_stride,
    words_stride,
    VOCAB: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    part = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    words_ptr += row.to(tl.int64) * words_stride
    temperature = tl.load(temperature_ptr + row)
    scale = 1.0 / tl.where(temperature <= 0.0, 1.0, temperature)
    bests = tl.full([BLOCK], -float("inf"), tl.float32)
    best_ids = tl.zeros([BLOCK], tl.int32)
    raw_bests = bests
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(0, SLICE, BLOCK):
        ids = part * SLICE + start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=-float("inf")).to(tl.float32)
        is_nan = raw != raw
        nans += is_nan.to(tl.int32)
        raw_bests = tl.maximum(raw_bests, tl.where(is_nan, -float("inf"), raw))
        x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
        better = x > bests  # false for a NaN, and for equal values, so that the lowest id stays
        best_ids = tl.where(better, ids, best_ids)
        bests = tl.where(better, x, bests)
    best = tl.max(bests, 0)
    at = row * SLICES + part
    tl.store(bests_ptr + at, best)
    tl.store(best_ids_ptr + at, tl.min(tl.where(bests == best, best_ids, VOCAB), 0))
    tl.store(raw_bests_ptr + at, tl.max(raw_bests, 0))
    tl.store(nans_ptr + at, tl.sum(nans, 0))
    if temperature > 0.0:  # the next launch counts into these
        own: tl.constexpr = BINS // SLICES
        bins = row * BINS + part * own + tl.arange(0, own)
        tl.store(counts_ptr + bins, tl.zeros([own], tl.int32))
        tl.store(masses_ptr + bins, tl.zeros([own], tl.int64))
        if part == 0:
            tl.store(counters_ptr + row * TAKES + tl.arange(0, TAKES), tl.zeros([TAKES], tl.int32))


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _count_slice(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    temperature_ptr,
    top_k_ptr,
    bests_ptr,
    counts_ptr,
    masses_ptr,
    logits_stride,
    words_stride,
    VOCAB: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    part = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        logits_ptr += row.to(tl.int64) * logits_stride
        words_ptr += row.to(tl.int64) * words_stride
        scale = 1.0 / temperature
        best = tl.max(tl.load(bests_ptr + row * SLICES + tl.arange(0, SLICES)), 0)
        by_count = tl.load(top_k_ptr + row) > 0
        for start in range(0, SLICE, BLOCK):
            ids = part * SLICE + start + tl.arange(0, BLOCK)
            x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
            near = x > best - REACH
            bins = row * BINS + bin_of(tl.where(near, best - x, 0.0))
            mass = mass_of(tl.where(near, x, best - 2.0 * REACH), best)
            tl.atomic_add(masses_ptr + bins, mass, mask=near & (mass > 0), sem="relaxed")
            tl.atomic_add(counts_ptr + bins, 1, mask=near & by_count, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def _draw_row(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    bests_ptr,
    best_ids_ptr,
    raw_bests_ptr,
    nans_ptr,
    counts_ptr,
    masses_ptr,
    counters_ptr,
    taken_ptr,
    taken_x_ptr,
    ids_ptr,
    bad_ptr,
    rows_ptr,
    last_ids_ptr,
    outputs_ptr,
    logits_stride,
    words_stride,
    outputs_stride,
    VOCAB: tl.constexpr,
    SLICES: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
    TAKE_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    parts = row * SLICES + tl.arange(0, SLICES)
    bests = tl.load(bests_ptr + parts)
    best = tl.max(bests, 0)
    chosen = tl.min(tl.where(bests == best, tl.load(best_ids_ptr + parts), VOCAB), 0)
    raw_best = tl.max(tl.load(raw_bests_ptr + parts), 0)
    num_nan = tl.sum(tl.load(nans_ptr + parts), 0)
    is_bad = (num_nan > 0) | (raw_best == float("inf")) | (raw_best == -float("inf"))
    temperature = tl.load(temperature_ptr + row)
    is_finite = (best > -float("inf")) & (best < float("inf"))
    if (temperature > 0.0) & (is_bad == 0) & is_finite:
        logits_ptr += row.to(tl.int64) * logits_stride
        words_ptr += row.to(tl.int64) * words_stride
        taken_ptr += row.to(tl.int64) * VOCAB
        taken_x_ptr += row.to(tl.int64) * VOCAB
        counters_ptr += row * TAKES
        scale = 1.0 / temperature
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row).to(tl.float64)
        min_p = tl.load(min_p_ptr + row)
        bins = tl.arange(0, BINS)
        binned = tl.load(masses_ptr + row * BINS + bins)
        reached = tl.cumsum(binned, 0)  # mass of a bin and of all nearer ones

        # What may be drawn: all bins before `cut`; in it values above `floor`, and `ties` of those at it, by id.
        cut = tl.full([], BINS, tl.int32)
        floor = best - REACH
        ties = 0.0
        inside = tl.full([], 0.0, tl.float64)  # mass that may be drawn in the bin of the cut
        before = tl.sum(binned, 0).to(tl.float64) / ONE  # mass of the bins before it
        if top_k > 0:
            counts = tl.load(counts_ptr + row * BINS + bins)
            ranks = tl.cumsum(counts, 0)
            if tl.sum(counts, 0) > top_k:
                cut = tl.sum((ranks < top_k).to(tl.int32), 0)
                wanted = (top_k - tl.sum(tl.where(bins < cut, counts, 0), 0)).to(tl.float64)
                num, least, most = take_bin(
                    logits_ptr, words_ptr, allowed_ptr, taken_ptr, taken_x_ptr, counters_ptr, scale, best, cut, floor, False,
                    VOCAB, MASKED, SUPPRESSED, TAKE_BLOCK,
                )  # fmt: skip
                floor, count, mass = search_taken(taken_x_ptr, num, best, least, most, wanted, True, False)
                ties = (wanted - count).to(tl.float32)
                before = tl.sum(tl.where(bins < cut, binned, 0), 0).to(tl.float64) / ONE
                inside = mass + ties * tl.exp(floor - best).to(tl.float64)
        if top_p < 1.0:
            bound = top_p * (before + inside)
            full = (reached.to(tl.float64) / ONE < bound) & (bins < cut)
            found = tl.sum(full.to(tl.int32), 0)  # the first bin that reaches the bound
            if found < BINS:
                nearer = tl.sum(tl.where(bins < found, binned, 0), 0).to(tl.float64) / ONE
                is_same = found == cut
                num, least, most = take_bin(
                    logits_ptr, words_ptr, allowed_ptr, taken_ptr, taken_x_ptr, counters_ptr + 1, scale, best, found,
                    tl.where(is_same, floor, best - REACH), is_same & (ties > 0.0),
                    VOCAB, MASKED, SUPPRESSED, TAKE_BLOCK,
                )  # fmt: skip
                if num > 0:
                    last, _, mass = search_taken(
                        taken_x_ptr, num, best, least, most, bound - nearer, False, False
                    )
                    each = tl.exp(last - best).to(tl.float64)
                    kept = count_taken(taken_x_ptr, num, last, BLOCK)
                    kept = tl.where(is_same & (last == floor), ties, kept)
                    # A tie stays while the mass before it is below the bound; the first always does.
                    room = tl.ceil((bound - nearer - mass) / each).to(tl.float32)
                    ties = tl.minimum(kept, tl.maximum(room, 1.0))
                    cut = found
                    floor = last
                    before = nearer
                    inside = mass + ties * each
        if min_p > 0.0:
            # A value slightly below the threshold: a strict comparison then includes it however its logarithm was rounded.
            threshold = best + tl.log(min_p)
            threshold -= tl.abs(threshold) * 2.4e-7
            found = bin_of(tl.maximum(best - threshold, 0.0))
            if (found < cut) | ((found == cut) & (floor <= threshold)):
                cut = found
                floor = threshold  # min-p cuts by value alone, so equal values stay or go together
                ties = 0.0
                num, least, most = take_bin(
                    logits_ptr, words_ptr, allowed_ptr, taken_ptr, taken_x_ptr, counters_ptr + 2, scale, best, cut, floor,
                    False, VOCAB, MASKED, SUPPRESSED, TAKE_BLOCK,
                )  # fmt: skip
                inside = mass_above(taken_x_ptr, num, best, floor, BLOCK)
                before = tl.sum(tl.where(bins < cut, binned, 0), 0).to(tl.float64) / ONE
        target = tl.load(uniform_ptr + row).to(tl.float64) * (before + inside)
        passed = (reached.to(tl.float64) / ONE <= target) & (bins < cut)
        found = tl.sum(passed.to(tl.int32), 0)
        if (found >= cut) & (inside <= 0.0):  # rounding has put the target at the very top
            found = tl.max(tl.where((binned > 0) & (bins < cut), bins, 0), 0)
        is_same = found == cut
        num, least, most = take_bin(
            logits_ptr, words_ptr, allowed_ptr, taken_ptr, taken_x_ptr, counters_ptr + 3, scale, best, found,
            tl.where(is_same, floor, best - REACH), is_same & (ties > 0.0),
            VOCAB, MASKED, SUPPRESSED, TAKE_BLOCK,
        )  # fmt: skip
        if num > 0:
            nearer = tl.sum(tl.where(bins < found, binned, 0), 0).to(tl.float64) / ONE
            drawn, _, mass = search_taken(taken_x_ptr, num, best, least, most, target - nearer, False, True)
            kept = count_taken(taken_x_ptr, num, drawn, BLOCK)
            kept = tl.where(is_same & (drawn == floor), ties, kept)
            wanted = tl.floor((target - nearer - mass) / tl.exp(drawn - best).to(tl.float64)).to(tl.float32)
            place = tl.maximum(tl.minimum(wanted, kept - 1.0), 0.0).to(tl.int32) + 1
            chosen = tied_id(taken_ptr, taken_x_ptr, num, drawn, place, VOCAB, BLOCK)
    store_token(
        row, chosen, is_bad, ids_ptr, bad_ptr, rows_ptr, last_ids_ptr, outputs_ptr, outputs_stride, OWN
    )


def choose_slices(num_rows: int, vocab: int, num_processors: int) -> int:
    """How many programs share a row's scan: a power of two, from shapes alone, so that a captured graph keeps it."""
    slices = 1
    while 2 * slices <= MAX_SLICES and num_rows * slices < 2 * num_processors and slices * BLOCK < vocab:
        slices *= 2
    return slices


def sample_by_histogram(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    *,
    words: Tensor | None = None,
    allowed: Tensor | None = None,
    sinks: Sinks | None = None,
) -> tuple[Tensor, Tensor]:
    """As `worker.kernels.sample.sample`, which says what each argument is; it finds the same tokens, up to rounding."""
    num, vocab = logits.shape
    assert logits.stride(1) == 1
    slices = choose_slices(num, vocab, num_multiprocessors(logits.device))
    block = min(BLOCK, next_power_of_two(vocab))
    span = -(-vocab // (slices * block)) * block

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    bests, raw_bests = empty(num, slices, dtype=torch.float32), empty(num, slices, dtype=torch.float32)
    best_ids, nans = empty(num, slices, dtype=torch.int32), empty(num, slices, dtype=torch.int32)
    counts, masses = (
        empty(num, BINS.value, dtype=torch.int32),
        empty(num, BINS.value, dtype=torch.int64),
    )
    counters = empty(num, TAKES.value, dtype=torch.int32)
    taken, values = empty(num, vocab, dtype=torch.int32), empty(num, vocab, dtype=torch.float32)
    ids, bad = empty(num, dtype=torch.int64), empty(num, dtype=torch.int32)
    masks = (logits if words is None else words, logits if allowed is None else allowed)
    strides = (logits.stride(0), 0 if words is None else words.stride(0))
    shape = {"VOCAB": vocab, "SLICES": slices, "MASKED": words is not None, "SUPPRESSED": allowed is not None}
    scanned = (bests, best_ids, raw_bests, nans)
    _scan_slice[(slices, num)](
        logits, *masks, temperature, *scanned, counts, masses, counters, *strides,
        **shape, SLICE=span, BLOCK=block, num_warps=8,
    )  # fmt: skip
    _count_slice[(slices, num)](
        logits, *masks, temperature, top_k, bests, counts, masses, *strides,
        **shape, SLICE=span, BLOCK=block, num_warps=8,
    )  # fmt: skip
    is_plain = words is None and allowed is None
    take = (
        min(TAKE_BLOCK, next_power_of_two(vocab)) if is_plain else block
    )  # with masks it would spill four times as much
    # Without sinks the placeholders are not written.
    to = sinks or Sinks(bad, ids, bad.unsqueeze(1))
    _draw_row[(num,)](
        logits, *masks, temperature, top_k, top_p, min_p, uniforms, *scanned, counts, masses, counters,
        taken, values, ids, bad,
        to.rows, to.last_ids, to.outputs, *strides, to.outputs.stride(0),
        **shape, OWN=sinks is not None, BLOCK=block, TAKE_BLOCK=take, num_warps=16,
    )  # fmt: skip
    return ids, bad
