"""Owns applying a grammar's bit mask to logits in place, for paths that do not sample with it at once. Decode thread."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _mask_row(logits_ptr, words_ptr, logits_stride, words_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < VOCAB
    word = tl.load(words_ptr + row * words_stride + ids // 32, mask=inside, other=-1)
    banned = ((word >> (ids % 32)) & 1) == 0
    # Allowed logits are neither read nor written: the kernel reads one bit a logit and writes the banned ones.
    tl.store(logits_ptr + row * logits_stride + ids, -float("inf"), mask=inside & banned)


def mask_logits(logits: Tensor, words: Tensor) -> Tensor:
    """Set ids whose bit is 0 to -inf, in place; returns `logits`.

    logits (R, V) fp32, rows may be strided; words (R, ceil(V/32)) int32, id i at bit i % 32 of word i // 32. The
    reference is `worker.step.sampler.apply_mask`.
    """
    rows, vocab = logits.shape
    assert words.dtype == torch.int32 and words.shape == (rows, (vocab + 31) // 32)
    assert logits.stride(1) == 1 and words.stride(1) == 1
    _mask_row[(rows, triton.cdiv(vocab, BLOCK))](
        logits, words, logits.stride(0), words.stride(0), VOCAB=vocab, BLOCK=BLOCK, num_warps=4
    )
    return logits
