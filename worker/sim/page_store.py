"""Owns reading and writing whole pages of the simulated device's memory, for other workers. Decode thread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.protocol import PageFormat
from worker.sim.runner import SimRunner


class SimPages:
    """Implements `step.contract.PageStore`: a position is its mark of 8 bytes."""

    def __init__(self, runner: SimRunner) -> None:
        page_tokens = runner.shape.page_tokens
        self.format = PageFormat("int64", page_tokens, "marks", 8 * page_tokens, "sim")
        self._runner = runner
        self._pages = runner.memory.reshape(-1, page_tokens)

    def read(self, pages: Sequence[int]) -> bytes:
        """See `PageStore`."""
        return self._pages[list(pages)].tobytes()

    def write(self, pages: Sequence[int], data: bytes | memoryview) -> None:
        """See `PageStore`. In the order of the compute stream, as on a GPU."""
        rows = np.frombuffer(data, np.uint64).reshape(len(pages), -1).copy()
        index = list(pages)

        def fill() -> None:
            self._pages[index] = rows

        self._runner.compute.queue(fill, 0.0)
