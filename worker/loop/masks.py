"""Owns when masks of host-constrained rows are built: with their step, or ahead of it for slow ones. Decode thread.

A sequence whose mask was slow is *paced*: its next mask is built on a thread of this module as soon as its token is
committed, and the sequence sits out of steps until the mask is there. Its tokens stay the same (I8, I10).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from shared.control_groups import num_cores
from worker.constraints.llg import LlgConstraint, MaskExecutor, fill_in_parallel
from worker.loop.inbox import MaskReady
from worker.schedule.life import MaskLife
from worker.schedule.plan import StepPlan
from worker.schedule.sequence import Sequence

I32 = npt.NDArray[np.int32]

SLOW_S = 1e-3  # a slower mask makes its sequence paced; a mask quicker than half of this ends that
MIN_PARALLEL_ROWS = 4  # below, handing rows to threads costs more than it saves
MAX_THREADS = 8


class MaskFiller:
    """Builds masks; `on_ready` is called on a thread of the filler for each mask built ahead."""

    def __init__(
        self,
        on_ready: Callable[[MaskReady], None],
        *,
        num_threads: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        threads: Executor | None = None,
    ) -> None:
        if num_threads is None:
            num_threads = min(MAX_THREADS, max(1, num_cores() // 2))
        self._num_threads = num_threads
        self._on_ready = on_ready
        self._clock = clock
        self._threads = threads
        self._parallel = MaskExecutor(num_threads) if num_threads > 1 else None
        self._one_by_one = (
            False  # after a slow parallel fill: time each mask of the next one, to find the slow row
        )
        self.num_paced = 0

    def fill_deferred(self, masks: I32, plan: StepPlan) -> list[tuple[Sequence, str]]:
        """Write the masks of a step's constrained rows; returns the sequences whose grammar failed, with its message. Their
        rows are then zombies, like rows that have ended meanwhile: what they sample is skipped."""
        rows: list[tuple[int, Sequence]] = []
        for i in plan.deferred:
            seq = plan.samples[i]
            if seq.finish is None:
                rows.append((i, seq))
            else:
                masks[i] = -1
        failed = self.fill(masks, rows)
        for i, _ in failed:
            masks[i] = -1
        return [(plan.samples[i], text) for i, text in failed]

    def fill(self, masks: I32, rows: Items[tuple[int, Sequence]]) -> list[tuple[int, str]]:
        """Write `masks[i]` for each (i, sequence); returns (i, message) of those that failed.

        `masks` is one C-contiguous array of int32 words, a row each.
        """
        failed: list[tuple[int, str]] = []
        quick: list[tuple[int, Sequence]] = []
        for i, seq in rows:
            if seq.mask is MaskLife.READY:
                masks[i] = seq.take_ready_mask()
            elif isinstance(seq.constraint, LlgConstraint):
                quick.append((i, seq))
            else:
                self._fill_one(masks, i, seq, failed)
        if self._parallel is None or self._one_by_one or len(quick) < MIN_PARALLEL_ROWS:
            self._one_by_one = False
            for i, seq in quick:
                self._fill_one(masks, i, seq, failed)
            return failed
        started_s = self._clock()
        failed += fill_in_parallel(self._parallel, masks, [(i, seq.constraint) for i, seq in quick])
        self._one_by_one = self._clock() - started_s > SLOW_S
        return failed

    def _fill_one(self, masks: I32, i: int, seq: Sequence, failed: list[tuple[int, str]]) -> None:
        assert seq.constraint is not None
        started_s = self._clock()
        try:
            seq.constraint.fill_mask(masks[i])
        except ValueError as error:
            failed.append((i, str(error)))
            return
        if self._clock() - started_s > SLOW_S and seq.budget is None:
            seq.on_slow_mask()
            self.num_paced += 1

    def build_ahead(self, seq: Sequence, num_words: int) -> None:
        """Start building the next mask of a paced sequence, whose last token was just committed."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="masks")
        self._threads.submit(self._build, seq, np.empty(num_words, np.int32))

    def _build(self, seq: Sequence, mask: I32) -> None:
        """Runs on a thread of the filler, which alone uses the constraint until `on_ready`: its sequence sits out."""
        assert seq.constraint is not None
        started_s = self._clock()
        error = ""
        try:
            seq.constraint.fill_mask(mask)
        except ValueError as problem:
            error = str(problem)
        self._on_ready(MaskReady(seq, mask, self._clock() - started_s, error))

    @staticmethod
    def accept(ready: MaskReady) -> None:
        """Let the sequence back into steps. Decode thread."""
        ready.seq.on_mask_ready(ready.mask, is_slow=ready.took_s > SLOW_S / 2)

    def close(self) -> None:
        """Drop masks that were not begun; those begun end within the grammar's limits."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
