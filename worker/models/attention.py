"""Owns a forward's attention over paged memory, by the compiled operations or by torch. Decode thread.

One `AttentionPlan` is built a forward; it holds what all layers share, so a layer costs two writes, two gathers and
one product for each kind of row. `torch_attention` holds the part done by torch, also the GPU kernels' reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from worker.forward import KVCache, StepTokens
from worker.models.paged_convolution import PagedConvolution
from worker.models.torch_attention import FULL, GatherSpace, LayerAttention, TorchRows, multiplies_bf16
from worker.native.operations import Operations
from worker.native.token_rows import TokenRows, token_rows


def fuses(device: torch.device, head_dim: int) -> bool:
    """Whether forwards on this device go through `worker.kernels.fused` instead of this module."""
    if device.type != "cuda":
        return False
    from worker.kernels.fused import can_fuse  # here, so that no CPU worker imports Triton

    return can_fuse(head_dim)


def fastest_kv_dtype(device: torch.device, dtype: torch.dtype, native: Operations | None) -> torch.dtype:
    """What paged memory should hold for weights of `dtype`.

    fp32 on a CPU whose attention in bf16 is several times slower, and always for fp32 weights; else their dtype.
    """
    if device.type != "cpu" or (dtype == torch.bfloat16 and (native is not None or multiplies_bf16())):
        return dtype
    return torch.float32


def readable_kv_dtypes(
    fastest: torch.dtype, dtype: torch.dtype, head_dim: int, rotary_dim: int, native: Operations | None
) -> tuple[torch.dtype, ...]:
    """All that paged memory may hold for activations of `dtype`: the compiled attention reads others than the fastest."""
    if native is None:
        return (fastest,)
    both = (torch.float32, torch.bfloat16)
    return tuple(
        kept for kept in both if kept == fastest or native.can_attend(dtype, kept, head_dim, rotary_dim)
    )


Split = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""A qkv product (N, (H + 2·KH)·D) and rotations (N, 1, R/2) → rotated q (N, H, D), rotated k and v (N, KH, D)."""


class AttentionPlan:
    """What every layer of one forward needs to attend; build it once, call `attend` or `attend_product` once a layer.

    With `native` operations and the step's `rotations`, each (N, 1, R/2) complex64, `attend_product` has them do all
    of the work behind a product of `dtype`, pages read where they lie, if they take such heads and pages. Raises
    ValueError when a chunk ends inside a prefix that it also begins in: positions of a bidirectional prefix need all
    of it, cached or in the same chunk.
    """

    def __init__(
        self,
        tokens: StepTokens,
        cache: KVCache,
        space: GatherSpace | None = None,
        native: Operations | None = None,
        rotations: Tensor | Sequence[Tensor] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._cache = cache
        self._space = space
        self._tokens = tokens
        self._dtype = cache.keys[0].dtype
        self._rotations = (rotations,) if isinstance(rotations, Tensor) else rotations
        self._native_rows: TokenRows | None = None
        self._by_window: dict[int, TorchRows] = {}
        self._convolution: PagedConvolution | None = None
        self._native = native
        head_dim = cache.keys[0].shape[3]
        if (
            native is not None
            and self._rotations
            and native.can_attend(dtype, self._dtype, head_dim, 2 * self._rotations[0].shape[-1])
        ):
            self._native_rows = token_rows(tokens)
        if self._native_rows is None:
            self._torch_rows(0)  # now, because it refuses what cannot be attended to

    @cached_property
    def log_positions(self) -> Tensor:
        """(N, 1) fp32: ln(p + 1) of each token's position, for layers that scale by it."""
        return (self._tokens.positions.float() + 1.0).log_().unsqueeze(1)

    def attend_product(
        self,
        layer: int,
        qkv: Tensor,
        num_heads: int,
        split: Split,
        *,
        qk_weight: Tensor | None = None,
        eps: float = 0.0,
        kind: LayerAttention = FULL,
    ) -> Tensor:
        """As `attend`, from the qkv product (N, (H + 2·KH)·D); returns (N, H·D) in its dtype.

        `split` is called where no native operation takes the rows. `qk_weight` (H + KH, D) fp32 and `eps` describe the
        RMS norm of each head of q and k, which `split` also applies, to the native operations.
        """
        rotation, rows = self._rotations[kind.rotation], self._native_rows
        if self._native is None or rows is None:
            return self.attend(layer, *self._parts(split(qkv, rotation)), kind).to(qkv.dtype)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = qkv.new_empty(rows.num, num_heads * keys.shape[3])
        write_index = self._tokens.write_index
        self._native.attend(
            qkv,
            keys,
            values,
            write_index,
            rows,
            rotation,
            num_heads,
            out,
            qk_weight,
            eps,
            window=kind.window,
            cap=kind.cap,
        )
        return out

    def _parts(self, heads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = heads
        return query.to(self._dtype), key.to(self._dtype), value.to(self._dtype)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, kind: LayerAttention = FULL
    ) -> Tensor:
        """Write this layer's K and V, then attend, by torch.

        `query` (N, H, D), `key` and `value` (N, KH, D), all in the cache's dtype, H a multiple of KH. Returns
        (N, H·D) in the cache's dtype.
        """
        return self._torch_rows(kind.window).attend(layer, query, key, value, kind)

    def convolve(self, place: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `PagedConvolution`; all layers of a model have as many taps."""
        if self._convolution is None:
            self._convolution = PagedConvolution(self._tokens, self._cache, len(weight))
        return self._convolution(place, inputs, weight, bias)

    def _torch_rows(self, window: int) -> TorchRows:
        rows = self._by_window.get(window)
        if rows is None:
            tokens = self._tokens
            rows = TorchRows(
                tokens.decode, tokens.prefills, tokens.write_index, self._cache, self._space, window
            )
            self._by_window[window] = rows
        return rows
