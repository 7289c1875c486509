"""The whole service in one thread: a real gateway core, real workers, and a wire between that a test controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue
from typing import Any

from gateway.config import GatewayConfig
from gateway.core.flights import Flight
from gateway.core.service import Service
from gateway.core.worker_link import WorkerLink
from gateway.decisions.recovery import MAX_ATTEMPTS, Verdict, judge
from gateway.generation import GenerateRequest, RequestError
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.unit.wire.client import STALL_S, Client, Habits
from tests.unit.wire.fake_zmq import Context, Frames, Router, Wire
from tests.unit.wire.virtual_loop import VirtualLoop
from tests.unit.worker.loop.simulation import CARD, SimWorker, oracle
from worker.loop.inbox import Inbox
from worker.schedule.plan import StepPlan
from worker.sim.timeline import VirtualClock
from worker.sim.tokenizer import SIM_TOKENIZER
from worker.step.contract import Progress
from worker.wire.outbox import WireOutbox
from worker.wire.transport import Transport

KILL_TOKEN = 12
"""A prompt that holds this id kills the worker that runs it, without a word."""

DEADLINE_S = 20.0
PROGRESS_S = 3.0
RETRY_WAIT_S = 6.0
GRACE_S = 3.0
RESTART_S = 0.2
FREEZE_S = 4.0  # then a supervisor has seen that no progress is made


class Killed(Exception):
    """The process is gone, as by SIGKILL."""


class DeviceFault(Exception):
    """What a lost device raises."""


class Node:
    """One worker process: decode thread and I/O thread, turn by turn."""

    def __init__(self, between: Wire, clock: VirtualClock, epoch: int, options: dict[str, Any]) -> None:
        self.between = between
        self.epoch = epoch
        self.alive = True
        self.frozen = False  # as by SIGSTOP
        self.down_s = 0.0  # when it died or was frozen
        self._clock = clock
        self.device_lost = False
        inbox: Inbox = SimpleQueue()
        self.outbox = WireOutbox()
        self.transport = Transport(f"worker {epoch}", inbox, self.outbox, now=clock.now)
        self.sim = SimWorker(self.outbox, epoch=epoch, inbox=inbox, clock=clock, **options)
        self.router = Router(between)
        self._launch_forward = self.sim.runner.launch_forward
        self.sim.runner.launch_forward = self._launch  # type: ignore[method-assign]
        self.router.bind()

    def _launch(self, slot_number: int, plan: StepPlan, progress: Progress) -> None:
        if self.device_lost:
            raise DeviceFault("illegal address")
        if any(KILL_TOKEN in chunk.seq.tokens[: chunk.seq.num_prompt] for chunk in plan.chunks):
            raise Killed
        self._launch_forward(slot_number, plan, progress)

    @property
    def serves(self) -> bool:
        """Whether its threads run."""
        return self.alive and not self.frozen

    def turn(self) -> None:
        """One turn of the I/O thread."""
        if self.serves:
            self.transport._turn(self.router)  # type: ignore[arg-type]

    def tick(self) -> bool:
        """One turn of the decode thread; it announces the worker first, and ends it when it is drained."""
        if not self.serves:
            return False
        if not self.transport.is_announced:
            self._announce()
        engine = self.sim.engine
        try:
            progress = engine.tick()
        except Killed:
            self.die(10_000)
            return True
        except DeviceFault as fault:
            engine._give_up(fault)
            self._leave(wire.Fatal(self.epoch, ErrorCode.DEVICE_ERROR, "DeviceFault"))
            return True
        self.sim.check()
        leased = {gateway for gateway, _ in self.sim.scheduler.sequences} <= set(self.transport._leases)
        assert leased, "a sequence of a gateway that is gone still runs"
        if not progress and engine.is_draining and not self.sim.scheduler.has_work:
            self.sim.check_at_rest()
            self._leave()
        return progress

    def _announce(self) -> None:
        scheduler = self.sim.scheduler
        limits = wire.Limits(
            scheduler.limits.max_rows,
            scheduler.limits.max_waiting,
            self.sim.pool.total,
            self.sim.pool.page_tokens,
            scheduler.limits.step_tokens,
            min(scheduler.limits.max_sequence_tokens, self.sim.pool.total * self.sim.pool.page_tokens),
            PROGRESS_S,
        )
        ready = wire.Ready(wire.PROTOCOL_VERSION, wire.schema_hash(), self.epoch, CARD, limits, "sim")
        self.transport.announce(ready, [SIM_TOKENIZER, b""])

    def _leave(self, last: wire.Fatal | None = None) -> None:
        """End in good order: what is queued is sent, and lingers until it is there."""
        if last is not None:
            self.outbox.broadcast(last)
        self.turn()
        self.die(10_000)

    def freeze(self) -> None:
        """Stand still, sockets and all."""
        self.frozen, self.down_s = True, self._clock.now()

    def die(self, num_arriving: int) -> None:
        """End without a word; so many of the frames it sent still arrive."""
        if self.alive:
            self.alive = False
            self.down_s = self._clock.now()
            self.router.unbind(num_arriving)
            self.outbox.close()


class NoPictures:
    """In place of the picture processes: requests come with their pictures prepared."""

    num_pending = 0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass


class WatchedService(Service):
    """The real core, on a faked ZeroMQ; every loss of a worker is checked against the promise."""

    def __init__(self, config: GatewayConfig, clock: VirtualClock, context: Context) -> None:
        super().__init__(config, now=clock.now)
        self._context.destroy(linger=0)
        self._context = context  # type: ignore[assignment]
        self.images = NoPictures()  # type: ignore[assignment]
        self.num_losses = 0
        self.crashes: list[set[str]] = []  # what each worker that crashed held
        self.faults: list[str] = []

    def on_lost(self, link: WorkerLink, error: RequestError) -> None:
        self.num_losses += 1
        flights = list(self._pool.of(link).flights.by_id.values())
        before = [(flight, flight.has_shown) for flight in flights]
        if not link.was_silent:
            self.crashes.append({flight.request_id for flight in flights})
        super().on_lost(link, error)
        for flight, started in before:
            end = flight.state.end
            code = end.error.code if end is not None and end.error is not None else None
            promised = {
                Verdict.RETRY: None,
                Verdict.QUARANTINE: ErrorCode.QUARANTINED,
                Verdict.GIVE_UP: error.code,
            }[judge(flight.record)]
            if started or self.draining:
                promised = error.code
            if code is not promised:
                self.faults.append(
                    f"{flight.request_id} {started=} {flight.record} got {code}, not {promised}"
                )
            if code is ErrorCode.QUARANTINED:
                self._check_evidence(flight.request_id)
            if flight in flights and flight.sequence_id in self._pool.of(link).flights.by_id:
                self.faults.append(f"{flight.request_id} is still on the worker that was lost")

    def _check_evidence(self, request_id: str) -> None:
        """Quarantined: it was alone once and crashed twice, or there in three crashes at least."""
        held = [crash for crash in self.crashes if request_id in crash]
        if len(held) < 2 or (len(held) < 3 and {request_id} not in held):
            self.faults.append(f"{request_id} was quarantined without evidence: {held}")

    @property
    def unlanded(self) -> list[Flight]:
        """Every flight without its terminal event."""
        return list(self._dispatch.flights)


class World:
    """A gateway, its clients, and its workers."""

    def __init__(
        self, *, num_workers: int = 1, max_queue: int = 64, supervised: bool = False, **options: Any
    ) -> None:
        self.clock = VirtualClock()
        self.clock.advance(1.0)
        self.loop = VirtualLoop.on(self.clock)
        endpoints = [f"ipc:///worker-{number}" for number in range(num_workers)]
        self.wires = {endpoint: Wire() for endpoint in endpoints}
        config = GatewayConfig(
            workers=tuple(endpoints),
            max_queue=max_queue,
            request_deadline_s=DEADLINE_S,
            retry_wait_s=RETRY_WAIT_S,
        )
        self.service = WatchedService(config, self.clock, Context(self.loop, self.wires))
        self.faults = self.service.faults
        self.clients: list[Client] = []
        self.lossy = False  # frames to the gateway were lost, repeated, reordered or spoilt
        self.tampered = False  # the same to a worker
        self.device_faults = 0
        self.drained = False
        self.submits: Counter[str] = Counter()  # frames sent, by request
        self.epochs: dict[int, int] = {}  # each sequence was sent to
        self._supervised = supervised
        self._options = options
        self._epochs = count(100)
        self._numbers = count()
        self.nodes: list[Node] = [self._new_node(between) for between in self.wires.values()]
        self.loop.run(self.service.start())
        for between in self.wires.values():
            between.tap = self._count_submit
        self.baseline = (self.loop.num_timers, self.loop.num_readers)
        for _ in range(4):  # a hello that comes before the worker serves is asked again
            self.flow(2)
            self.clock.advance(0.25)
        assert self.all_ready()

    def _new_node(self, between: Wire) -> Node:
        return Node(between, self.clock, next(self._epochs), self._options)

    def _count_submit(self, frames: Frames) -> None:
        message = wire.decode_from_gateway(frames[0])
        if isinstance(message, wire.Submit):
            self.submits[message.request_id] += 1
            self.epochs[message.sequence_id] = message.epoch

    @property
    def links(self) -> list[WorkerLink]:
        """The gateway's side of each wire."""
        return [worker.link for worker in self.service.workers]

    def all_ready(self) -> bool:
        """Whether the gateway serves from every worker's present epoch."""
        pairs = zip(self.links, self.nodes, strict=True)
        return all(node.alive and link.epoch == node.epoch for link, node in pairs)

    # ------------------------------------------------------------ clients

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        habits: Habits | None = None,
        stop_at: int = -1,
        **fields: Any,
    ) -> Client:
        """One more client. `stop_at` makes the oracle's character there a stop string."""
        request_id = f"r{next(self._numbers)}"
        request = GenerateRequest(
            request_id,
            self.service.model(CARD.model_id),
            prompt,
            max_tokens,
            fields.pop("sampling", wire.Sampling()),
            **fields,
        )
        message = wire.Submit(
            0,
            0,
            request_id,
            wire.pack_i32(prompt),
            max_tokens,
            request.sampling,
            images=[image.spec for image in request.images],
            task=request.task,
            max_objects=request.max_objects,
        )
        client = Client(request, oracle(message), self.loop, self.faults, habits or Habits())
        if 0 <= stop_at < len(client.whole_text):
            request.stop.append(client.whole_text[stop_at])
        client.submitted_s = self.clock.now()
        try:
            client.handle = self.loop.within(lambda: self.service.submit(request, client))
        except RequestError as error:
            client.refused = error.code
        self.clients.append(client)
        return client

    def within(self, call: Callable[[], Any]) -> Any:
        """Call something as the gateway's loop would."""
        return self.loop.within(call)

    # ------------------------------------------------------------ time and turns

    def tick(self, times: int = 1) -> None:
        """The workers go on; what they send stays on the wire."""
        for _ in range(times):
            if self._supervised:
                self._supervise()
            for node in self.nodes:
                node.turn()
                node.tick()
                node.turn()

    def deliver(self) -> None:
        """Everything on the wires arrives and is looked at."""
        for between in self.wires.values():
            between.deliver_to_gateway()
        self.loop.settle()
        for between in self.wires.values():
            assert between.dealer is None or not between.dealer.received, "frames wait, and nobody looks"
            between.deliver_to_worker()
        for node in self.nodes:
            node.turn()

    def flow(self, times: int = 1) -> None:
        """Undisturbed service."""
        for _ in range(times):
            self.deliver()
            self.tick()
        self.deliver()
        self._check_orphans()

    def _check_orphans(self) -> None:
        """When no frame was ever lost, a worker runs nothing that the gateway has given up."""
        if self.lossy or self.tampered:
            return
        for worker, node in zip(self.service.workers, self.nodes, strict=True):
            if node.serves and worker.link.epoch == node.epoch and node.between.connection is not None:
                node.sim.engine.take_commands()
                mine = {n for g, n in node.sim.scheduler.sequences if g == node.between.connection.identity}
                assert mine <= set(worker.flights.by_id), "a worker still runs what nobody waits for"
                node.turn()

    def live(self, seconds: float) -> None:
        """Undisturbed service for so long; heartbeats and leases go on."""
        began_s = self.clock.now()
        while self.clock.now() < began_s + seconds:
            self.flow()
            self.clock.advance(0.24)
        self.flow()
        for link, node in zip(self.links, self.nodes, strict=True):
            was_down = not node.serves and node.down_s <= began_s  # all that time: it may also die on the way
            if was_down and seconds > PROGRESS_S:
                assert link.ready is None, "a worker that does nothing is taken for ready"

    def restart(self, number: int) -> None:
        """A supervisor starts a worker that died."""
        node = self.nodes[number]
        if not node.alive:
            self.nodes[number] = self._new_node(node.between)

    def _supervise(self) -> None:
        for number, node in enumerate(self.nodes):
            down_s = self.clock.now() - node.down_s
            if node.frozen and down_s > FREEZE_S:
                node.die(0)
            if not node.alive and down_s > RESTART_S:
                self.restart(number)

    # ------------------------------------------------------------ what must hold

    def check(self) -> None:
        """What must hold after every step."""
        assert not self.faults, self.faults
        assert not self.loop.faults, self.loop.faults
        by_request = {flight.request_id: flight for flight in self.service.unlanded}
        for link, worker in zip(self.links, self.service.workers, strict=True):
            assert not link.anomalies["failed_message"] and not link.anomalies["failed_tick"]
            flights = worker.flights.by_id
            assert worker.occupancy.num_active == len(flights) == sum(worker.occupancy.tenants.values())
            assert link.ready is not None or not flights, "a flight on a worker that was lost"
            for number, flight in flights.items():
                assert self.epochs[number] == link.epoch, "a flight on a worker of another epoch"
                assert flight.sequence_id == number and flight.worker_key == worker.key and not flight.landed
                assert flight.request_id in by_request, "a flight on a worker that nobody waits for"
        recovery = self.service._dispatch.recovery
        for flight in recovery.on_trial:
            assert not flight.state.next_index and not flight.landed, "on trial, though it has shown a token"
            assert flight.worker_key is not None, "on trial, and on no worker"
        assert sum(flight.record.level > 1 for flight in recovery.on_trial) <= 1, (
            "two suspects are tried at once"
        )
        assert self.service._placement.num_returning == len(recovery)
        num_placed = sum(len(worker.flights.by_id) for worker in self.service.workers)
        assert num_placed + self.service.num_recovering == len(by_request), "a flight that is nowhere"
        assert self.service._dispatch.idle.is_set() == (not by_request)
        for request_id, num in self.submits.items():
            assert num <= MAX_ATTEMPTS, f"{request_id} was sent {num} times"
        for client in self.clients:
            self._check_client(client, client.request.request_id in by_request)

    def _check_client(self, client: Client, is_live: bool) -> None:
        if client.refused is not None:
            assert client.end is None and not client.num_events and not is_live
            return
        assert is_live == (client.end is None), "I11: exactly one terminal event"
        end = client.end
        if end is None:
            return
        if end.error is not None:
            assert end.reason is FinishReason.ERROR
            self._check_error(client, end.error.code)
        elif end.reason is FinishReason.CANCELLED:
            assert client.left, "cancelled, and nobody asked"
        elif end.reason is FinishReason.DEADLINE:
            allowed_s = client.request.deadline_s or DEADLINE_S
            assert self.clock.now() - client.submitted_s >= allowed_s - 1e-6
            client.check_prefix()
        else:
            assert (
                KILL_TOKEN not in client.request.prompt_ids and client.answer.reason is not FinishReason.ERROR
            )
            client.check_complete()

    def _check_error(self, client: Client, code: ErrorCode) -> None:
        """Every error has a cause."""
        waited_s = self.clock.now() - client.submitted_s
        causes = {
            ErrorCode.NUMERICAL_ERROR: client.answer.reason is FinishReason.ERROR,
            ErrorCode.STREAM_GAP: self.lossy,
            ErrorCode.WORKER_LOST: self.service.num_losses > 0 or self.tampered,
            ErrorCode.QUARANTINED: self.service.num_losses > 1,
            ErrorCode.DEVICE_ERROR: self.device_faults > 0,
            ErrorCode.DEADLINE_EXCEEDED: waited_s >= (client.request.deadline_s or DEADLINE_S),
            ErrorCode.SHUTTING_DOWN: self.drained,
            ErrorCode.QUEUE_FULL: True,
            ErrorCode.CONTEXT_LENGTH_EXCEEDED: self.lossy,  # a dead worker's late `Ready` told of larger limits
            ErrorCode.INVALID_REQUEST: self.tampered,  # a frame may change and stay readable
        }
        assert causes.get(code, False), f"{client.request.request_id} ended with {code} for no reason"

    def come_to_rest(self) -> None:
        """Faults are over: every request ends within its deadline, and everything is back at its baseline."""
        for between in self.wires.values():
            between.hwm = 10_000
            between.late.clear()
            between.late_to_worker.clear()
        until_s = self.clock.now() + DEADLINE_S + RETRY_WAIT_S + 2 * GRACE_S
        while True:
            for number, node in enumerate(self.nodes):
                node.frozen = node.device_lost = False
                self.restart(number)
            self.flow(2)
            busy = any(node.sim.scheduler.has_work for node in self.nodes)
            if not busy:
                draining = any(node.sim.engine.is_draining for node in self.nodes)
                if not self.service.num_in_flight and self.all_ready() and not draining:
                    break
                self.clock.advance(0.24)
            assert self.clock.now() < until_s, "requests or workers are stuck"
        # Long enough for a stalled client to be cut off, and for a gateway whose lease ran out to hear of it.
        self.live(max(STALL_S, PROGRESS_S) + 1.0)
        for _ in range(8):
            if not self.all_ready():
                self.live(0.3)
        self.check()
        self._check_baseline()

    def _check_baseline(self) -> None:
        service = self.service
        assert not service.num_in_flight and not service.num_recovering
        assert not service._dispatch.recovery.on_trial and service._placement.reserved is None
        for worker, node in zip(service.workers, self.nodes, strict=True):
            assert not worker.flights.by_id and not worker.occupancy.num_active and not worker.orphans
            node.sim.check_at_rest()
            assert node.sim.inbox.empty() and not len(node.outbox) and not node.router.received
            assert len(node.transport._leases) <= 1
        assert (self.loop.num_timers, self.loop.num_readers) == self.baseline, "a timer or a reader is left"
        ended = sum(service.metrics.ended.values())
        assert sum(service.metrics.accepted.values()) == ended == sum(c.refused is None for c in self.clients)

    def probe(self) -> None:
        """At rest, one more request is answered as ever."""
        client = self.submit([30, 21, 22], 4)
        for _ in range(60):
            if client.end is not None:
                break
            self.flow()
        assert client.end is not None and client.end.error is None, (client.end, client.refused)
        client.check_complete()

    def close(self) -> None:
        """Stop the gateway; kill the workers."""
        self.drained = True
        self.loop.run(self.service.stop())
        self.loop.settle()
        for node in self.nodes:
            node.die(0)
        self.loop.settle()
        self.check()
        assert not self.loop.num_readers
