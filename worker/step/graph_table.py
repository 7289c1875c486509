"""Owns captured graphs by key: which one a step replays, and what runs where it is missing. Decode thread.

Where a graph is missing (start-up had no time for it, or the device refused it) the same body runs eagerly over the same
padded inputs, so tokens do not depend on it. After some eager runs the graph is captured, without a further warm-up run,
unless a recording has broken off before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVarTuple

import structlog

from worker.device.contract import CaptureBroken, CaptureFailed, Device, Graph
from worker.step.contract import GraphCounts
from worker.step.slot import Slot

log = structlog.get_logger()

EAGER_RUNS_BEFORE_CAPTURE = 4  # recording takes about as long as two eager steps


Rest = TypeVarTuple("Rest")


class GraphTable(Generic[*Rest]):
    """Graphs by slot, bucket and further parts of their key, such as the flavour.

    `body(slot, bucket, *rest)` is what they record; `kind_of(*rest)` is what its eager runs are counted under.
    """

    def __init__(
        self,
        device: Device,
        body: Callable[[Slot, int, *Rest], None],
        kind_of: Callable[[*Rest], str],
        counts: GraphCounts,
    ) -> None:
        self.counts = counts
        self.enabled = True  # False: everything eager, for comparison
        self._device = device
        self._body = body
        self._kind_of = kind_of
        self._graphs: dict[tuple[int, int, *Rest], Graph] = {}
        self._eager_runs: dict[tuple[int, int, *Rest], int] = {}

    def capture(self, slot: Slot, bucket: int, *rest: *Rest) -> bool:
        """Capture one graph at start-up: the slot's inputs must be padding, for its body runs. False if refused.

        Raises CaptureBroken if the recording broke off midway.
        """
        return self._capture(slot, bucket, *rest, warm_up=True)

    def graph(self, slot: Slot, bucket: int, *rest: *Rest) -> Graph | None:
        """The captured graph, if there is one: for measuring it alone."""
        return self._graphs.get((slot.number, bucket, *rest))

    def run(self, slot: Slot, bucket: int, *rest: *Rest) -> None:
        """Queue the body's work on the current stream."""
        key = (slot.number, bucket, *rest)
        graph = self._graphs.get(key)
        if graph is None and self.enabled and not self._device.capture_broke:
            runs = self._eager_runs.get(key, 0) + 1
            self._eager_runs[key] = runs
            if runs == EAGER_RUNS_BEFORE_CAPTURE + 1 and self._capture(slot, bucket, *rest, warm_up=False):
                graph = self._graphs[key]
        if graph is not None and self.enabled:
            graph.replay()
            return
        self.counts.add_eager(self._kind_of(*rest))
        self._body(slot, bucket, *rest)

    def _capture(self, slot: Slot, bucket: int, *rest: *Rest, warm_up: bool) -> bool:
        kind = "startup" if warm_up else "late"
        key = (slot.number, bucket, *rest)
        try:
            self._graphs[key] = self._device.capture(
                partial(self._body, slot, bucket, *rest), warm_up=warm_up
            )
        except CaptureFailed as error:
            kind = "failed"
            self._eager_runs[key] = EAGER_RUNS_BEFORE_CAPTURE + 1  # it is not tried again
            log.warning("capture_failed", kind=self._kind_of(*rest), bucket=bucket, error=str(error))
        except CaptureBroken as error:
            self.counts.add_capture("failed")
            log.error("capture_broken", kind=self._kind_of(*rest), bucket=bucket, error=str(error))
            if warm_up:
                raise  # at start-up: a worker that begins with an allocator in doubt would fail later, under load
            return False
        self.counts.add_capture(kind)
        return kind != "failed"
