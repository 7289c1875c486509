"""Owns paged attention by torch: writing K and V to pages, and reading them back. Decode thread.

Used on CPUs without the compiled operations, for heads that those do not compute, and as the reference of the GPU
kernels. The host never waits for the device: on a GPU the decode part can be captured for fixed shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.forward import DecodeRows, KVCache, PrefillSegment, check_prefix

CAPPED_QUERIES = (
    256  # queries of a chunk computed at once where scores are capped, to bound the tensor of scores
)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How one layer attends. A query sees itself and the `window` − 1 keys before it, 0: all of them, and within a
    bidirectional prefix those behind it. `cap` c makes a score s c·tanh(s/c), 0: leaves it."""

    window: int = 0
    cap: float = 0.0
    rotation: int = 0  # which of the step's rotations its q and k are turned by


FULL = LayerAttention()


@dataclass(slots=True)
class _Segment:
    """One prefill chunk, worked out: `start:stop` in the step's tokens, and what its queries may see."""

    start: int
    stop: int
    keys: slice  # within what `pages` hold, or within the chunk
    pages: Tensor | None  # None: the chunk's own keys suffice, nothing is cached before it
    mask: Tensor | None  # (S, L) additive; None: everything, or causal
    causal: bool


class GatherSpace:
    """Memory that decode gathers K and V into, kept from step to step; one a model, grown on demand.

    Allocated anew in every layer, these megabytes would go back to the system each time; the page faults made attention
    at 32 rows three times slower. For CPUs only: a GPU's allocator keeps its memory.
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


@lru_cache(maxsize=1)
def multiplies_bf16() -> bool:
    """Whether this CPU has matrix registers for bf16 (AMX): attention in bf16 is then quicker than in fp32."""
    return torch.cpu._is_amx_tile_supported()


class TorchRows:
    """Decode rows and prefill chunks of one forward, as torch attends them in layers of one window.

    `write_index` is theirs alone. Raises ValueError when a chunk ends inside a prefix that it also begins in.
    """

    def __init__(
        self,
        decode: DecodeRows | None,
        prefills: list[PrefillSegment],
        write_index: Tensor,
        cache: KVCache,
        space: GatherSpace | None = None,
        window: int = 0,
    ) -> None:
        self._cache = cache
        self._space = space
        self._window = window
        self._write_index = write_index
        self._dtype = cache.keys[0].dtype
        # Without matrix registers a bf16 product with one query row a head is slow: 2.6 times fp32 with casts.
        self._widen = (
            self._dtype != torch.float32 and cache.keys[0].device.type == "cpu" and not multiplies_bf16()
        )
        self._mask_dtype = torch.float32 if self._widen else self._dtype
        self._gathered: tuple[Tensor, Tensor] | None = None
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
        page_tokens, num = self._cache.page_tokens, rows.num_rows
        tables, lengths = rows.block_tables[:num], rows.lengths[:num, None]
        num_pages = min(-(-rows.max_tokens // page_tokens), tables.shape[1])
        columns = torch.arange(num_pages * page_tokens, device=lengths.device)
        needed = -(-(self._window - 1) // page_tokens) + 1  # the most pages that a window can lie in
        if self._window > 0 and needed < num_pages:
            first = (lengths - self._window).clamp_(min=0) // page_tokens
            num_pages = needed
            places = first + torch.arange(num_pages, device=lengths.device)
            tables = tables.gather(1, places.clamp(max=tables.shape[1] - 1).long())
            columns = columns[: num_pages * page_tokens] + first * page_tokens
        self._num_decode = num
        self._decode_pages = tables[:, :num_pages].reshape(-1)
        if self._space is not None and tables.device.type == "cpu":
            self._gathered = self._space.take(self._cache.keys[0], num * num_pages)
        hidden = columns >= lengths
        if self._window:
            hidden |= columns < lengths - self._window
        mask = torch.zeros(hidden.shape, dtype=self._mask_dtype, device=hidden.device)
        self._decode_mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None, :]

    def _plan_segment(self, prefill: PrefillSegment, start: int) -> _Segment:
        check_prefix(prefill)
        queries, context, prefix = prefill.num_tokens, prefill.num_context, prefill.prefix_tokens
        num_keys, window, page_tokens = context + queries, self._window, self._cache.page_tokens
        # The first key that any of the queries sees.
        first = max(0, context - window + 1) if window else 0
        pages, skipped = None, 0
        if context:
            skipped = first // page_tokens
            pages = prefill.block_table[skipped : -(-num_keys // page_tokens)]
        keys = slice(first - skipped * page_tokens, num_keys - skipped * page_tokens)
        mask: Tensor | None = None
        causal = False
        limited = 0 < window < num_keys
        if queries == 1 or (prefix >= num_keys and not limited):
            pass  # every query sees every key that is left
        elif context == 0 and prefix <= 1 and not limited:
            causal = True
        else:
            device = prefill.block_table.device
            position = torch.arange(context, num_keys, device=device)[:, None]
            key = torch.arange(first, num_keys, device=device)
            hidden = key > position
            if prefix > context:
                hidden &= (key >= prefix) | (position >= prefix)
            if limited:
                hidden |= key <= position - window
            mask = torch.zeros(hidden.shape, dtype=self._mask_dtype, device=device)
            mask.masked_fill_(hidden, float("-inf"))
        return _Segment(start, start + queries, keys, pages, mask, causal)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, kind: LayerAttention = FULL
    ) -> Tensor:
        """Write this layer's K and V, then attend; shapes as `AttentionPlan.attend` has them."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self._write_index, key)
        values.view(-1, *values.shape[2:]).index_copy_(0, self._write_index, value)
        if not self._segments:
            return self._attend_decode(query, keys, values, kind.cap)
        parts = [
            self._attend_segment(segment, query, key, value, keys, values, kind.cap)
            for segment in self._segments
        ]
        if self._num_decode:
            parts.insert(0, self._attend_decode(query[: self._num_decode], keys, values, kind.cap))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decode(self, query: Tensor, keys: Tensor, values: Tensor, cap: float) -> Tensor:
        pages, mask = self._decode_pages, self._decode_mask
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
        # The query heads of a group are passed as query *positions* of their key head, so one product serves them all:
        # measured 1.5 to 7 times quicker than `enable_gqa`, and groups need no case of their own.
        grouped = query.reshape(rows, kv_heads, num_heads // kv_heads, head_dim)
        if self._widen:
            grouped, gathered_keys, gathered_values = (
                grouped.float(),
                gathered_keys.float(),
                gathered_values.float(),
            )
        if cap:
            out = _capped(grouped, gathered_keys, gathered_values, mask, cap)
        else:
            out = F.scaled_dot_product_attention(grouped, gathered_keys, gathered_values, attn_mask=mask)
        return out.reshape(rows, num_heads * head_dim).to(self._dtype)

    def _attend_segment(
        self,
        segment: _Segment,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        cap: float,
    ) -> Tensor:
        chunk = slice(segment.start, segment.stop)
        query = query[chunk]
        num_heads, kv_heads = query.shape[1], keys.shape[2]
        if segment.pages is None:
            key, value = key[chunk][segment.keys], value[chunk][segment.keys]
        else:
            key = keys.index_select(0, segment.pages).view(-1, *keys.shape[2:])[segment.keys]
            value = values.index_select(0, segment.pages).view(-1, *values.shape[2:])[segment.keys]
        if self._widen:
            query, key, value = query.float(), key.float(), value.float()
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        if cap:
            out = self._capped_segment(segment, query, key, value, cap)
        else:
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=segment.mask,
                is_causal=segment.causal,
                enable_gqa=num_heads != kv_heads,
            )
        return out.squeeze(0).transpose(0, 1).reshape(chunk.stop - chunk.start, -1).to(self._dtype)

    def _capped_segment(
        self, segment: _Segment, query: Tensor, key: Tensor, value: Tensor, cap: float
    ) -> Tensor:
        """(1, H, S, D) queries over (1, KH, L, D) → (1, H, S, D), a block of queries at a time."""
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        parts = []
        for at in range(0, query.shape[2], CAPPED_QUERIES):
            block = query[:, :, at : at + CAPPED_QUERIES]
            mask = None if segment.mask is None else segment.mask[at : at + CAPPED_QUERIES]
            seen = key.shape[2]
            if segment.causal:
                seen = at + block.shape[2]
                ones = torch.ones(block.shape[2], seen, dtype=torch.bool, device=query.device)
                mask = torch.zeros(ones.shape, dtype=query.dtype, device=query.device)
                mask.masked_fill_(ones.triu_(at + 1), float("-inf"))
            parts.append(_capped(block, key[:, :, :seen], value[:, :, :seen], mask, cap))
        return torch.cat(parts, 2)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Attention whose scores s are c·tanh(s/c): (…, S, D) over (…, L, D), mask additive. In fp32."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float()
    scores.mul_(1.0 / (cap * query.shape[-1] ** 0.5)).tanh_().mul_(cap)
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(-1).to(value.dtype), value)
