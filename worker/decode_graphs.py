"""Owns the captured decode steps: which there are, which one serves a batch, and what runs where one is missing. Decode thread.

A graph is captured for a slot (its inputs lie at the slot's addresses), a bucket of rows and a flavour. Flavours:

TEXT   embeds words, runs the forward, samples every row. What greedy and drawn text rows need, and nothing of the
       region model. One kernel serves greedy and drawn rows, so they share a graph.
FULL   as TEXT, with the region encoders and decoders, and with masks and states of constraints that live on the
       device: points, boxes, choices. A batch with one such row replays it whole, which changes no other row's token.
GATED  runs the forward and keeps the logits: some row needs the host's mask, penalties or logprobs.

Where a graph is missing (not captured in the time start-up had, or refused by the device) the same body runs
eagerly over the same padded rows, so that a token does not depend on it. What is asked for often is captured then,
without running it first: the eager runs were that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

import structlog

from worker.device.base import CaptureFailed, Device, Graph
from worker.sequence import Sequence
from worker.slot import Slot

log = structlog.get_logger()

EAGER_RUNS_BEFORE_CAPTURE = 4  # recording takes about as long as two eager steps


class Flavour(IntEnum):
    """What a captured step does besides its forward."""

    GATED = 0
    TEXT = 1
    FULL = 2


def flavour_of(rows: list[Sequence]) -> Flavour:
    """The cheapest flavour that serves these decode rows."""
    full = False
    for seq in rows:
        if seq.is_adjusted or seq.sampling.num_logprobs >= 0:
            return Flavour.GATED
        if seq.constraint is not None and not seq.table_slot:
            return Flavour.GATED
        full = full or seq.table_slot > 0 or seq.is_spatial
    return Flavour.FULL if full else Flavour.TEXT


def bucket_sizes(max_rows: int) -> list[int]:
    """Batch sizes captured as graphs: 1, 2, 4, then every 8 up to 64, then every 32."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, max_rows + 32, 32)]
    return [size for size in sizes if size < max_rows] + [max_rows]


Key = tuple[int, int, Flavour]
"""Slot, bucket, flavour."""


@dataclass(slots=True)
class GraphCounts:
    """What became of captures, and how often one was missed; decode and vision together. For the metrics."""

    eager_steps_total: dict[str, int] = field(default_factory=dict)  # by flavour, and `vision`
    captures_total: dict[str, int] = field(default_factory=dict)  # startup, late, failed

    def add_eager(self, kind: str) -> None:
        """A step, or a batch of crops, ran without a graph."""
        self.eager_steps_total[kind] = self.eager_steps_total.get(kind, 0) + 1

    def add_capture(self, kind: str) -> None:
        """A capture ended."""
        self.captures_total[kind] = self.captures_total.get(kind, 0) + 1


class DecodeGraphs:
    """Graphs of all slots. `body(slot, bucket, flavour)` is what they record."""

    def __init__(
        self,
        device: Device,
        buckets: list[int],
        flavours: tuple[Flavour, ...],
        body: Callable[[Slot, int, Flavour], None],
        counts: GraphCounts,
    ) -> None:
        self.buckets = buckets
        self.flavours = flavours
        self.counts = counts
        self.enabled = True  # False: everything eager, for comparison
        self._device = device
        self._body = body
        self._graphs: dict[Key, Graph] = {}
        self._eager_runs: dict[Key, int] = {}

    def bucket(self, num_rows: int) -> int:
        """The smallest bucket that holds so many rows."""
        return next(size for size in self.buckets if size >= num_rows)

    def capture(self, slot: Slot, bucket: int, flavour: Flavour) -> bool:
        """Capture one graph at start-up: the slot's inputs must be padding, for its body runs. False if refused."""
        return self._capture(slot, bucket, flavour, warm_up=True)

    def run(self, slot: Slot, bucket: int, flavour: Flavour) -> None:
        """Queue the step on the current stream."""
        key = (slot.number, bucket, flavour)
        graph = self._graphs.get(key)
        if graph is None and self.enabled:
            runs = self._eager_runs.get(key, 0) + 1
            self._eager_runs[key] = runs
            if runs == EAGER_RUNS_BEFORE_CAPTURE + 1 and self._capture(slot, bucket, flavour, warm_up=False):
                graph = self._graphs[key]
        if graph is not None and self.enabled:
            graph.replay()
            return
        self.counts.add_eager(flavour.name.lower())
        self._body(slot, bucket, flavour)

    def _capture(self, slot: Slot, bucket: int, flavour: Flavour, *, warm_up: bool) -> bool:
        kind = "startup" if warm_up else "late"
        key = (slot.number, bucket, flavour)
        try:
            self._graphs[key] = self._device.capture(
                partial(self._body, slot, bucket, flavour), warm_up=warm_up
            )
        except CaptureFailed as error:
            kind = "failed"
            self._eager_runs[key] = EAGER_RUNS_BEFORE_CAPTURE + 1  # it is not tried again
            log.warning("capture_failed", rows=bucket, flavour=flavour.name.lower(), error=str(error))
        self.counts.add_capture(kind)
        return kind != "failed"
