"""Owns the condition of the GPU tests: without a CUDA device each is skipped, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REASON = f"needs a CUDA device, and torch {torch.__version__} sees none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder `gpu`; skip it where there is none."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(300))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once that they were skipped: a quiet run looks like a passed one."""
    skipped = [r for r in terminalreporter.getreports("skipped") if "tests/gpu" in r.nodeid]
    if skipped and not torch.cuda.is_available():
        terminalreporter.write_line(f"{len(skipped)} GPU tests skipped: {REASON}")


@pytest.fixture
def device() -> torch.device:
    """The CUDA device, with fresh random numbers."""
    torch.manual_seed(0)
    return torch.device("cuda", 0)
