"""Owns rounding matrices to ggml's blocks with little squared error: Q8_0 for int8, Q4_1 for int4. Decode thread, at load.

The nearest levels of a block's whole range are not its best four bits: a scale that clips the outermost weight a little
serves the other thirty better. So, as ggml's own quantisers do for their k-quants, several ranges are tried a block;
for the levels of each the scale and offset follow by least squares, and the best of them is refined once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VERSION = 1
"""Goes up whenever the same matrix would come out otherwise: what was kept on disk is then made anew."""
VALUES = 32
KINDS_OF = {"int8": "Q8_0", "int4": "Q4_1"}
"""Settings of `quantize`, and the blocks that products are then kept in."""

_CLIPPED = (0.0, 0.04, 0.08, 0.12, 0.16)
"""Shares of a block's range that are cut off at both ends, tried one after another."""
_LARGEST = 60000.0  # scales and offsets are 16-bit floats
_ONCE = 1 << 13  # blocks: what is in work stays in the second-level cache


def fits(weight: Tensor) -> bool:
    """Whether blocks can hold this (outputs, inputs) matrix: whole blocks of finite numbers."""
    whole = weight.dim() == 2 and weight.shape[1] % VALUES == 0 and weight.numel() > 0
    return whole and bool(weight.abs().max() < _LARGEST)


def to_blocks(weight: Tensor, kind: str) -> Tensor:
    """weight (outputs, inputs) fp32 on a CPU that `fits` → (outputs, bytes of a row) uint8 of `kind`, Q8_0 or Q4_1."""
    rounds = _ROUND[kind]
    blocks = [rounds(some) for some in weight.reshape(-1, VALUES).split(_ONCE)]
    return torch.cat(blocks).view(weight.shape[0], -1)


def _q8_0(x: Tensor) -> Tensor:
    """(N, 32) → (N, 34): eight bits leave nothing to gain by clipping."""
    scale = (x.abs().amax(1, keepdim=True) / 127).half()
    q = _nearest(x, scale.float()).clamp_(-127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), 1)


def _q4_1(x: Tensor) -> Tensor:
    """(N, 32) → (N, 20)."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    span = high - low
    best_error, best_scale, best_least = None, span / 15, low
    for clipped in _CLIPPED:
        scale, least = _fitted(x, span * ((1 - 2 * clipped) / 15), low + span * clipped)
        error = (_levels(x, scale, least).mul_(scale).add_(least) - x).square_().sum(1, keepdim=True)
        if best_error is None:
            best_error, best_scale, best_least = error, scale, least
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_least = torch.where(better, least, best_least)
    scale, least = (part.half() for part in _fitted(x, best_scale, best_least))
    q = _levels(x, scale.float(), least.float()).to(torch.uint8)
    packed = q[:, :16] | q[:, 16:] << 4
    return torch.cat((scale.view(torch.uint8), least.view(torch.uint8), packed), 1)


def _fitted(x: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset (N, 1) that suit the levels best which these two give; themselves for a block of one level."""
    q = _levels(x, scale, least)
    q_sum, x_sum = q.sum(1, keepdim=True), x.sum(1, keepdim=True)
    spread = VALUES * q.square().sum(1, keepdim=True) - q_sum.square()
    slope = (VALUES * (q * x).sum(1, keepdim=True) - q_sum * x_sum) / spread
    scale = torch.where(spread > 0, slope, scale)
    return scale, torch.where(spread > 0, (x_sum - slope * q_sum) / VALUES, least)


def _levels(x: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    return _nearest(x - least, scale).clamp_(0, 15)


def _nearest(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, rounded; 0 where the scale is 0."""
    return (x * torch.where(scale == 0, 0.0, 1 / scale)).round_()


_ROUND: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "Q4_1": _q4_1}
