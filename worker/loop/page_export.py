"""Owns giving pages of prompts to the workers that asked for them, as each chunk of a prompt is committed. Decode thread."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shared.errors import FinishReason
from shared.protocol import PageFormat, Pages
from worker.loop.inbox import Outbox
from worker.loop.metrics import WorkerMetrics
from worker.schedule.plan import StepPlan
from worker.schedule.prefix_cache import page_keys
from worker.schedule.sequence import Sequence
from worker.step.contract import PageStore

MAX_MESSAGE: Final = 1 << 20
"""Bytes of pages in one message, or one page: it is copied in between two steps of whoever asked."""


@dataclass(slots=True)
class Due:
    """Pages that a step completes."""

    seq: Sequence
    first: int
    pages: list[int]


class PageExport:
    """Of a worker with the role `prefill`."""

    def __init__(self, outbox: Outbox, store: PageStore, epoch: int) -> None:
        self._outbox = outbox
        self._store = store
        self._epoch = epoch
        self._next: dict[Sequence, int] = {}  # number of the first page to send, of every prompt under way
        self.metrics: WorkerMetrics | None = None  # set by the engine

    @property
    def format(self) -> PageFormat:
        """What its pages hold."""
        return self._store.format

    def __len__(self) -> int:
        return len(self._next)

    def add(self, seq: Sequence, first_page: int) -> None:
        """A prompt was queued for another worker, which has the pages before `first_page`."""
        self._next[seq] = first_page

    def due(self, plan: StepPlan) -> list[Due]:
        """The pages that a step completes, before its commit, which may release them."""
        found: list[Due] = []
        page_tokens = self._store.format.page_tokens
        for chunk in plan.chunks:
            first = self._next.get(chunk.seq)
            if first is None:
                continue
            end = min(chunk.start + chunk.num_tokens, chunk.seq.num_prompt) // page_tokens
            if end > first:
                found.append(Due(chunk.seq, first, chunk.seq.pages[first:end]))
        return found

    def send(self, due: Iterable[Due]) -> None:
        """Send them, right behind the commit: nothing in flight writes to them, and no later step was planned with them."""
        for one in due:
            seq = one.seq
            if seq.finish not in (None, FinishReason.LENGTH, FinishReason.STOP):
                continue
            size = self._store.format.page_bytes
            keys = page_keys(seq, self._store.format.page_tokens, one.first + len(one.pages))
            at_once = max(1, MAX_MESSAGE // size)
            for at in range(0, len(one.pages), at_once):
                pages = one.pages[at : at + at_once]
                first = one.first + at
                data = self._store.read(pages)
                message = Pages(
                    self._epoch,
                    seq.sequence_id,
                    first,
                    b"".join(keys[first : first + len(pages)]),
                    zlib.crc32(data),
                )
                self._outbox.send(seq.gateway, message, [data])
                if self.metrics is not None:
                    self.metrics.sent_pages_total += len(pages)
                    self.metrics.sent_page_bytes_total += len(data)
            self._next[seq] = one.first + len(one.pages)

    def forget_ended(self) -> None:
        """Prompts that ended are given nothing any more."""
        for seq in [seq for seq in self._next if seq.finish is not None]:
            del self._next[seq]
