"""Owns the order in which waiting sequences are admitted: priority, then fairness, then arrival. Pure; decode thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from worker.schedule.sequence import Sequence


class WaitingQueue:
    """Sequences without a row. Lowest `priority` first; among equals the tenant that was served least
    lately (tokens taken since it last came from idle), so one tenant's burst does not starve another.
    """

    __slots__ = ("_lanes", "_served", "_size")

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, str], deque[Sequence]] = {}
        self._served: dict[str, float] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for lane in self._lanes.values():
            yield from lane

    def push(self, seq: Sequence) -> None:
        """Queue behind its tenant's others of the same priority."""
        self._lane(seq).append(seq)
        self._size += 1

    def push_front(self, seq: Sequence) -> None:
        """Queue a preempted sequence ahead of its tenant's others, which came after it."""
        self._lane(seq).appendleft(seq)
        self._size += 1

    def peek(self) -> Sequence | None:
        """The sequence to admit next, or None. Who waits for pages of its prompt holds nobody up."""
        best: tuple[int, float, float] | None = None
        chosen: Sequence | None = None
        for (priority, tenant), lane in self._lanes.items():
            first = lane[0]
            if first.awaits_pages:
                ready = next((seq for seq in lane if not seq.awaits_pages), None)
                if ready is None:
                    continue
                first = ready
            key = (priority, self._served[tenant], first.arrived_s)
            if best is None or key < best:
                best, chosen = key, first
        return chosen

    def take(self, seq: Sequence) -> None:
        """Remove `seq` because it is admitted: its tenant is charged for it."""
        self.remove(seq)
        if seq.tenant in self._served:
            self._served[seq.tenant] += seq.num_prompt + seq.max_tokens

    def remove(self, seq: Sequence) -> None:
        """Remove `seq` without charge (cancelled, expired). Raises KeyError or ValueError if it is not queued."""
        key = (seq.priority, seq.tenant)
        lane = self._lanes[key]
        lane.remove(seq)
        self._size -= 1
        if not lane:
            del self._lanes[key]
        if not self._size:
            self._served.clear()

    def _lane(self, seq: Sequence) -> deque[Sequence]:
        # A tenant that comes from idle starts level with the least served one: it gets no credit for
        # having been away, and owes nothing for what others were served meanwhile.
        if seq.tenant not in self._served:
            self._served[seq.tenant] = min(self._served.values(), default=0.0)
        return self._lanes.setdefault((seq.priority, seq.tenant), deque())
