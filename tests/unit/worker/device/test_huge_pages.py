"""Moving memory to huge pages changes nothing that stands in it."""

from __future__ import annotations

import torch

from worker.device.huge_pages import use_huge_pages


def test_memory_keeps_its_contents() -> None:
    numbers = torch.arange(4 << 20)  # 32 MB
    moved_bytes = use_huge_pages()
    assert moved_bytes >= 0 and moved_bytes % (2 << 20) == 0
    assert torch.equal(numbers, torch.arange(4 << 20))
