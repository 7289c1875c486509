"""Owns weights in ggml's blocks, and the levels, scales and offsets that they say. Decode thread.

Every kind is `scale · q + least` with q of at most eight bits and a scale for every 16 or 32 inputs, exactly as ggml's
reference computes it. Compiled products read that form, so nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Levels:
    """A weight (rows, columns) taken apart: `scale · q + least`, with one scale for so many columns of a row."""

    q: Tensor  # (rows, columns) int8
    scale: Tensor  # (rows, columns / n) fp32
    least: Tensor | None  # the same; None for 0

    kind = "levels"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): outputs and inputs."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def scale_inputs(self) -> int:
        """Columns that share a scale."""
        return self.q.shape[1] // self.scale.shape[1]

    def ordered(self, rows: Tensor) -> Levels:
        """The rows in that order."""
        return Levels(self.q[rows], self.scale[rows], None if self.least is None else self.least[rows])

    def part(self, first: int, last: int) -> Levels:
        """Some of the rows, in the same memory."""
        least = None if self.least is None else self.least[first:last]
        return Levels(self.q[first:last], self.scale[first:last], least)

    def levels(self) -> Levels:
        """Itself."""
        return self

    def scaled(self, factor: float) -> Levels:
        """The same levels, their scales and offsets times `factor`."""
        return Levels(self.q, self.scale * factor, None if self.least is None else self.least * factor)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.q.device

    def dequantised(self) -> Tensor:
        """(rows, columns) fp32."""
        values = self.q.float().view(len(self.q), -1, self.scale_inputs) * self.scale.unsqueeze(-1)
        return torch.flatten(values if self.least is None else values + self.least.unsqueeze(-1), 1)

    def in_sixteens(self) -> Levels:
        """These levels with a scale and an offset for every 16 columns."""
        times = self.scale_inputs // 16
        least = None if self.least is None else self.least.repeat_interleave(times, 1)
        return Levels(self.q, self.scale.repeat_interleave(times, 1), least)


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A matrix of outputs by inputs in ggml's blocks, which run along the inputs: whole rows may change places.

    `kind` is ggml's name, such as Q4_K; `blocks` (rows, bytes of a row) uint8. Raises ValueError for a kind that is not known
    here, and for blocks that are not `columns` wide.
    """

    kind: str
    rows: int
    columns: int
    blocks: Tensor

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"weights in {self.kind} are not known; {', '.join(KINDS)} are")
        values, num_bytes, _ = KINDS[self.kind]
        found = tuple(self.blocks.shape)
        if self.columns % values or found != (self.rows, self.columns // values * num_bytes):
            raise ValueError(f"{self.rows} rows of {self.columns} in {self.kind} are no {found} bytes")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): outputs and inputs."""
        return self.rows, self.columns

    def ordered(self, rows: Tensor) -> QuantisedWeight:
        """The rows in that order, such as `pair_order`'s of a head."""
        return QuantisedWeight(self.kind, len(rows), self.columns, self.blocks[rows])

    def part(self, first: int, last: int) -> QuantisedWeight:
        """Some of the rows, in the same memory."""
        return QuantisedWeight(self.kind, last - first, self.columns, self.blocks[first:last])

    def scaled(self, factor: float) -> Levels:
        """The weight times `factor`."""
        return self.levels().scaled(factor)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.blocks.device

    def levels(self) -> Levels:
        """What the blocks say."""
        _, num_bytes, read = KINDS[self.kind]
        parts = read(self.blocks.view(-1, num_bytes))
        shaped = [None if part is None else part.reshape(self.rows, -1) for part in parts]
        q, scale, least = shaped
        assert q is not None and scale is not None
        return Levels(q, scale.contiguous(), None if least is None else least.contiguous())

    def dequantised(self) -> Tensor:
        """(rows, columns) fp32, equal to ggml's."""
        return self.levels().dequantised()


Quantised = QuantisedWeight | Levels


def stacked(parts: Sequence[Quantised]) -> Quantised:
    """One weight of all parts' rows, such as q, k and v: as blocks if they are of one kind, else as levels."""
    return _joined(parts, dim=0)


def beside(parts: Sequence[Quantised]) -> Quantised:
    """One weight of all parts' columns, for a product over several inputs: blocks if they are of one kind, else levels."""
    return _joined(parts, dim=1)


def _joined(parts: Sequence[Quantised], dim: int) -> Quantised:
    blocks = [part for part in parts if isinstance(part, QuantisedWeight)]
    if len(blocks) == len(parts) and len({part.kind for part in blocks}) == 1:
        together = torch.cat([part.blocks for part in blocks], dim)
        columns = sum(part.columns for part in blocks) if dim else blocks[0].columns
        return QuantisedWeight(blocks[0].kind, len(together), columns, together)
    levels = [part.levels().in_sixteens() for part in parts]
    least: Tensor | None = None
    if any(part.least is not None for part in levels):
        known = [torch.zeros_like(part.scale) if part.least is None else part.least for part in levels]
        least = torch.cat(known, dim)
    q, scale = torch.cat([part.q for part in levels], dim), torch.cat([part.scale for part in levels], dim)
    return Levels(q, scale, least)


_Parts = tuple[Tensor, Tensor, Tensor | None]
"""The parts of N blocks: q (N, values) int8, scale (N, scales) fp32, least (N, scales) fp32 or None."""


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(..., B) → (..., 2 B) int8: all lower halves, then all upper ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).view(torch.int8)


def _fifth_bits(packed: Tensor) -> Tensor:
    """(N, 4) → (N, 32) int8: 16 for each bit that is set, the lowest first."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return (bits << 4).flatten(1).view(torch.int8)


def _q8_0(blocks: Tensor) -> _Parts:
    return blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None


def _q4_0(blocks: Tensor) -> _Parts:
    return _nibbles(blocks[:, 2:]) - 8, _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> _Parts:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Tensor) -> _Parts:
    return (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])) - 16, _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> _Parts:
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets (N, 8) of Q4_K and Q5_K: six bits each, of the last four the upper two lie with the first four's."""
    scales, minima, both = blocks[:, 4:16].split(4, dim=1)
    scale = torch.cat((scales & 63, both & 15 | scales >> 2 & 48), dim=1).float()
    least = torch.cat((minima & 63, both >> 4 | minima >> 2 & 48), dim=1).float()
    return _half(blocks, 0) * scale, _half(blocks, 2) * -least


def _q4_k(blocks: Tensor) -> _Parts:
    return _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1), *_k_scales(blocks)


def _q5_k(blocks: Tensor) -> _Parts:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(1, 8, 1)
    high = (blocks[:, 16:48].unsqueeze(1) >> shifts & 1) << 4
    return (low | high.view(torch.int8)).flatten(1), *_k_scales(blocks)


def _q6_k(blocks: Tensor) -> _Parts:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).reshape(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3) << 4
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return (low | high.view(torch.int8)).flatten(1) - 32, scale, None


KINDS: dict[str, tuple[int, int, Callable[[Tensor], _Parts]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
"""By ggml's name: values and bytes of a block, and the function that takes blocks apart."""
