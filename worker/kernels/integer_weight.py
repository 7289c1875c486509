"""Owns integer weights as a GPU's products read them: 8 or 4 bits in tiles, scales and offsets beside them. Decode thread.

A tile holds 64 outputs by one unit of inputs, and lies in memory as one piece: a program reads it with whole lines, and all
of a unit has one scale for an output, so that integers go through the matrix units as they are and sums are scaled after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
"""Outputs of a tile: Hopper's matrix units take their larger operand so."""


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A weight (out, in) as `(q - zero) · scale + least`; zero is 8 for 4 bits without an offset, else 0. Outputs and inputs are
    filled up to whole tiles by zeros."""

    packed: Tensor  # (T, U, 64, unit) int8; 4 bits: (T, U, 64, 16) uint8, the unit's first 16 inputs in the low halves
    scales: Tensor  # (T, U / ahead, 64, ahead) fp16 or fp32, a scale for each output of each unit
    least: Tensor | None  # the same; None for 0
    arrivals: (
        Tensor  # (T,) int32, all 0 but while a product runs: programs that share a tile count themselves here
    )
    bits: int
    shape: tuple[int, int]  # (out, in)

    @property
    def unit(self) -> int:
        """Inputs of a unit: 16 or 32."""
        return self.packed.shape[3] * (2 if self.bits == 4 else 1)

    @property
    def units(self) -> int:
        """Units of a row."""
        return self.packed.shape[1]

    @property
    def ahead(self) -> int:
        """Units whose scales are loaded together: 4, 2 or 1."""
        return self.scales.shape[3]

    @property
    def num_bytes(self) -> int:
        """What a product reads."""
        parts = (self.packed, self.scales, *([] if self.least is None else [self.least]))
        return sum(part.nbytes for part in parts)

    def rows(self, first: int, last: int) -> IntegerWeight:
        """Some of the outputs; in the same memory where they begin with a tile, else in their own."""
        outputs, inputs = self.shape
        if first % TILE or (last % TILE and last != outputs):
            q, scales, least = _levels(self)
            cut = slice(first, last)
            return _packed(
                q[cut], scales[cut], None if least is None else least[cut], self.unit, self.bits, inputs
            )
        tiles = slice(first // TILE, -(-last // TILE))
        return IntegerWeight(
            self.packed[tiles],
            self.scales[tiles],
            None if self.least is None else self.least[tiles],
            self.arrivals[tiles],
            self.bits,
            (last - first, inputs),
        )


def repack(q: Tensor, scale: Tensor, least: Tensor | None) -> IntegerWeight:
    """Levels q (out, in) int8 with scales and offsets (out, in / group) fp32 → the weight. It keeps 4 bits where they suffice.

    Groups hold 16 inputs, a multiple of 32, or all. Scales are kept in fp16 where that changes none by more than its rounding:
    products round what they scale to bf16 anyway.
    """
    inputs, groups = q.shape[1], scale.shape[1]
    assert inputs % groups == 0
    group = inputs // groups
    unit = 32 if group % 32 == 0 or groups == 1 else 16
    assert groups == 1 or group % unit == 0, f"groups of {group} inputs"
    lowest, highest = int(q.min()), int(q.max())
    fits = highest < 8 and lowest >= -8 if least is None else highest < 16 and lowest >= 0
    shrunk = [part for part in (scale, least) if part is not None]
    if all(map(_fits_half, shrunk)):
        scale, least = scale.half(), None if least is None else least.half()
    of_unit = (torch.arange(-(-inputs // unit), device=q.device) * unit // group).clamp_max(groups - 1)
    scale, least = scale[:, of_unit], None if least is None else least[:, of_unit]
    return _packed(q, scale, least, unit, 4 if fits and unit == 32 else 8, inputs)


def _packed(
    q: Tensor, scale: Tensor, least: Tensor | None, unit: int, bits: int, inputs: int
) -> IntegerWeight:
    """q (out, in) int8, scales and offsets (out, U): into tiles."""
    outputs, units = scale.shape
    tiles = -(-outputs // TILE)

    def filled(part: Tensor, columns: int) -> Tensor:
        return torch.nn.functional.pad(part, (0, columns - part.shape[1], 0, tiles * TILE - outputs))

    levels = filled(q, units * unit).view(tiles, TILE, units, unit).transpose(1, 2)
    if bits == 4:
        u = (levels + 8 if least is None else levels).to(torch.uint8)
        levels = u[..., :16] | (u[..., 16:] << 4)
    ahead = 4 if units % 4 == 0 else 2 if units % 2 == 0 else 1

    def beside(part: Tensor) -> Tensor:
        return filled(part, units).view(tiles, TILE, units // ahead, ahead).transpose(1, 2).contiguous()

    return IntegerWeight(
        levels.contiguous(),
        beside(scale),
        None if least is None else beside(least),
        torch.zeros(tiles, dtype=torch.int32, device=q.device),
        bits,
        (outputs, inputs),
    )


def _levels(weight: IntegerWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """q (out, in) int8, scales and offsets (out, U), as `_packed` takes them."""
    outputs, inputs = weight.shape
    packed = weight.packed
    if weight.bits == 4:
        packed = torch.cat([packed & 15, packed >> 4], dim=3).to(torch.int8)
        packed = packed - 8 if weight.least is None else packed

    def flat(part: Tensor) -> Tensor:
        return part.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs]

    q = flat(packed)[:, :inputs]
    return q, flat(weight.scales), None if weight.least is None else flat(weight.least)


def _fits_half(part: Tensor) -> bool:
    return bool(((part.half().float() - part).abs() <= part.abs() * 2**-11).all())


def quantise(weight: Tensor, bits: int = 8, group: int | None = None) -> IntegerWeight:
    """Round a (out, in) weight to `bits` (8 or 4), symmetric and to nearest. `group` None: one scale a row."""
    outputs, inputs = weight.shape
    group = group or inputs
    assert bits in (4, 8) and inputs % group == 0
    most = 2 ** (bits - 1) - 1
    grouped = weight.float().view(outputs, inputs // group, group)
    scales = grouped.abs().amax(dim=2).clamp_min(1e-12) / most
    rounded = (grouped / scales.unsqueeze(2)).round().clamp(-most, most).to(torch.int8).view(outputs, inputs)
    return repack(rounded, scales, None)


def dequantise(weight: IntegerWeight) -> Tensor:
    """The (out, in) fp32 weight that the integers stand for: the reference's."""
    q, scales, least = _levels(weight)
    inputs = weight.shape[1]
    each = q.float() * scales.float().repeat_interleave(weight.unit, 1)[:, :inputs]
    return each if least is None else each + least.float().repeat_interleave(weight.unit, 1)[:, :inputs]
