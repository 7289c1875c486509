"""Owns the choice of the next token from logits, on the device. Tensor functions; decode thread.

Randomness comes in as one uniform number a row, a hash of (seed, token index) made by the host when the step
is planned (`worker.schedule.rng`): nothing here has a state.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """Draw one id per row; rows with temperature 0 are greedy.

    logits (R, V) fp32; temperature, top_p, min_p, uniforms (R,) fp32; top_k (R,) int32, 0 for no limit.
    Filters apply in the order top-k, top-p, min-p, each to the distribution the one before left; the draw is
    by inverse CDF over the ids in order of falling probability, so it moves little when logits do.
    """
    vocab = logits.shape[-1]
    is_greedy = temperature <= 0
    scaled = logits / torch.where(is_greedy, 1.0, temperature).unsqueeze(1)
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    limit = torch.where((top_k <= 0) | is_greedy, torch.where(is_greedy, 1, vocab), top_k)
    kept = rank.unsqueeze(0) < limit.unsqueeze(1)
    probs = ordered.masked_fill(~kept, -torch.inf).softmax(dim=-1)
    # A token stays while the mass before it is below top_p, so the most likely one always stays.
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= top_p.unsqueeze(1), 0.0)
    probs = probs.masked_fill(probs < min_p.unsqueeze(1) * probs[:, :1], 0.0)
    cumulative = probs.cumsum(dim=-1)
    target = uniforms.unsqueeze(1) * cumulative[:, -1:]
    chosen = (cumulative <= target).sum(dim=-1).clamp_(max=vocab - 1)
    # Rounding may put the target at the very top: step back onto the last id that has any mass.
    last = (probs > 0).sum(dim=-1) - 1
    chosen = torch.minimum(chosen, last.clamp_(min=0))
    return ids.gather(1, chosen.unsqueeze(1)).squeeze(1)


def apply_mask(logits: Tensor, words: Tensor) -> Tensor:
    """Set ids whose bit is 0 to -inf. logits (R, V); words (R, ceil(V/32)) int32, id i at bit i % 32."""
    vocab = logits.shape[-1]
    ids = torch.arange(vocab, device=logits.device)
    bits = (words[:, ids >> 5] >> (ids & 31).to(torch.int32)) & 1
    return logits.masked_fill(bits == 0, -torch.inf)


def penalise(
    logits: Tensor, counts: Tensor, seen: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> Tensor:
    """Presence and frequency penalties over generated ids, repetition over prompt and generated ids.

    logits (R, V) fp32; counts (R, V) int16 generated so far; seen (R, V) bool; the rest (R,) fp32.
    """
    factor = torch.where(seen, repetition.unsqueeze(1), 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency.unsqueeze(1) * counts - presence.unsqueeze(1) * (counts > 0)
