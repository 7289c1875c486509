"""Owns the captured decode steps: which there are, and which one serves a batch. Decode thread.

A graph is captured for a slot (its inputs lie at the slot's addresses), a bucket of rows and a flavour; docs/gpu.md
("Captured steps") says what each flavour holds, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from worker.device.choices import choices
from worker.device.contract import Device
from worker.models.contract import Model
from worker.models.linear import has_own_products
from worker.schedule.sequence import Sequence
from worker.step.contract import GraphCounts
from worker.step.graph_table import GraphTable
from worker.step.slot import Slot
from worker.step.staging import needs_eager


class Flavour(IntEnum):
    """What a captured step does besides its forward: docs/gpu.md, "Captured steps"."""

    GATED = 0
    TEXT = 1
    FULL = 2


def flavour_of(rows: list[Sequence]) -> Flavour:
    """The cheapest flavour that serves these decode rows."""
    full = False
    for seq in rows:
        if needs_eager(seq):
            return Flavour.GATED
        full = full or seq.table_place > 0 or seq.is_spatial
    return Flavour.FULL if full else Flavour.TEXT


def bucket_sizes(max_rows: int, least: int = 1) -> list[int]:
    """Batch sizes captured as graphs: 1, 2, 4, then every 8 up to 64, then every 32; none below `least`, if there may be
    so many rows."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, max_rows + 32, 32)]
    return [size for size in sizes if least <= size < max_rows] + [max_rows]


def least_bucket(model: Model) -> int:
    """The fewest rows a captured step should have. A product with a bias becomes two launches at a single row (a copy of the
    bias, then a product that adds to it) and one at two, unless a kernel of our own takes the bias along."""
    return 2 if model.biased and choices().pair_rows and not has_own_products(model.device) else 1


class DecodeGraphs(GraphTable[Flavour]):
    """Graphs of all slots. `body(slot, bucket, flavour)` is what they record."""

    def __init__(
        self,
        device: Device,
        buckets: list[int],
        flavours: tuple[Flavour, ...],
        body: Callable[[Slot, int, Flavour], None],
        counts: GraphCounts,
    ) -> None:
        super().__init__(device, body, lambda flavour: flavour.name.lower(), counts)
        self.buckets = buckets
        self.flavours = flavours

    def bucket(self, num_rows: int) -> int:
        """The smallest bucket that holds so many rows."""
        return next(size for size in self.buckets if size >= num_rows)
