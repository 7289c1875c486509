"""Several real gateways over the same real workers, in one thread and virtual time, and tenants that ask without end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from typing import Any

import zmq

from gateway.config import GatewayConfig
from gateway.core.service import Service
from gateway.generation import Delta, End, GenerateRequest, RequestError, SpatialObject
from shared import protocol as wire
from shared.errors import ErrorCode
from tests.unit.wire.fake_zmq import Context, Frames, Router, Wire
from tests.unit.wire.virtual_loop import VirtualLoop
from tests.unit.wire.world import NoPictures
from tests.unit.worker.loop.simulation import CARD, SimWorker
from worker.loop.inbox import Inbox
from worker.sim.timeline import VirtualClock
from worker.sim.tokenizer import SIM_TOKENIZER
from worker.wire.outbox import WireOutbox
from worker.wire.transport import Transport


class SharedRouter:
    """A worker's ROUTER with a wire to each gateway: identities are told apart by the wire's number."""

    def __init__(self, wires: list[Wire]) -> None:
        self.routers = [Router(one) for one in wires]
        self._wires = wires
        self._received: deque[Frames] = deque()
        for router in self.routers:
            router.bind()

    def deliver(self) -> None:
        """What gateways sent arrives."""
        for number, (one, router) in enumerate(zip(self._wires, self.routers, strict=True)):
            one.deliver_to_worker()
            while router.received:
                identity, *frames = router.received.popleft()
                self._received.append([bytes([number]) + identity, *frames])

    def send_multipart(self, frames: Frames, flags: int = 0) -> None:
        self.routers[frames[0][0]].send_multipart([frames[0][1:], *frames[1:]], flags)

    def recv_multipart(self, flags: int = 0) -> Frames:
        if not self._received:
            raise zmq.Again
        return self._received.popleft()


class SharedWorker:
    """One worker: decode thread and I/O thread, turn by turn."""

    def __init__(self, wires: list[Wire], clock: VirtualClock, epoch: int, options: dict[str, Any]) -> None:
        inbox: Inbox = SimpleQueue()
        self.outbox = WireOutbox()
        self.transport = Transport(f"worker {epoch}", inbox, self.outbox, now=clock.now)
        self.sim = SimWorker(self.outbox, epoch=epoch, inbox=inbox, clock=clock, **options)
        self.router = SharedRouter(wires)
        scheduler = self.sim.scheduler
        limits = wire.Limits(
            scheduler.limits.max_rows,
            scheduler.limits.max_waiting,
            self.sim.pool.total,
            self.sim.pool.page_tokens,
            scheduler.limits.step_tokens,
            scheduler.limits.max_sequence_tokens,
            3.0,
        )
        ready = wire.Ready(wire.PROTOCOL_VERSION, wire.schema_hash(), epoch, CARD, limits, "sim")
        self.transport.announce(ready, [SIM_TOKENIZER, b""])

    def turn(self) -> None:
        """Take what came, do a step, send what there is."""
        self.router.deliver()
        self.transport._turn(self.router)  # type: ignore[arg-type]
        self.sim.engine.tick()
        self.transport._turn(self.router)  # type: ignore[arg-type]


@dataclass
class Asker:
    """A tenant at one gateway that keeps `num_open` requests open: it asks again for each that ended or was refused."""

    tenant: str
    gateway: int
    num_open: int
    max_tokens: int = 6
    starts_after: int = 0  # rounds
    open: int = 0
    tokens: int = 0
    ended: int = 0
    refused: int = 0
    first_refusals: int = 0  # before the first one was let in
    seen: list[ErrorCode] = field(default_factory=list)


class _Listener:
    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    def on_delta(self, delta: Delta) -> None:
        self._asker.tokens += len(delta.token_ids)

    def on_object(self, found: SpatialObject) -> None:
        raise AssertionError

    def on_end(self, end: End) -> None:
        self._asker.open -= 1
        self._asker.ended += 1
        if end.error is not None:
            self._asker.seen.append(end.error.code)


class Crowd:
    """`num_gateways` gateways that were started apart, over `num_workers` workers, with `num_tenants` known tenants."""

    def __init__(
        self, *, num_gateways: int, num_workers: int, num_tenants: int, max_queue: int = 12, **options: Any
    ) -> None:
        self.clock = VirtualClock()
        self.clock.advance(1.0)
        self.loop = VirtualLoop.on(self.clock)
        endpoints = [f"ipc:///worker-{number}" for number in range(num_workers)]
        self.wires = [{endpoint: Wire() for endpoint in endpoints} for _ in range(num_gateways)]
        config = GatewayConfig(
            workers=tuple(endpoints),
            max_queue=max_queue,
            request_deadline_s=80_000,
            max_wait_s=1e6,
        )
        self.services = [self._service(config, wires) for wires in self.wires]
        for service in self.services:
            service.access.num_tenants = num_tenants  # as if they had keys
        self.workers = [
            SharedWorker([wires[endpoint] for wires in self.wires], self.clock, 100 + number, options)
            for number, endpoint in enumerate(endpoints)
        ]
        self._numbers = count()
        self._rounds = 0
        self.most_held = 0
        for service in self.services:
            self.loop.run(service.start())
        for _ in range(8):
            self._turn()
            self.clock.advance(0.25)
        assert all(service.readiness()[0] for service in self.services)

    def _service(self, config: GatewayConfig, wires: dict[str, Wire]) -> Service:
        service = Service(config, now=self.clock.now)
        service._context.destroy(linger=0)
        service._context = Context(self.loop, wires)  # type: ignore[assignment]
        service.images = NoPictures()  # type: ignore[assignment]
        return service

    def serve(self, askers: list[Asker], rounds: int) -> None:
        """Let them all ask, in turn and each until it is refused, for so many rounds."""
        for _ in range(rounds):
            self._rounds += 1
            turn = self._rounds % len(askers)  # who asks first
            for asker in (*askers[turn:], *askers[:turn]):
                if self._rounds > asker.starts_after:
                    self._ask(asker)
            self._turn()
            self.most_held = max(self.most_held, *(self.held(worker) for worker in self.workers))

    def stop(self, askers: list[Asker]) -> None:
        """Let what is open come to its end; nothing new is asked."""
        for _ in range(5000):
            if not any(asker.open for asker in askers):
                break
            self._turn()
        assert not any(asker.open for asker in askers), "some request never ends"
        for worker in self.workers:
            worker.sim.check_at_rest()

    def close(self) -> None:
        """End the gateways."""
        for service in self.services:
            self.loop.run(service.stop())
        for worker in self.workers:
            worker.outbox.close()

    @staticmethod
    def held(worker: SharedWorker) -> int:
        """Sequences that a worker has, running and waiting."""
        return len(worker.sim.scheduler.sequences)

    def _ask(self, asker: Asker) -> None:
        service = self.services[asker.gateway]
        while asker.open < asker.num_open:
            number = next(self._numbers)
            request = GenerateRequest(
                f"r{number}",
                service.model(CARD.model_id),
                [30, 20 + number % 50, 20 + number // 50 % 50],
                asker.max_tokens,
                wire.Sampling(),
                tenant=asker.tenant,
                ignore_eos=True,
            )
            try:
                self.loop.within(lambda request=request: service.submit(request, _Listener(asker)))  # type: ignore[misc]
            except RequestError as error:
                assert error.code is ErrorCode.QUEUE_FULL
                asker.refused += 1
                asker.first_refusals += not asker.ended and not asker.open
                return
            asker.open += 1

    def _turn(self) -> None:
        for worker in self.workers:
            worker.turn()
        for wires in self.wires:
            for one in wires.values():
                one.deliver_to_gateway()
        self.loop.settle()
        self.clock.advance(0.01)
