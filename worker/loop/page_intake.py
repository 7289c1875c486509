"""Owns the prompts whose pages a prefill worker computes: who is asked, what has come, when it is given up. Decode thread.

Pages that come are copied onto free pages between steps, a few at a time, and remembered by the prefix cache: the prompt then
finds them there like those of any earlier prompt, and computes what is left itself. Whatever goes wrong costs time only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

import structlog

from shared.protocol import PrefillAt, pack_i32
from worker.loop.inbox import PagesHere, PrefillEnded, PrefillJob, Prefills
from worker.loop.metrics import WorkerMetrics
from worker.schedule.prefix_cache import KEY_BYTES, PrefixCache, page_keys
from worker.schedule.scheduler import Scheduler
from worker.schedule.sequence import Sequence
from worker.step.contract import PageStore

log = structlog.get_logger()

BITE_S: Final = 1e-3  # between two steps with rows, pages are copied in for so long
IDLE_BITE_S: Final = 10e-3  # and for so long while nothing runs, before commands are taken


@dataclass(slots=True, eq=False)
class _Arriving:
    """A sequence whose pages are on their way."""

    job_id: int
    seq: Sequence
    first: int  # number of the first page that was asked for
    next: int  # of the first that has not come
    num_pages: int
    began_s: float
    until_s: float


class PageIntake:
    """Of a worker with the role `decode` and a prefix cache."""

    def __init__(
        self,
        prefills: Prefills,
        store: PageStore,
        scheduler: Scheduler,
        cache: PrefixCache,
        clock: Callable[[], float],
        *,
        wait_s: float,
        max_bytes: int,
    ) -> None:
        """`wait_s`: how long a prompt waits for its pages. `max_bytes` may be on their way at once, of one prompt any number."""
        self._prefills = prefills
        self._store = store
        self._scheduler = scheduler
        self._cache = cache
        self._clock = clock
        self._wait_s = wait_s
        self._max_bytes = max_bytes
        self._job_ids = count(1)
        self._arriving: dict[int, _Arriving] = {}
        self._bites: deque[PagesHere | PrefillEnded] = deque()
        self._num_bytes = 0  # on their way
        self.metrics: WorkerMetrics | None = None  # set by the engine

    def __len__(self) -> int:
        return len(self._arriving)

    # ------------------------------------------------------------------ asking

    def begin(self, seq: Sequence, at: PrefillAt) -> None:
        """A sequence was queued that a prefill worker may compute the prompt of: ask for what is missing, if that is enough."""
        page_tokens = self._store.format.page_tokens
        if seq.pictures or seq.values or seq.is_scored:
            return  # a page's key covers them, and a prefill worker is not sent them
        num_pages = (len(seq.tokens) - 1) // page_tokens
        first = self._cache.num_here(seq)
        missing = num_pages - first
        if missing < 1 or len(seq.tokens) - first * page_tokens < at.min_tokens:
            return
        num_bytes = missing * self._store.format.page_bytes
        pool = self._scheduler.pages
        if self._num_bytes and self._num_bytes + num_bytes > self._max_bytes:
            self._count("busy")
            return
        if missing > pool.num_free + pool.num_cached - first:
            self._count("no_room")
            return
        now_s = self._clock()
        job = _Arriving(next(self._job_ids), seq, first, first, num_pages, now_s, now_s + self._wait_s)
        self._arriving[job.job_id] = job
        self._num_bytes += num_bytes
        seq.awaits_pages = True
        seq.first_planned_s = now_s  # its prompt is being computed from here on
        self._count("asked")
        prompt = pack_i32(seq.tokens[: num_pages * page_tokens])
        self._prefills.ask(
            PrefillJob(
                job.job_id, at.endpoint, prompt, first, num_pages, seq.tenant, seq.priority, self._wait_s
            )
        )

    # ------------------------------------------------------------------ what comes

    def on_command(self, command: PagesHere | PrefillEnded) -> None:
        """Keep it for the next turn."""
        self._bites.append(command)

    def turn(self) -> bool:
        """Between two steps: take in some of what has come, and give up what is late or cancelled. True: more has come."""
        if not self._arriving:
            self._bites.clear()
            return False
        began_s = self._clock()
        for job in list(self._arriving.values()):
            if job.seq.finish is not None:
                self._give_up(job, "cancelled")
            elif began_s >= job.until_s:
                self._give_up(job, "late")
        has_rows = bool(self._scheduler.running)
        while self._bites:
            bite = self._bites.popleft()
            arriving = self._arriving.get(bite.job_id)
            if arriving is None:
                continue
            if isinstance(bite, PrefillEnded):
                self._on_ended(arriving, bite)
            elif fault := self._take_in(arriving, bite):
                self._give_up(arriving, fault)
            if self._clock() - began_s > (BITE_S if has_rows else IDLE_BITE_S):
                break
        return bool(self._bites)

    def _take_in(self, job: _Arriving, bite: PagesHere) -> str:
        """Copy pages onto free ones and remember them; returns why that cannot be, or nothing."""
        num, cache, seq = len(bite.keys) // KEY_BYTES, self._cache, job.seq
        keys = page_keys(seq, self._store.format.page_tokens, job.num_pages)[: job.num_pages]
        fits = num and bite.first == job.next and bite.keys == b"".join(keys[job.next : job.next + num])
        if not fits or len(bite.data) != num * self._store.format.page_bytes:
            return "malformed"
        if job.next and not cache.has(seq, job.next - 1):
            return "no_room"  # its beginning was forgotten meanwhile
        numbers: list[int] = []
        pages: list[int] = []
        pool = self._scheduler.pages
        own: frozenset[bytes] = frozenset(keys) if pool.num_free < num else frozenset()
        for number in range(job.next, job.next + num):
            if cache.has(seq, number):
                continue  # computed here for somebody else meanwhile
            if not pool.num_free and not cache.evict_other(own):
                break
            numbers.append(number)
            pages.append(pool.take())
        if pages:
            data = memoryview(bite.data)
            if len(pages) < num:
                size = self._store.format.page_bytes
                at = [number - job.next for number in numbers]
                data = memoryview(b"".join([data[i * size : (i + 1) * size] for i in at]))
            self._store.write(pages, data)
            for number, page in zip(numbers, pages, strict=True):
                cache.adopt(seq, number, page)
        job.next += num
        metrics = self._counted
        metrics.given_pages_total += len(pages)
        metrics.given_page_bytes_total += len(pages) * self._store.format.page_bytes
        return "" if cache.has(seq, job.next - 1) else "no_room"

    def _on_ended(self, job: _Arriving, ended: PrefillEnded) -> None:
        outcome = ended.outcome
        if outcome == "done" and job.next < job.num_pages:
            outcome = "malformed"
        if outcome == "failed":  # a NaN may be in pages that came before it was seen
            self._cache.discard(job.seq, job.first, job.next)
            job.next = job.first
        self._settle(job, outcome, ended.detail)

    def _give_up(self, job: _Arriving, outcome: str) -> None:
        self._prefills.cancel(job.job_id)
        self._settle(job, outcome, "")

    def _settle(self, job: _Arriving, outcome: str, detail: str) -> None:
        """Nothing more comes: the sequence goes on with what has come."""
        del self._arriving[job.job_id]
        seq, page_tokens = job.seq, self._store.format.page_tokens
        self._num_bytes -= (job.num_pages - job.first) * self._store.format.page_bytes
        self._cache.touch(seq, job.next)
        seq.awaits_pages = False
        seq.given_tokens = (job.next - job.first) * page_tokens
        self._count(outcome)
        self._counted.given_seconds_total += self._clock() - job.began_s
        if outcome not in ("done", "cancelled"):
            log.warning(
                "prefill_not_done",
                outcome=outcome,
                num_pages=job.next - job.first,
                wanted=job.num_pages - job.first,
                detail=detail[:200],
            )

    @property
    def _counted(self) -> WorkerMetrics:
        assert self.metrics is not None
        return self.metrics

    def _count(self, outcome: str) -> None:
        counts = self._counted.prefills_total
        counts[outcome] = counts.get(outcome, 0) + 1
