"""The real engine, scheduler and pipeline under Poisson arrivals on a virtual clock: what the simulation of a worker is held against."""

from __future__ import annotations

import random
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import fmean

from shared.protocol import FromWorker, Sampling, StepOutputs, Submit, pack_i32, unpack_i32, unpack_i64
from worker.loop.engine import Engine
from worker.loop.inbox import Command, Inbox, Received
from worker.schedule.limits import SchedulerLimits
from worker.schedule.pages import PagePool
from worker.schedule.scheduler import Scheduler
from worker.sim.profiles import Profile
from worker.sim.runner import SimRunner, fake_card
from worker.sim.timeline import VirtualClock
from worker.step.staging import StepShape

FIRST_PLAIN = 13  # the simulated device takes ids below this as orders


@dataclass
class Seen:
    """One request's times, seconds."""

    arrived_s: float
    tokens: int
    begun_s: float = 0.0
    ended_s: float = 0.0


class RealLoop:
    """Serves `num` requests; `seen` has their times."""

    def __init__(
        self, profile: Profile, *, rows: int, rate: float, prompt: int, output: float, num: int, seed: int = 3
    ) -> None:
        rng = random.Random(seed)
        self.seen: list[Seen] = []
        at_s = 0.0
        for _ in range(num):
            at_s += rng.expovariate(rate)
            tokens = 1
            while rng.random() > 1 / output:
                tokens += 1
            self.seen.append(Seen(at_s, min(tokens, 400)))
        self._clock = VirtualClock()
        self._inbox: Inbox = SimpleQueue()
        self._next = 0
        self._num_ended = 0
        self._prompt = prompt
        card = fake_card(vocab_size=97)
        num_pages = rows * 64 + 1
        shape = StepShape(
            max_rows=rows, max_sequence_tokens=1024, step_tokens=2048, page_tokens=16, num_pages=num_pages, vocab_size=97
        )  # fmt: skip
        limits = SchedulerLimits(
            max_rows=rows, max_waiting=num, step_tokens=2048, mixed_tokens=1024, max_sequence_tokens=1024
        )
        self._engine = Engine(
            Scheduler(limits, PagePool(num_pages, 16)),
            SimRunner(card, self._clock, profile, shape, exact=False),
            card,
            inbox=self._inbox,
            outbox=self,
            clock=self._clock.now,
            epoch=1,
            depth=2,
            wait_for_command=self._wait,
        )

    def run(self) -> None:
        """Until every request has ended."""
        while self._num_ended < len(self.seen):
            self._feed()
            if not self._engine.tick():
                command = self._wait(10.0)
                if command is not None:
                    self._inbox.put(command)

    def send(self, gateway: bytes, message: FromWorker, payloads: list[bytes] | None = None) -> None:
        """See `Outbox`."""
        if not isinstance(message, StepOutputs):
            return
        now_s = self._clock.now()
        for number, index in zip(
            unpack_i64(message.sequence_ids), unpack_i32(message.first_index), strict=True
        ):
            if index == 0:
                self.seen[number].begun_s = now_s
        for finish in message.finishes:
            self.seen[finish.sequence_id].ended_s = now_s
            self._num_ended += 1

    def broadcast(self, message: FromWorker) -> None:
        """See `Outbox`."""

    def ttft_ms(self) -> float:
        """The mean, of the later two thirds."""
        return 1e3 * fmean(one.begun_s - one.arrived_s for one in self._settled())

    def total_ms(self) -> float:
        """Likewise, of whole answers."""
        return 1e3 * fmean(one.ended_s - one.arrived_s for one in self._settled())

    def gap_ms(self) -> float:
        """Likewise, the mean gap of each answer with more than one token."""
        return 1e3 * fmean(
            (one.ended_s - one.begun_s) / (one.tokens - 1) for one in self._settled() if one.tokens > 1
        )

    def per_s(self) -> float:
        """Requests that ended a second, from the first arrival to the last."""
        until_s = self.seen[-1].arrived_s
        return sum(one.ended_s <= until_s for one in self.seen) / until_s

    def _settled(self) -> list[Seen]:
        return self.seen[len(self.seen) // 3 :]

    def _feed(self) -> None:
        while self._next < len(self.seen) and self.seen[self._next].arrived_s <= self._clock.now():
            self._inbox.put(self._command())

    def _command(self) -> Received:
        number, self._next = self._next, self._next + 1
        ids = [FIRST_PLAIN + (number * 31 + place * 7) % (97 - FIRST_PLAIN) for place in range(self._prompt)]
        return Received(
            b"",
            Submit(
                1, number, "s", pack_i32(ids), self.seen[number].tokens, Sampling(temperature=1.0, seed=number),
                ignore_eos=True,
            ),
        )  # fmt: skip

    def _wait(self, seconds: float) -> Command | None:
        until_s = self._clock.now() + seconds
        if self._next < len(self.seen) and self.seen[self._next].arrived_s <= until_s:
            self._clock.sleep_until(self.seen[self._next].arrived_s)
            return self._command()
        self._clock.sleep_until(until_s)
        return None
