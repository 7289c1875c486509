"""Owns unpacking ggml's block types: (N, bytes of a block) uint8 → (N, values of a block) fp32. Any thread.

Each function computes a type's values as ggml's reference does, in fp32 and in its order, so that they are equal to
the last bit. The `gguf` package, where it is installed, unpacks the types that have no function here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Unpack = Callable[[Tensor], Tensor]

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def unpacker(name: str) -> Unpack | None:
    """The function that unpacks blocks of that type; None if there is none."""
    return _UNPACK.get(name) or _from_package(name)


def _plain(dtype: torch.dtype) -> Unpack:
    return lambda blocks: blocks.view(dtype).float()


def _half(blocks: Tensor, start: int) -> Tensor:
    """(N, 1) fp32: the 16-bit float at byte `start` of each block."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(…, B) → (…, 2 B): all low halves, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: Tensor) -> Tensor:
    """(N, 4) → (N, 32): the bits of a little-endian word, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return (values.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return values.float() * _half(blocks, 0) + _half(blocks, 2)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 12) → (N, 8, 1) scales and minima of six bits each: four plain, four with their upper bits elsewhere."""
    scales, minima, both = packed.split(4, dim=1)
    return (
        torch.cat((scales & 63, both & 15 | scales >> 2 & 48), dim=1).float().unsqueeze(-1),
        torch.cat((minima & 63, both >> 4 | minima >> 2 & 48), dim=1).float().unsqueeze(-1),
    )


def _scaled_k(blocks: Tensor, values: Tensor) -> Tensor:
    """(N, 8, 32) integers of Q4_K or Q5_K → (N, 256)."""
    scales, minima = _k_scales(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0).unsqueeze(-1), _half(blocks, 2).unsqueeze(-1)
    return (scale * scales * values.float() - minimum * minima).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_k(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = blocks[:, 16:48].unsqueeze(1) >> shifts & 1
    return _scaled_k(blocks, low | high << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).reshape(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3
    values = (low | high << 4).reshape(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return torch.flatten(scales.unsqueeze(-1) * values, 1)


def _q2_k(blocks: Tensor) -> Tensor:
    packed, minimum = blocks[:, :16], _half(blocks, 82)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    values = (blocks[:, 16:80].unflatten(1, (2, 1, 32)) >> shifts & 3).reshape(-1, 16, 16).float()
    scales, minima = _half(blocks, 80) * (packed & 15).float(), minimum * (packed >> 4).float()
    return torch.flatten(scales.unsqueeze(-1) * values - minima.unsqueeze(-1), 1)


def _q3_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    low = (blocks[:, 32:96].unflatten(1, (2, 1, 32)) >> shifts.view(1, 1, 4, 1) & 3).reshape(-1, 16, 16)
    mask = (blocks[:, :32].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1) & 1).reshape(
        -1, 16, 16
    )
    values = low.float() - 4 * (1 - mask.float())
    packed = blocks[:, 96:108]
    scales = (
        _nibbles(packed[:, :8]) | (packed[:, 8:].unsqueeze(1) >> shifts.view(1, 4, 1) & 3).flatten(1) << 4
    )
    return (_half(blocks, 108) * (scales.float() - 32)).unsqueeze(-1).mul(values).flatten(1)


def _iq4_nl(blocks: Tensor) -> Tensor:
    table = torch.tensor(_IQ4_VALUES, dtype=torch.float32)
    return _half(blocks, 0) * table[_nibbles(blocks[:, 2:]).long()]


def _iq4_xs(blocks: Tensor) -> Tensor:
    table = torch.tensor(_IQ4_VALUES, dtype=torch.float32)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).flatten(1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    high = (blocks[:, 2:4].unsqueeze(-1) >> shifts & 3).flatten(1)
    scales = _half(blocks, 0) * ((low | high << 4).float() - 32)
    values = table[_nibbles(blocks[:, 8:].unflatten(1, (8, 16))).long()]
    return torch.flatten(scales.unsqueeze(-1) * values, 1)


_UNPACK: dict[str, Unpack] = {
    "F64": _plain(torch.float64),
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def _from_package(name: str) -> Unpack | None:
    """Unpacks the rarer types with the `gguf` package's numpy code: slower, and a dependency that few need."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        return None
    kind = getattr(GGMLQuantizationType, name, None)
    if kind is None or (name.startswith("I") and name[1:].isdigit()):
        return None
    return lambda blocks: torch.from_numpy(dequantize(blocks.numpy(), kind))
