"""Owns a plain copy of the integer products' arithmetic (worker/native/integer_products.h), in torch, one block after another."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.native.quantised import KINDS, Quantised, QuantisedWeight

GROUP = 16
HALVES = {  # where blocks of a kind hold 16-bit floats, which must be neither huge nor nothing
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(kind: str, rows: int, columns: int) -> QuantisedWeight:
    """Blocks of any bits, but for 16-bit floats that are neither huge nor nothing."""
    values, num_bytes, _ = KINDS[kind]
    blocks = torch.randint(0, 256, (rows * columns // values, num_bytes), dtype=torch.uint8)
    for at in HALVES.get(kind, (0,)):
        blocks[:, at : at + 2] = (torch.rand(len(blocks), 1).half() / 16).view(torch.uint8)
    return QuantisedWeight(kind, rows, columns, blocks.view(rows, -1))


def rounded_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, inputs) → q (rows, inputs) int64, scales (rows, inputs / 16) fp32."""
    groups = x.float().view(len(x), -1, GROUP)
    most = groups.abs().amax(-1)
    inverse = torch.full_like(most, 127.0) / most  # 127 / x would be torch's 127 · (1 / x)
    times = torch.where(most < 1e-36, 0.0, inverse)
    scale = torch.where(most < 1e-36, 0.0, most / 127.0)
    return torch.round(groups.double() * times.double().unsqueeze(-1)).long().flatten(1), scale


def fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x · y + z of fp32, rounded once (but for ties that fp64 makes, one in 2^29)."""
    return (x.double() * y.double() + z.double()).float()


def plain_product(x: Tensor, weight: Quantised) -> Tensor:
    """x (rows, inputs) finite → (rows, outputs) fp32."""
    levels = weight.levels()
    step, offset = GROUP, 8 if weight.kind == "Q4_0" else 0
    q, scale = rounded_inputs(x)
    sums = torch.zeros(len(x), len(levels.q))
    for at in range(0, q.shape[1], step):
        own, of_weight = scale[:, at // step].unsqueeze(1), at // levels.scale_inputs
        part = q[:, at : at + step]
        dots = part.double() @ (levels.q[:, at : at + step].double() + offset).T
        dots -= offset * part.sum(-1, keepdim=True)
        sums = fused(dots.float(), levels.scale[:, of_weight] * own, sums)
        if levels.least is not None:
            sums = fused(
                levels.least[:, of_weight].expand_as(sums), own * part.sum(-1, keepdim=True).float(), sums
            )
    return sums
