"""Moving memory to huge pages changes nothing that stands in it."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.device.huge_pages import mapped, use_huge_pages, without


def test_memory_keeps_its_contents() -> None:
    numbers = torch.arange(4 << 20)  # 32 MB
    moved_bytes = use_huge_pages()
    assert moved_bytes >= 0 and moved_bytes % (2 << 20) == 0
    assert torch.equal(numbers, torch.arange(4 << 20))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_what_was_there_before_is_left_alone() -> None:
    before = mapped()
    assert before and use_huge_pages(besides=[(0, 1 << 60)]) == 0
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    region = mmap.mmap(
        -1, 64 << 20, flags=private
    )  # an allocator might give memory that it has held since before
    at = torch.frombuffer(region, dtype=torch.uint8).data_ptr() + (8 << 20)
    assert any(start <= at < end for start, end in without(mapped(), before))


spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda s: (s[0], s[0] + s[1])), max_size=5
)


@given(spans, spans)
def test_cutting_out_leaves_exactly_the_rest(
    there: list[tuple[int, int]], gone: list[tuple[int, int]]
) -> None:
    def places(given: list[tuple[int, int]]) -> set[int]:
        return {place for start, end in given for place in range(start, end)}

    assert places(without(there, gone)) == places(there) - places(gone)
