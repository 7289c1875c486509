"""Owns the head: hidden states to logits that leave as the fp32 sums of their products, unrounded. Decode thread.

Rounded to bf16, logits near 20 lie 1/8 apart, and a greedy answer takes whichever of two near ones comes first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.models.linear import PackedLinear, arrivals_for, is_few
from worker.models.words import TiedWords
from worker.native.products import products
from worker.native.quantised import Quantised

KEPT_BYTES = 1 << 30
"""On a CPU a head of bf16 weights is kept in fp32 up to this size. Measured (AVX2, one thread, 49152×576 and
151936×1024): as quick as bf16 at one row, 3 to 7 times at 8 and 32; half as quick at one row if cast block by block."""
_BLOCK_ROWS = {"cpu": 256, "cuda": 16384}


class Head:
    """`x Wᵀ + b` in fp32 of a weight (V, D), a tensor or a file's blocks, and bias (V,) or None, on their final device and dtype.

    `scale` multiplies the logits; `cap` c then makes a logit l c·tanh(l/c), 0: leaves it. `dtype` is that of the hidden states,
    by default the weight's. `consumes`: nobody else reads a tensor that is packed here.
    """

    __slots__ = ("_arrivals", "_bias", "_cap", "_multiply", "_own_bias", "_packed", "_scale", "_weight")

    def __init__(
        self,
        weight: Tensor | Quantised,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        cap: float = 0.0,
        dtype: torch.dtype | None = None,
        consumes: bool = False,
    ) -> None:
        self._packed: PackedLinear | None = None
        self._scale, self._cap = scale, cap
        self._multiply: Callable[[Tensor], Tensor]
        self._bias: Tensor | None = None
        self._own_bias = None if bias is None else bias.float()
        self._arrivals: Tensor | None = None
        if not isinstance(weight, Tensor):
            self._packed = PackedLinear(weight, bias, dtype=dtype)
            self._multiply = self._packed.logits
            return
        on_cpu = weight.device.type == "cpu"
        native = products(weight.device)
        dtype = dtype or weight.dtype
        can_pack = native is not None and native.can_multiply(dtype, weight.shape[1], weight.shape[0])
        if can_pack or weight.device.type == "meta":
            # The repacked copy alone is kept: words are looked up in it where it is their table too, see `words`.
            self._packed = PackedLinear(weight, bias, dtype=dtype, consumes=consumes)
            self._multiply = self._packed.logits
            return
        weight = weight.to(dtype)
        self._weight, self._bias = weight, self._own_bias
        if weight.is_contiguous():
            self._arrivals = arrivals_for(weight)
        if weight.dtype == torch.float32 or (on_cpu and weight.numel() * 4 <= KEPT_BYTES):
            # Tied weights: a CPU multiplies by a repacked copy, other devices by the tensor that serves both.
            kept, self._bias = PackedLinear(weight.float(), self._bias), None
            self._multiply = lambda x: kept(x.float())
        elif not on_cpu and sums_in_fp32(weight):
            self._multiply = lambda x: torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            self._multiply = self._by_blocks

    def words(self) -> TiedWords | None:
        """Its weight as a table to look rows up in; None where it cannot be read back."""
        packed = self._packed
        if packed is None or not (packed.reads_rows() or packed.device.type == "meta"):
            return None
        return TiedWords(packed)

    def __call__(self, x: Tensor) -> Tensor:
        """(R, D) normed hidden states → (R, V) fp32."""
        logits = self._multiply(x)
        if self._bias is not None:
            logits += self._bias
        return self._scaled(logits)

    def fused(self, x: Tensor) -> Tensor:
        """As `__call__` on a GPU, by its own kernel where that is chosen: the bias is then in the product."""
        if self._arrivals is None or not is_few(x):
            return self(x)
        from worker.kernels.few_rows_product import few_rows_product  # here: no CPU worker imports Triton

        given = (x, self._weight, self._arrivals, self._own_bias)
        return self._scaled(few_rows_product(*given, out_dtype=torch.float32))

    def _scaled(self, logits: Tensor) -> Tensor:
        if self._scale != 1.0:
            logits *= self._scale
        if self._cap:
            logits.div_(self._cap).tanh_().mul_(self._cap)
        return logits

    def _by_blocks(self, x: Tensor) -> Tensor:
        """Some rows of the weight at a time, cast to fp32: no copy of all of it, and the casts stay in the caches."""
        x = x.float()
        num = self._weight.shape[0]
        logits = torch.empty(x.shape[0], num, dtype=torch.float32, device=x.device)
        step = _BLOCK_ROWS[x.device.type]
        for at in range(0, num, step):
            block = self._weight[at : at + step].float()
            logits[:, at : at + step] = F.linear(x, block)
        return logits


def sums_in_fp32(weight: Tensor) -> bool:
    """Whether this device multiplies by weights of this dtype and gives out the fp32 sums."""
    few = weight[:16]
    try:
        torch.mm(few, few.t(), out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True
