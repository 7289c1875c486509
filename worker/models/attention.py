"""Owns a forward's attention over paged memory, by the compiled operations or by torch. Decode thread.

One `AttentionPlan` is built a forward; it holds what all layers share, so a layer costs two writes, two gathers and
one product for each kind of row. `torch_attention` holds the part done by torch, also the GPU kernels' reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.forward import KVCache, StepTokens
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


Split = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""A qkv product (N, (H + 2·KH)·D) and rotations (N, 1, R/2) → rotated q (N, H, D), rotated k and v (N, KH, D)."""


class AttentionPlan:
    """What every layer of one forward needs to attend; build it once, call `attend` or `attend_product` once a layer.

    With `native` operations and the step's `rotations`, each (N, 1, R/2) complex64, `attend_product` has them do all
    of the work behind a product of `dtype` for those tokens that they take (see `token_rows`), pages read where they
    lie. Layers that attend otherwise than `FULL` go by torch. Raises ValueError when a chunk ends inside a prefix that
    it also begins in: positions of a bidirectional prefix need all of it, cached or in the same chunk.
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
        self._native: Operations | None = None
        self._native_rows: TokenRows | None = None
        decode, prefills, write_index = tokens.decode, tokens.prefills, tokens.write_index
        self._by_window: dict[int, TorchRows] = {}
        if (
            native is not None
            and self._rotations
            and native.can_decode(
                dtype, self._dtype, cache.keys[0].shape[3], 2 * self._rotations[0].shape[-1]
            )
        ):
            self._native_rows = rows = token_rows(tokens)
            if rows is not None:
                self._native = native
                self._native_write_index = write_index[: rows.num]
                write_index = write_index[rows.num :]
                decode, prefills = None, prefills if len(write_index) else []
        # The rows that the native operations leave to torch; all rows without them.
        self._rest = TorchRows(decode, prefills, write_index, cache, space)
        if self._native is None:
            self._by_window[0] = self._rest

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

        `split` is called for the rows that no native operation takes. `qk_weight` (H + KH, D) fp32 and `eps` describe the
        RMS norm of each head of q and k, which `split` also applies, to the native operations.
        """
        rotation, rows = self._rotations[kind.rotation], self._native_rows
        if self._native is None or rows is None or not kind.is_full:
            return self.attend(layer, *self._parts(split(qkv, rotation)), kind).to(qkv.dtype)
        num = rows.num
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = qkv.new_empty(num, num_heads * keys.shape[3])
        self._native.decode(
            qkv[:num],
            keys,
            values,
            self._native_write_index,
            rows,
            rotation[:num],
            num_heads,
            out,
            qk_weight,
            eps,
        )
        if num == qkv.shape[0]:
            return out
        rest = self._rest.attend(layer, *self._parts(split(qkv[num:], rotation[num:])), kind)
        return torch.cat([out, rest.to(out.dtype)])

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
        rows = self._by_window.get(kind.window)
        if rows is None:
            tokens = self._tokens
            rows = TorchRows(
                tokens.decode, tokens.prefills, tokens.write_index, self._cache, self._space, kind.window
            )
            self._by_window[kind.window] = rows
        return rows.attend(layer, query, key, value, kind)
