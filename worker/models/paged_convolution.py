"""Owns causal convolutions over a sequence's positions, whose last inputs are kept in pages beside keys and values. Decode thread.

A convolution of width L needs the L - 1 inputs before a chunk or a new token. They are kept in lines of the sequence's own
pages: the input of position t in line `t mod lines` of its page, so that a page holds the last `lines` inputs of those that
were written to it, and a full one those at its end. What follows a page's end can then go on from there, whoever wrote it:
cached prefixes, chunks, preempted rows and rows whose token the host has not seen need nothing of their own. A position's
input may be overwritten by later ones of its page alone; only positions behind all that is known are ever computed, so
nobody asks for it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.forward import DecodeRows, KVCache, PrefillSegment, StepTokens


def state_lines(num_inputs: int, page_tokens: int) -> int:
    """Lines of a page that keep the last `num_inputs` inputs: as few as divide its tokens."""
    least = min(num_inputs, page_tokens)
    return next(lines for lines in range(least, page_tokens + 1) if page_tokens % lines == 0)


class PagedConvolution:
    """What all convolutions of one forward share: where inputs are read and written. `num_taps` is L.

    Nothing of it reads the device for decode rows alone, so that part can be captured for fixed shapes.
    """

    def __init__(self, tokens: StepTokens, cache: KVCache, num_taps: int) -> None:
        self._cache, self._kept = cache, num_taps - 1
        self._lines = cache.states[0].shape[1] if cache.states else 1
        pages = torch.div(tokens.write_index, cache.page_tokens, rounding_mode="floor")
        offsets = tokens.write_index - pages * cache.page_tokens
        self._write = pages * self._lines + offsets % self._lines
        self._num_rows = 0
        if tokens.decode is not None:
            self._num_rows = tokens.decode.num_rows
            self._read, self._known = self._before_rows(tokens.decode)
        self._segments: list[tuple[slice, Tensor, Tensor, Tensor]] = []
        start = self._num_rows
        for segment in tokens.prefills:
            own = slice(start, start + segment.num_tokens)
            self._segments.append((own, *self._before(segment), self._last(offsets[own])))
            start = own.stop

    def _before_rows(self, rows: DecodeRows) -> tuple[Tensor, Tensor]:
        """Lines (B · (L - 1),) of the inputs before each row's token, and whether there are any (B, L - 1, 1)."""
        num = rows.num_rows
        steps = torch.arange(self._kept, 0, -1, device=rows.lengths.device)
        positions = rows.lengths[:num, None].long() - 1 - steps
        return self._lines_of(positions, rows.block_tables[:num].long())

    def _before(self, segment: PrefillSegment) -> tuple[Tensor, Tensor]:
        """The same for one chunk: (L - 1,) and (L - 1, 1)."""
        table = segment.block_table
        positions = torch.arange(-self._kept, 0, device=table.device) + segment.num_context
        lines, known = self._lines_of(positions[None], table[None].long())
        return lines, known[0]

    def _lines_of(self, positions: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        known = positions >= 0
        positions = positions.clamp_min(0)
        pages = tables.gather(1, torch.div(positions, self._cache.page_tokens, rounding_mode="floor"))
        return (pages * self._lines + positions % self._lines).flatten(), known.unsqueeze(-1)

    def _last(self, offsets: Tensor) -> Tensor:
        """Which of a chunk's tokens, at these offsets in their pages, are the last to be written to their lines."""
        index = torch.arange(len(offsets), device=offsets.device)
        is_last = (offsets + self._lines >= self._cache.page_tokens) | (index + self._lines >= len(offsets))
        return is_last.nonzero().squeeze(1)

    def __call__(self, place: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """inputs (N, D) of the step's tokens, weight (L, D) fp32, bias (D,) fp32 → (N, D) fp32.

        Token t's output is the sum over j of weight[L - 1 - j] · input of position t - j, 0 before the first. Keeps the
        inputs in layer number `place` of `KVCache.states`, in that memory's dtype.
        """
        state = self._cache.states[place]
        lines = state.view(-1, state.shape[2])
        parts = []
        num = self._num_rows
        if num:
            own = inputs[:num]
            before = lines.index_select(0, self._read).view(num, self._kept, -1)
            before = before.where(self._known, 0.0)
            lines.index_copy_(0, self._write[:num], own.to(state.dtype))
            total = own.float() * weight[self._kept]
            for tap in range(self._kept):
                total.addcmul_(before[:, tap].float(), weight[tap])
            parts.append(total)
        for own_tokens, read, known, last in self._segments:
            own = inputs[own_tokens]
            before = lines.index_select(0, read).where(known, 0.0)
            lines.index_copy_(0, self._write[own_tokens][last], own[last].to(state.dtype))
            line = torch.cat([before.float(), own.float()])
            total = line[self._kept :] * weight[self._kept]
            for tap in range(self._kept):
                total.addcmul_(line[tap : tap + len(own)], weight[tap])
            parts.append(total)
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if bias is None else out.add_(bias)
