"""Owns products with a weight: packed for the device that multiplies, from floats or from blocks. Decode thread.

On a CPU weights are reordered once, for the compiled products or for oneDNN (docs/architecture.md, "Devices"). For all
but very wide layers a packed product gives a row the same bits whatever the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.device.choices import choices
from worker.native.operations import LANES, Operations, operations
from worker.native.products import ADD, GATE, GELU, PLAIN, Linear, PackedWeight, Products, products
from worker.native.quantised import Levels, Quantised, QuantisedWeight, beside, stacked

if TYPE_CHECKING:
    from worker.kernels.integer_weight import IntegerWeight

Take = Callable[..., Tensor]
"""`take(name, *shape, dtype=…)`: a checkpoint's tensor by canonical name, of that shape, on the model's device.
Without `dtype` in the model's own."""

TakeWeight = Callable[..., "Tensor | Quantised"]
"""As `Take`, for the weight (out, in) of a product; it may hand out the file's own blocks."""

# Reordering for oneDNN needs a typical batch size; 32 measured best or equal from 1 to 128 rows.
_PACK_ROWS = 32


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and this CPU run packed products of `dtype`."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def by_kernels(device: torch.device) -> bool:
    """Whether products with quantised weights there are a GPU's kernels."""
    return device.type == "cuda" and choices().narrow_weights


def reads_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products for activations of `dtype` multiply by a file's quantised blocks as they are."""
    if by_kernels(device):
        return True
    found = products(device)
    return found is not None and found.multiplies_blocks(dtype)


def together(parts: Sequence[Tensor | Quantised]) -> Tensor | Quantised:
    """One weight of all parts' rows, such as q, k and v: in blocks if all of them are."""
    if len(parts) == 1:
        return parts[0]
    packed = [part for part in parts if not isinstance(part, Tensor)]
    if len(packed) == len(parts):
        return stacked(packed)
    return torch.cat(_alike(parts))


def side_by_side(parts: Sequence[Tensor | Quantised]) -> Tensor | Quantised:
    """One weight of all parts' inputs, for a product over all of them at once: in blocks if all of them are."""
    packed = [part for part in parts if not isinstance(part, Tensor)]
    if len(packed) == len(parts):
        return beside(packed)
    return torch.cat(_alike(parts), dim=1)


def _alike(parts: Sequence[Tensor | Quantised]) -> list[Tensor]:
    """All as tensors of the dtype that some of them are: on a CPU in fp32 if some were in blocks, which bf16 would round."""
    dtype = next(part.dtype for part in parts if isinstance(part, Tensor))
    if any(not isinstance(part, Tensor) and part.device.type == "cpu" for part in parts):
        dtype = torch.float32
    return [(part if isinstance(part, Tensor) else part.dequantised()).to(dtype) for part in parts]


class PackedLinear:
    """`y = x Wᵀ + b` with W in the layout this device multiplies fastest.

    Takes `weight` (out, in) and `bias` (out,) or None, on their final device, or a weight in blocks, which are multiplied as
    they are. Inputs are (..., in) of `dtype`, by default a tensor's own, for blocks the bias's or fp32 (on a GPU any); outputs
    (..., out). A bf16 weight for fp32 inputs is kept in bf16 where compiled products read that, else cast.
    `pack=False` keeps the plain product, for comparison. `gated`: the first half of the outputs gates the second, and only
    `silu_gate` may be called. `consumes`: nobody reads a packed tensor afterwards, so its memory is given back on the way.
    """

    __slots__ = (
        "_arrivals",
        "_bias",
        "_gated",
        "_integers",
        "_linear",
        "_native",
        "_operations",
        "_packed",
        "_weight",
        "device",
        "dtype",
        "in_features",
        "out_features",
    )

    def __init__(
        self,
        weight: Tensor | Quantised | IntegerWeight,
        bias: Tensor | None = None,
        *,
        pack: bool = True,
        gated: bool = False,
        dtype: torch.dtype | None = None,
        consumes: bool = False,
    ) -> None:
        if dtype is None and isinstance(weight, Tensor):
            dtype = weight.dtype
        if dtype is None:
            dtype = torch.float32 if bias is None else bias.dtype
        self.out_features, self.in_features = weight.shape
        self._integers: IntegerWeight | None = None
        self._arrivals: Tensor | None = None
        self._native: Products | None = None
        self._operations: Operations | None = None
        self._gated = self._packed = False
        self._bias = bias
        if not isinstance(weight, Tensor | QuantisedWeight | Levels):
            self._integers = weight
        elif not isinstance(weight, Tensor) and by_kernels(weight.device):
            from worker.kernels.integer_weight import repack  # here, so that no CPU worker imports Triton

            levels = weight.levels()
            self._integers = repack(levels.q, levels.scale, levels.least)
        if self._integers is not None:
            self.dtype, self.device = torch.float32, self._integers.packed.device
            return
        assert isinstance(weight, Tensor | QuantisedWeight | Levels)
        self._weight: Any
        if weight.device.type == "meta":  # a model that is only counted, see `blank`
            self._weight, self.dtype, self.device = weight, dtype, weight.device
            return
        native = (
            products(weight.device if isinstance(weight, Tensor) else torch.device("cpu")) if pack else None
        )
        if not isinstance(weight, Tensor) and (native is None or not native.multiplies_blocks(dtype)):
            weight = weight.dequantised().to(dtype)
        self.device = torch.device("cpu")
        if isinstance(weight, Tensor):
            self.device = weight.device
            if native is not None and not native.can_multiply(dtype, self.in_features, self.out_features):
                native = None
            if native is None or not native.packs(weight, dtype):
                weight = weight.to(dtype)
        self.dtype = dtype
        self._native = native
        can_gate = gated and self.out_features % (2 * LANES) == 0
        self._gated = can_gate and native is not None
        self._operations = operations(self.device) if can_gate else None
        if self._gated:
            assert native is not None
            order = native.gate_order(self.out_features)
            weight = weight[order] if isinstance(weight, Tensor) else weight.ordered(order)
            bias = None if bias is None else bias[order]
        if native is not None:
            self._weight = native.pack(weight, bias, dtype, consumes=consumes)
        else:
            assert isinstance(weight, Tensor)
            self._packed = pack and can_pack(weight.device, weight.dtype)
            contiguous = weight.contiguous()
            reorder = torch.ops.mkldnn._reorder_linear_weight if self._packed else None
            self._weight = contiguous if reorder is None else reorder(contiguous, _PACK_ROWS)
            if reorder is None:
                self._arrivals = arrivals_for(contiguous)
        self._linear: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise if self._packed else F.linear

    @property
    def weight(self) -> Tensor | Quantised:
        """The weight of a model that is only counted, see `blank`."""
        weight: Tensor | Quantised = self._weight
        return weight

    @property
    def native(self) -> Linear | None:
        """The addresses of the packed weights, for a call over whole layers; None if they are not packed for it."""
        if self._native is None:
            return None
        packed: PackedWeight = self._weight
        return packed.linear

    @property
    def gates_native(self) -> bool:
        """Whether the gate is taken inside the product."""
        return self._gated

    def reads_rows(self) -> bool:
        """Whether `rows` is there: the weight is packed for compiled products."""
        return self._native is not None and not self._gated

    def rows(self, index: Tensor) -> Tensor:
        """index (N,) int64 → those rows of the weight (N, in), in `dtype`: to the last bit as they came."""
        assert self._native is not None and not self._gated
        return self._native.rows(self._weight, index)

    def part(self, first: int, last: int) -> PackedLinear:
        """The product of some outputs, in the same memory. Only of a weight on a GPU, or one that is not packed."""
        assert self._native is None and not self._packed
        weight = self._weight[first:last] if self._integers is None else self._integers.rows(first, last)
        return PackedLinear(weight, None if self._bias is None else self._bias[first:last], pack=False)

    def _by_kernel(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        from worker.kernels.quantised_linear import quantised_linear

        assert self._integers is not None
        found = quantised_linear(x.reshape(-1, self.in_features), self._integers, self._bias, dtype)
        return found.view(*x.shape[:-1], self.out_features)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        assert not self._gated
        if self._integers is not None:
            return self._by_kernel(x, x.dtype)
        if self._native is not None:
            return self._native.multiply(x, self._weight, None, PLAIN)
        if self._packed:
            return self._linear(x, self._weight, self._bias, "none", [], "")
        return self._linear(x, self._weight, self._bias)

    def logits(self, x: Tensor) -> Tensor:
        """x W^T + b in fp32: unrounded sums where the product is compiled, or a GPU's; else fp32 of the rounded."""
        if self._native is not None:
            return self._native.unrounded(x, self._weight)
        if self._integers is not None:
            return self._by_kernel(x, torch.float32)
        if x.device.type == "cuda" and x.dtype != torch.float32:
            summed: Tensor = torch.mm(x.flatten(0, -2), self._weight.t(), out_dtype=torch.float32)
            summed = summed if self._bias is None else summed + self._bias
            return summed.view(*x.shape[:-1], self.out_features)
        return self(x).float()

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh approximation) of x Wᵀ + b."""
        if self._native is not None:
            return self._native.multiply(x, self._weight, None, GELU)
        if self._packed:
            return self._linear(x, self._weight, self._bias, "gelu", [], "tanh")
        return F.gelu(self(x), approximate="tanh")

    def silu_gate(self, x: Tensor) -> Tensor:
        """silu(g) · u of the halves g, u (..., out / 2) of x Wᵀ + b."""
        if self._gated:
            assert self._native is not None
            return self._native.multiply(x, self._weight, None, GATE)
        both = self(x)
        if self._operations is not None:
            return self._operations.silu_gate(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def gelu_gate(self, x: Tensor) -> Tensor:
        """gelu(g) · u of the halves g, u (..., out / 2) of x Wᵀ + b, with the tanh approximation."""
        gate, up = self(x).chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x Wᵀ + b; `residual` (..., out) is left as it was."""
        if self._native is not None:
            return self._native.multiply(x, self._weight, residual, ADD)
        if self._packed:
            summed: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x, residual, self._weight, self._bias, "add"
            )
            return summed
        return residual + self(x)

    def takes_few(self, x: Tensor) -> bool:
        """Whether `few` is chosen and multiplies so many rows, x (N, in)."""
        return self._arrivals is not None and is_few(x)

    def few(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        gate: str | None = None,
        gelu_out: Tensor | None = None,
    ) -> Tensor:
        """x W^T + b by a GPU's own kernel, see `worker.kernels.few_rows_product`; only where `takes_few`."""
        from worker.kernels.few_rows_product import few_rows_product  # here: no CPU worker imports Triton

        assert self._arrivals is not None
        given = (x, self._weight, self._arrivals, self._bias)
        return few_rows_product(*given, residual=residual, gate=gate, gelu_out=gelu_out)

    def fused(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As `__call__`, or `add`, on a GPU: x (N, in) by its own kernel where that is chosen, else by cuBLAS."""
        if self.takes_few(x):
            return self.few(x, residual=residual)
        return self(x) if residual is None else residual + self(x)

    def gelu_fused(self, x: Tensor) -> Tensor:
        """As `gelu` for many rows on a GPU: the GELU in the product (cuBLAS's epilogue) where that is chosen, else a kernel."""
        is_plain = self._native is None and self._integers is None and not self._packed
        if choices().vision_gelu and self._bias is not None and is_plain:
            return product_gelu(self._bias, x, self._weight)
        from worker.kernels.activation import gelu_tanh

        return gelu_tanh(self(x))


def arrivals_for(weight: Tensor) -> Tensor:
    """The counters (int32, all 0) that `few_rows_product` needs beside a weight (out, in), of its smallest tiles. Made with
    the weight: what is made while a graph is recorded belongs to the graph."""
    return torch.zeros(-(-weight.shape[0] // 16), dtype=torch.int32, device=weight.device)


def is_few(x: Tensor) -> bool:
    """Whether products by a GPU's own kernel are chosen, and take so many rows, x (N, in)."""
    return x.shape[0] <= 32 and has_own_products(x.device)


def has_own_products(device: torch.device) -> bool:
    """Whether products of few rows are by a GPU's own kernel: they are chosen, and the card has room for them."""
    if not choices().own_products or device.type != "cuda":
        return choices().own_products  # interpreted kernels take any
    from worker.kernels.few_rows_product import suits  # here: no CPU worker imports Triton

    return suits(device)


def product_gelu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """GELU (tanh approximation) of x Wᵀ + b, in the product where cuBLAS does it. Torch's own means erf on a CPU."""
    if x.device.type != "cuda":
        return F.gelu(torch.addmm(bias, x, weight.t()), approximate="tanh")
    fused: Tensor = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return fused
