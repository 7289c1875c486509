"""Owns the reference paged attention: writing K and V to pages, and reading them back. Decode thread.

Plain torch, for CPUs and as the oracle of the GPU kernels. One `AttentionPlan` is built a forward; it holds what
all layers share (masks, page indices), so a layer costs two writes, two gathers and one product a kind of row.
It uses no host synchronisation: on a GPU the decode part can be captured for fixed shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.forward import DecodeRows, KVCache, PrefillSegment, StepTokens, check_prefix
from worker.native.operations import Operations
from worker.native.token_rows import TokenRows, token_rows


@dataclass(slots=True)
class _Segment:
    """One prefill chunk, worked out: `start:stop` in the step's tokens, and what its queries may see."""

    start: int
    stop: int
    num_keys: int  # context and chunk
    pages: Tensor | None  # None: the chunk's own keys suffice, nothing is cached before it
    mask: Tensor | None  # (S, L) additive; None: everything, or causal
    causal: bool


class GatherSpace:
    """Memory that decode gathers K and V into, kept from step to step; one a model, grown on demand.

    Allocated anew in every layer these megabytes go back to the system each time, and its page faults made
    attention at 32 rows three times slower. CPUs only: a GPU's allocator keeps its memory, and captures it.
    """

    def __init__(self) -> None:
        self._keys = self._values = torch.empty(0)

    def take(self, cache: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
        """Two uninitialised tensors of `num_pages` pages shaped and typed like those of `cache`."""
        page_shape = cache.shape[1:]
        if (
            self._keys.dtype != cache.dtype
            or self._keys.shape[1:] != page_shape
            or self._keys.shape[0] < num_pages
        ):
            self._keys = torch.empty(num_pages + num_pages // 2, *page_shape, dtype=cache.dtype)
            self._values = torch.empty_like(self._keys)
        return self._keys[:num_pages], self._values[:num_pages]


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


@lru_cache(maxsize=1)
def multiplies_bf16() -> bool:
    """Whether this CPU has matrix registers for bf16 (AMX): attention in bf16 is then quicker than in fp32."""
    return torch.cpu._is_amx_tile_supported()


Split = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""A qkv product (N, (H + 2·KH)·D) and rotations (N, 1, R/2) → rotated q (N, H, D), rotated k and v (N, KH, D)."""


class AttentionPlan:
    """What every layer of one forward needs to attend; build it once, call `attend` or `attend_product` once a layer.

    With `native` operations and the step's `rotation` (N, 1, R/2) complex64, `attend_product` has them do all of the
    work behind a product of `dtype` for those tokens that they take (see `token_rows`), pages read where they lie.
    Raises ValueError when a chunk ends inside a prefix that it also begins in: positions of a bidirectional prefix
    need all of it, cached or in the same chunk.
    """

    def __init__(
        self,
        tokens: StepTokens,
        cache: KVCache,
        space: GatherSpace | None = None,
        native: Operations | None = None,
        rotation: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._cache = cache
        self._space = space
        self._gathered: tuple[Tensor, Tensor] | None = None
        self._write_index = tokens.write_index
        self._dtype = cache.keys[0].dtype
        self._rotation = rotation
        self._native: Operations | None = None
        self._native_rows: TokenRows | None = None
        decode, prefills = tokens.decode, tokens.prefills
        if (
            native is not None
            and rotation is not None
            and native.can_decode(dtype, self._dtype, cache.keys[0].shape[3], 2 * rotation.shape[-1])
        ):
            self._native_rows = rows = token_rows(tokens)
            if rows is not None:
                self._native = native
                self._native_write_index = tokens.write_index[: rows.num]
                self._write_index = tokens.write_index[rows.num :]
                decode, prefills = None, prefills if len(self._write_index) else []
        # Without matrix registers a bf16 product with one query row a head is slow: 2.6 times fp32 with casts.
        self._widen = (
            self._dtype != torch.float32 and cache.keys[0].device.type == "cpu" and not multiplies_bf16()
        )
        self._mask_dtype = torch.float32 if self._widen else self._dtype
        self._num_decode = 0
        self._decode_pages: Tensor | None = None
        self._decode_mask: Tensor | None = None
        if decode is not None:
            self._plan_decode(decode)
        start = self._num_decode
        self._segments: list[_Segment] = []
        for prefill in prefills:
            self._segments.append(self._plan_segment(prefill, start))
            start += prefill.num_tokens

    def _plan_decode(self, rows: DecodeRows) -> None:
        page_tokens = self._cache.page_tokens
        num_pages = min(-(-rows.max_tokens // page_tokens), rows.block_tables.shape[1])
        self._num_decode = rows.num_rows
        self._decode_pages = rows.block_tables[: rows.num_rows, :num_pages].reshape(-1)
        if self._space is not None and rows.block_tables.device.type == "cpu":
            self._gathered = self._space.take(self._cache.keys[0], rows.num_rows * num_pages)
        columns = torch.arange(num_pages * page_tokens, device=rows.lengths.device)
        hidden = columns >= rows.lengths[: rows.num_rows, None]
        mask = torch.zeros(hidden.shape, dtype=self._mask_dtype, device=hidden.device)
        self._decode_mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]

    def _plan_segment(self, prefill: PrefillSegment, start: int) -> _Segment:
        check_prefix(prefill)
        queries, context, prefix = prefill.num_tokens, prefill.num_context, prefill.prefix_tokens
        num_keys = context + queries
        pages: Tensor | None = None
        if context:
            pages = prefill.block_table[: -(-num_keys // self._cache.page_tokens)]
        mask: Tensor | None = None
        causal = False
        if queries == 1 or prefix >= num_keys:
            pass  # every query sees every key
        elif context == 0 and prefix <= 1:
            causal = True
        else:
            device = prefill.block_table.device
            last_seen = torch.arange(context, num_keys, device=device)
            if prefix > context:
                last_seen.clamp_(min=prefix - 1)
            hidden = torch.arange(num_keys, device=device) > last_seen[:, None]
            mask = torch.zeros(hidden.shape, dtype=self._mask_dtype, device=device)
            mask.masked_fill_(hidden, float("-inf"))
        return _Segment(start, start + queries, num_keys, pages, mask, causal)

    def attend_product(
        self,
        layer: int,
        qkv: Tensor,
        num_heads: int,
        split: Split,
        *,
        qk_weight: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """As `attend`, from the qkv product (N, (H + 2·KH)·D); returns (N, H·D) in its dtype.

        `split` is asked for the rows that no native operation takes. `qk_weight` and `eps` tell those what
        `split` does besides rotating: RMS norm of each head of q and k by weights (H + KH, D) fp32.
        """
        assert self._rotation is not None
        rows = self._native_rows
        if self._native is None or rows is None:
            return self._attend_split(layer, split(qkv, self._rotation)).to(qkv.dtype)
        num = rows.num
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = qkv.new_empty(num, num_heads * keys.shape[3])
        self._native.decode(
            qkv[:num],
            keys,
            values,
            self._native_write_index,
            rows,
            self._rotation,
            num_heads,
            out,
            qk_weight,
            eps,
        )
        if num == qkv.shape[0]:
            return out
        rest = self._attend_split(layer, split(qkv[num:], self._rotation[num:]))
        return torch.cat([out, rest.to(out.dtype)])

    def _attend_split(self, layer: int, heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        query, key, value = (part.to(self._dtype) for part in heads)
        return self.attend(layer, query, key, value)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write this layer's K and V, then attend.

        `query` (N, H, D), `key` and `value` (N, KH, D), all in the cache's dtype, H a multiple of KH. Returns
        (N, H·D) in the cache's dtype.
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self._write_index, key)
        values.view(-1, *values.shape[2:]).index_copy_(0, self._write_index, value)
        if not self._segments:
            return self._attend_decode(query, keys, values)
        parts = [self._attend_segment(segment, query, key, value, keys, values) for segment in self._segments]
        if self._num_decode:
            parts.insert(0, self._attend_decode(query[: self._num_decode], keys, values))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decode(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        pages = self._decode_pages
        assert pages is not None
        rows, num_heads, head_dim = query.shape
        kv_heads = keys.shape[2]
        if self._gathered is None:
            gathered_keys, gathered_values = keys.index_select(0, pages), values.index_select(0, pages)
        else:
            gathered_keys, gathered_values = self._gathered
            torch.index_select(keys, 0, pages, out=gathered_keys)
            torch.index_select(values, 0, pages, out=gathered_values)
        gathered_keys = gathered_keys.view(rows, -1, kv_heads, head_dim).transpose(1, 2)
        gathered_values = gathered_values.view(rows, -1, kv_heads, head_dim).transpose(1, 2)
        # The query heads of a group stand as the query *positions* of its key head: one product for all of
        # them, measured 1.5 to 7 times quicker than `enable_gqa`, and needing no group special case.
        grouped = query.reshape(rows, kv_heads, num_heads // kv_heads, head_dim)
        if self._widen:
            grouped, gathered_keys, gathered_values = (
                grouped.float(),
                gathered_keys.float(),
                gathered_values.float(),
            )
        out = F.scaled_dot_product_attention(
            grouped, gathered_keys, gathered_values, attn_mask=self._decode_mask
        )
        return out.reshape(rows, num_heads * head_dim).to(self._dtype)

    def _attend_segment(
        self, segment: _Segment, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        chunk = slice(segment.start, segment.stop)
        query = query[chunk]
        num_heads, kv_heads = query.shape[1], keys.shape[2]
        if segment.pages is None:
            key, value = key[chunk], value[chunk]
        else:
            key = keys.index_select(0, segment.pages).view(-1, *keys.shape[2:])[: segment.num_keys]
            value = values.index_select(0, segment.pages).view(-1, *values.shape[2:])[: segment.num_keys]
        if self._widen:
            query, key, value = query.float(), key.float(), value.float()
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            attn_mask=segment.mask,
            is_causal=segment.causal,
            enable_gqa=num_heads != kv_heads,
        )
        return out.squeeze(0).transpose(0, 1).reshape(query.shape[0], -1).to(self._dtype)
