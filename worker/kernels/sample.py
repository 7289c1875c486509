"""Owns the choice of the next token from logits in one kernel: masks, temperature, filters, draw. Decode thread.

The definition is `worker.step.sampler.stochastic`'s, so a seed gives the same token as on a CPU, up to sums that round
differently. Nothing is sorted: `_search` finds each cut and the drawn token by halving a range of values (docs/gpu.md,
"Sampling without sorting").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.outputs import Sinks, store_token

BLOCK = 4096
REACH = tl.constexpr(87.0)  # logits further below the best have probability 0 in fp32


@triton.jit
def load_logits(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    ids,
    scale,
    VOCAB: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
):
    """A block of scaled logits; -inf for banned ids and outside the vocabulary."""
    inside = ids < VOCAB
    x = tl.load(logits_ptr + ids, mask=inside, other=-float("inf")).to(tl.float32)
    if MASKED:
        word = tl.load(words_ptr + ids // 32, mask=inside, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, -float("inf"))
    if SUPPRESSED:
        word = tl.load(allowed_ptr + ids // 32, mask=inside, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, -float("inf"))
    return x * scale


@triton.jit
def _above(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    scale,
    best,
    low,
    middle,
    VOCAB: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Over values above `middle`: count, mass and the smallest; over those in [low, middle]: the largest."""
    # Each lane keeps its own sums; lanes meet once, after the loop.
    count = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    over = tl.zeros([BLOCK], tl.float32) + best
    under = tl.zeros([BLOCK], tl.float32) + low
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
        higher = x > middle
        count += tl.where(higher, 1.0, 0.0)
        mass += tl.where(higher, tl.exp(x - best), 0.0)
        over = tl.minimum(over, tl.where(higher, x, best))
        under = tl.maximum(under, tl.where(higher, low, x))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.min(over, 0), tl.max(under, 0)


@triton.jit
def _search(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    scale,
    best,
    low,
    bound,
    BY_COUNT: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    VOCAB: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest value v ≥ low with measure(x > v) < bound (≤ if INCLUSIVE), with count and mass above it.

    `low` and `best` must be values of the row. The answer lies in [low, high], whose ends stay values of the row.
    """
    high = best
    count = 0.0
    mass = 0.0
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(
            middle < high, middle, low
        )  # if rounding made it `high`, the range would not shrink
        found_count, found_mass, over, under = _above(
            logits_ptr, words_ptr, allowed_ptr, scale, best, low, middle, VOCAB, MASKED, SUPPRESSED, BLOCK
        )
        measure = found_count if BY_COUNT else found_mass
        fits = (measure <= bound) if INCLUSIVE else (measure < bound)
        # No value lies between `under` and `middle`, so what is above one is above the other.
        count = tl.where(fits, found_count, count)
        mass = tl.where(fits, found_mass, mass)
        high = tl.where(fits, under, high)
        low = tl.where(fits, low, over)
    return high, count, mass


@triton.jit
def _count_ties(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    scale,
    value,
    VOCAB: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ties = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
        ties += tl.where(x == value, 1.0, 0.0)
    return tl.sum(ties, 0)


_SETTINGS = ["words_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "rows_ptr", "outputs_ptr"]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)  # views into a packed buffer, wherever they fall
def _sample_row(
    logits_ptr,
    words_ptr,
    allowed_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    ids_ptr,
    bad_ptr,
    rows_ptr,
    last_ids_ptr,
    outputs_ptr,
    logits_stride,
    words_stride,
    outputs_stride,
    VOCAB: tl.constexpr,
    MASKED: tl.constexpr,
    SUPPRESSED: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    words_ptr += row.to(tl.int64) * words_stride
    temperature = tl.load(temperature_ptr + row)
    is_greedy = temperature <= 0.0
    scale = 1.0 / tl.where(is_greedy, 1.0, temperature)

    # First pass: the best id, and whether the raw row is sound.
    bests = tl.full([BLOCK], -float("inf"), tl.float32)
    best_ids = tl.zeros([BLOCK], tl.int32)
    raw_bests = bests
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=-float("inf")).to(tl.float32)
        is_nan = raw != raw
        nans += is_nan.to(tl.int32)
        raw_bests = tl.maximum(raw_bests, tl.where(is_nan, -float("inf"), raw))
        x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
        better = x > bests  # false for a NaN, and for equal values, so that the lowest id stays
        best_ids = tl.where(better, ids, best_ids)
        bests = tl.where(better, x, bests)
    best = tl.max(bests, 0)
    best_id = tl.min(tl.where(bests == best, best_ids, VOCAB), 0)
    raw_best = tl.max(raw_bests, 0)
    num_nan = tl.sum(nans, 0)
    is_bad = (num_nan > 0) | (raw_best == float("inf")) | (raw_best == -float("inf"))
    chosen = best_id

    if (is_greedy == 0) & (is_bad == 0) & (best > -float("inf")):
        top_k = tl.load(top_k_ptr + row).to(tl.float32)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        # The lowest value that may be drawn, and how many of its ties (by id) may be drawn: top-k, then top-p.
        _, _, low, _ = _above(
            logits_ptr,
            words_ptr,
            allowed_ptr,
            scale,
            best,
            best,
            best - REACH,
            VOCAB,
            MASKED,
            SUPPRESSED,
            BLOCK,
        )
        ties = _count_ties(logits_ptr, words_ptr, allowed_ptr, scale, low, VOCAB, MASKED, SUPPRESSED, BLOCK)
        _, mass, _, _ = _above(
            logits_ptr, words_ptr, allowed_ptr, scale, best, low, low, VOCAB, MASKED, SUPPRESSED, BLOCK
        )
        if top_k > 0.0:
            low, count, mass = _search(
                logits_ptr,
                words_ptr,
                allowed_ptr,
                scale,
                best,
                low,
                top_k,
                True,
                False,
                VOCAB,
                MASKED,
                SUPPRESSED,
                BLOCK,
            )
            ties = _count_ties(
                logits_ptr, words_ptr, allowed_ptr, scale, low, VOCAB, MASKED, SUPPRESSED, BLOCK
            )
            ties = tl.minimum(ties, top_k - count)
        total = mass + ties * tl.exp(low - best)
        if top_p < 1.0:
            floor = low
            kept = ties
            low, count, mass = _search(
                logits_ptr,
                words_ptr,
                allowed_ptr,
                scale,
                best,
                low,
                top_p * total,
                False,
                False,
                VOCAB,
                MASKED,
                SUPPRESSED,
                BLOCK,
            )
            if low > floor:
                kept = _count_ties(
                    logits_ptr, words_ptr, allowed_ptr, scale, low, VOCAB, MASKED, SUPPRESSED, BLOCK
                )
            # A tie stays while the mass before it is below the bound; the first always does.
            room = tl.ceil((top_p * total - mass) / tl.exp(low - best))
            ties = tl.minimum(kept, tl.maximum(room, 1.0))
        if tl.exp(low - best) < min_p:
            # min-p cuts by value alone, so equal values stay or go together.
            _, _, low, _ = _above(
                logits_ptr,
                words_ptr,
                allowed_ptr,
                scale,
                best,
                best,
                _below(best + tl.log(min_p)),
                VOCAB,
                MASKED,
                SUPPRESSED,
                BLOCK,
            )
            ties = _count_ties(
                logits_ptr, words_ptr, allowed_ptr, scale, low, VOCAB, MASKED, SUPPRESSED, BLOCK
            )
            _, mass, _, _ = _above(
                logits_ptr, words_ptr, allowed_ptr, scale, best, low, low, VOCAB, MASKED, SUPPRESSED, BLOCK
            )
        target = tl.load(uniform_ptr + row) * (mass + ties * tl.exp(low - best))
        drawn, _, before = _search(
            logits_ptr,
            words_ptr,
            allowed_ptr,
            scale,
            best,
            low,
            target,
            False,
            True,
            VOCAB,
            MASKED,
            SUPPRESSED,
            BLOCK,
        )
        if drawn > low:
            ties = _count_ties(
                logits_ptr, words_ptr, allowed_ptr, scale, drawn, VOCAB, MASKED, SUPPRESSED, BLOCK
            )
        wanted = tl.floor((target - before) / tl.exp(drawn - best))
        wanted = tl.maximum(tl.minimum(wanted, ties - 1.0), 0.0).to(tl.int32) + 1
        passed = 0
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = load_logits(logits_ptr, words_ptr, allowed_ptr, ids, scale, VOCAB, MASKED, SUPPRESSED)
            is_tie = x == drawn
            ordinal = passed + tl.cumsum(is_tie.to(tl.int32), 0)
            hit = tl.max(tl.where(is_tie & (ordinal == wanted), ids, -1), 0)
            chosen = tl.where(hit >= 0, hit, chosen)
            passed += tl.sum(is_tie.to(tl.int32), 0)
    store_token(
        row, chosen, is_bad, ids_ptr, bad_ptr, rows_ptr, last_ids_ptr, outputs_ptr, outputs_stride, OWN
    )


@triton.jit
def _below(x):
    """A value slightly below x, so that a strict comparison includes x however its logarithm was rounded."""
    return x - tl.abs(x) * 2.4e-7


def sample(
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
    """(ids (R,) int64, bad (R,) int32). Rows with temperature 0 are greedy (lowest id among equals).

    logits (R, V) fp32 or bf16, rows may be strided; temperature, top_p, min_p, uniforms (R,) fp32; top_k (R,)
    int32, 0 for no limit. words (R, ceil(V/32)) int32: a row's allowed ids, bit by bit; allowed (ceil(V/32),)
    int32: the same for all rows (suppressed ids). `bad`: the raw logits hold a NaN or have no finite maximum; the
    row's id then means nothing. A row whose mask allows nothing gets id 0. `sinks`: where the kernel also leaves ids
    and `bad`. The reference is
    `worker.step.sampler.apply_mask`, then `stochastic`.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    for row_mask in (words, allowed):
        assert row_mask is None or (
            row_mask.dtype == torch.int32 and row_mask.shape[-1] == (vocab + 31) // 32
        )
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    bad = torch.empty(rows, dtype=torch.int32, device=logits.device)
    to = sinks or Sinks(bad, ids, bad.unsqueeze(1))  # without sinks the placeholders are not written
    _sample_row[(rows,)](
        logits,
        logits if words is None else words,
        logits if allowed is None else allowed,
        temperature,
        top_k,
        top_p,
        min_p,
        uniforms,
        ids,
        bad,
        to.rows,
        to.last_ids,
        to.outputs,
        logits.stride(0),
        0 if words is None else words.stride(0),
        to.outputs.stride(0),
        VOCAB=vocab,
        MASKED=words is not None,
        SUPPRESSED=allowed is not None,
        OWN=sinks is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
    return ids, bad


def allowed_words(suppress_ids: list[int], vocab_size: int, device: torch.device) -> Tensor | None:
    """(ceil(V/32),) int32 with the bits of `suppress_ids` cleared, for `sample`; None if there are none."""
    if not suppress_ids:
        return None
    bits = torch.ones((vocab_size + 31) // 32 * 32, dtype=torch.int64)
    bits[suppress_ids] = 0
    words = (bits.view(-1, 32) << torch.arange(32)).sum(dim=1)
    return words.to(torch.int32).to(device)  # wraps: bit 31 is the sign
