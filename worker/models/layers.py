"""Owns the layers that every family is built of: norms, MLPs, and taking them from a checkpoint by name. Decode thread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.linear import PackedLinear, Take, TakeWeight
from worker.native.operations import LANES, operations


class LayerNorm:
    """Layer normalisation over the last dimension with weight and bias (D,), eps 1e-5 unless told."""

    __slots__ = ("_native", "_shape", "bias", "eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps
        self._shape = list(weight.shape)
        self._native = operations(weight.device) if self._shape[0] % LANES == 0 else None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D), same dtype."""
        if self._native is not None:
            return self._native.layer_norm(x.contiguous(), self.weight, self.bias, self.eps)
        return torch.layer_norm(x, self._shape, self.weight, self.bias, self.eps)

    def fused(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + residual, its norm) in one pass on a GPU; both (N, D)."""
        from worker.kernels.norm import layer_norm  # here, so that no CPU worker imports Triton

        return layer_norm(x, self.weight, self.bias, self.eps, residual)


class RmsNorm:
    """Root-mean-square normalisation over the last dimension with weight (D,), of the input's dtype or fp32.

    On a CPU, torch has a fused layer norm but composes RMS norms of half a dozen operations. The vector (x, -x) has
    mean 0 and the variance mean(x^2), so its layer norm begins with the RMS norm of x: 4.8 against 12.5 us a row,
    16.4 against 18.5 us for 32 (384 wide, bf16), and rounded once instead of twice.
    """

    __slots__ = ("_dim", "_doubled", "_native", "_no_bias", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._dim = weight.shape[0]
        self._native = operations(weight.device) if self._dim % LANES == 0 else None
        self._doubled = torch.cat([weight, weight]) if weight.device.type == "cpu" else None
        self._no_bias = None if self._doubled is None else torch.zeros_like(self._doubled)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D), same dtype; on a CPU a view with gaps."""
        if self.weight.dtype != x.dtype:
            return F.rms_norm(x.float(), (self._dim,), self.weight, self.eps).to(x.dtype)
        if self._native is not None:
            return self._native.rms_norm(x.contiguous(), self.weight, self.eps)
        if self._doubled is None:
            return F.rms_norm(x, (self._dim,), self.weight, self.eps)
        both = torch.cat((x, -x), -1)
        normed = torch.layer_norm(both, self._doubled.shape, self._doubled, self._no_bias, self.eps)
        return normed[..., : self._dim]

    def fused(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + residual, its norm) in one pass on a GPU; both (N, D)."""
        from worker.kernels.norm import rms_norm

        return rms_norm(x, self.weight, self.eps, residual)


class Mlp:
    """Two linear layers with a tanh-approximated GELU between them."""

    __slots__ = ("fc1", "fc2")

    def __init__(self, fc1: PackedLinear, fc2: PackedLinear) -> None:
        self.fc1, self.fc2 = fc1, fc2

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return self.fc2(self.fc1.gelu(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + mlp(x)."""
        return self.fc2.add(self.fc1.gelu(x), residual)


class GatedMlp:
    """`down(silu(gate(x)) * up(x))`, or with a tanh-approximated GELU; gate and up stacked in one product (2F, in)."""

    __slots__ = ("_gelu", "down", "gate_up")

    def __init__(self, gate_up: PackedLinear, down: PackedLinear, *, gelu: bool = False) -> None:
        self.gate_up, self.down = gate_up, down
        self._gelu = gelu

    def _inner(self, x: Tensor) -> Tensor:
        return self.gate_up.gelu_gate(x) if self._gelu else self.gate_up.silu_gate(x)

    def __call__(self, x: Tensor) -> Tensor:
        """mlp(x)."""
        return self.down(self._inner(x))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + mlp(x)."""
        return self.down.add(self._inner(x), residual)

    def fused(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """mlp(x), plus `residual` if given, with the gate in a kernel on a GPU."""
        if self.gate_up.takes_few(x):
            return self.down.fused(self.gate_up.few(x, gate="gelu" if self._gelu else "silu"), residual)
        from worker.kernels.activation import gelu_gate, silu_gate

        both = self.gate_up(x)
        return self.down.fused(gelu_gate(both) if self._gelu else silu_gate(both), residual)


def take_linear(
    take: Take, name: str, inputs: int, outputs: int, take_weight: TakeWeight | None = None
) -> PackedLinear:
    """The linear layer stored as `name.weight` and `name.bias`."""
    weight = (take_weight or take)(f"{name}.weight", outputs, inputs)
    return PackedLinear(weight, take(f"{name}.bias", outputs))


def take_norm(take: Take, name: str, dim: int, eps: float = 1e-5) -> LayerNorm:
    """The norm stored as `name.weight` and `name.bias`."""
    return LayerNorm(take(f"{name}.weight", dim), take(f"{name}.bias", dim), eps)


def take_mlp(
    take: Take, name: str, inputs: int, inner: int, outputs: int, take_weight: TakeWeight | None = None
) -> Mlp:
    """The two layers stored as `name.fc1` and `name.fc2`."""
    return Mlp(
        take_linear(take, f"{name}.fc1", inputs, inner, take_weight),
        take_linear(take, f"{name}.fc2", inner, outputs, take_weight),
    )
