"""Convolutions whose last inputs live in pages: the same sums whole, in chunks, token by token, and from another's pages."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.unit.worker.models.paged_driver import relative_error
from worker.forward import DecodeRows, KVCache, PrefillSegment, StepTokens
from worker.models.paged_convolution import PagedConvolution, state_lines

WIDTH = 5


class Pages:
    """One layer's memory, full of garbage, and a sequence's pages in it."""

    def __init__(self, page_tokens: int, taps: int, num_tokens: int) -> None:
        self.page_tokens, self.taps = page_tokens, taps
        num = -(-num_tokens // page_tokens)
        state = torch.full((3 * num + 1, state_lines(taps - 1, page_tokens), WIDTH), float("nan"))
        self.cache = KVCache([], [], page_tokens, states=[state])
        self._free = random.Random(num_tokens).sample(range(1, 3 * num + 1), 3 * num)
        self.num = num

    def table(self, shared: Tensor | None = None, num_shared: int = 0) -> Tensor:
        """Fresh pages, the first ones another's."""
        own = torch.tensor([self._free.pop() for _ in range(self.num)], dtype=torch.int32)
        if shared is not None:
            own[:num_shared] = shared[:num_shared]
        return own

    def run(
        self, x: Tensor, weight: Tensor, table: Tensor, start: int, sizes: list[int], *, decode: bool = False
    ) -> Tensor:
        """Positions from `start` on in pieces of one step; `decode`: one row, one position."""
        positions = torch.arange(start, start + sum(sizes))
        lines = table[positions // self.page_tokens].long() * self.page_tokens + positions % self.page_tokens
        rows, segments, at = None, [], start
        if decode:
            lengths = torch.tensor([start + 1, 1], dtype=torch.int32)
            tables = torch.stack([table, torch.zeros_like(table)])
            rows = DecodeRows(2, tables, lengths, start + 1)
            lines = torch.cat([lines, torch.zeros(1, dtype=torch.int64)])  # a row of padding
            x = torch.cat([x, torch.zeros(1, WIDTH)])
        else:
            for size in sizes:
                segments.append(PrefillSegment(size, at, 0, table))
                at += size
        tokens = StepTokens(positions, lines, rows, segments)
        out = PagedConvolution(tokens, self.cache, self.taps)(0, x, weight, None)
        return out[: sum(sizes)]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.t().unsqueeze(0), (len(weight) - 1, 0))
    return F.conv1d(padded, weight.t().unsqueeze(1), groups=WIDTH)[0].t()


@pytest.mark.parametrize(
    ("page_tokens", "taps"), [(16, 3), (16, 2), (16, 6), (4, 4), (4, 9), (1, 3), (12, 6)]
)
def test_whole_in_chunks_and_token_by_token(page_tokens: int, taps: int) -> None:
    torch.manual_seed(taps)
    num = 53
    x, weight = torch.randn(num, WIDTH), torch.randn(taps, WIDTH)
    expected = plain(x, weight)
    for seed in range(6):
        rng = random.Random(seed)
        pages = Pages(page_tokens, taps, num)
        table, parts, at = pages.table(), [], 0
        while at < num:
            if rng.random() < 0.4:
                parts.append(pages.run(x[at : at + 1], weight, table, at, [1], decode=True))
            else:
                sizes = [rng.randint(1, 9) for _ in range(rng.choice([1, 1, 2]))]
                sizes = sizes if at + sum(sizes) <= num else [num - at]
                parts.append(pages.run(x[at : at + sum(sizes)], weight, table, at, sizes))
            at += len(parts[-1])
        assert relative_error(torch.cat(parts), expected) < 1e-6


@pytest.mark.parametrize(("page_tokens", "taps"), [(16, 3), (4, 9)])
def test_another_sequence_goes_on_from_full_pages(page_tokens: int, taps: int) -> None:
    """After their writer has gone on, which writes to pages behind them."""
    torch.manual_seed(1)
    num = 3 * page_tokens + 7
    x, weight = torch.randn(num, WIDTH), torch.randn(taps, WIDTH)
    pages = Pages(page_tokens, taps, num)
    first = pages.table()
    pages.run(x, weight, first, 0, [num])
    for shared in (1, 2, 3):
        at = shared * page_tokens
        other = torch.cat([x[:at], torch.randn(num - at, WIDTH)])
        found = pages.run(other[at:], weight, pages.table(first, shared), at, [num - at])
        assert relative_error(found, plain(other, weight)[at:]) < 1e-6
        pages._free += [page for page in range(1, 3 * pages.num + 1) if page not in first]


def test_lines_of_a_page() -> None:
    assert [state_lines(kept, 16) for kept in (1, 2, 3, 5, 8, 15, 20)] == [1, 2, 4, 8, 8, 16, 16]
    assert state_lines(4, 12) == 4 and state_lines(5, 12) == 6
