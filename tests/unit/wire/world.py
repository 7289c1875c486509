"""The whole service in one thread: a real gateway core, real workers, and a wire between that a test controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any, Final

from gateway.config import GatewayConfig
from gateway.core.flights import Flight
from gateway.core.placement import Worker
from gateway.core.service import Service
from gateway.core.worker_link import WorkerLink
from gateway.decisions.recovery import MAX_ATTEMPTS, Verdict, judge
from gateway.generation import GenerateRequest, RequestError
from shared import protocol as wire
from shared.errors import ErrorCode, FinishReason
from tests.unit.wire.client import STALL_S, Client, Habits
from tests.unit.wire.fake_zmq import Context, Frames, Wire
from tests.unit.wire.node import KILL_DIGEST, KILL_TOKEN, PROGRESS_S, EncoderNode, Node, PrefillNode
from tests.unit.wire.virtual_loop import VirtualLoop
from tests.unit.worker.loop.simulation import CARD, oracle
from worker.sim.timeline import VirtualClock

DEADLINE_S = 20.0
RETRY_WAIT_S = 6.0
GRACE_S = 3.0
RESTART_S = 0.2
FREEZE_S = 4.0  # then a supervisor has seen that no progress is made


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
            self.crashes.append({flight.request_id for flight in flights if flight.staged is None})
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


# A frame on its way may arrive just now, and of a link's ticks, 0.25 s apart, every other one is late where time goes by 0.24 s.
NOTICED_S: Final = PROGRESS_S + 0.5


class World:
    """A gateway, its clients, and its workers."""

    def __init__(
        self,
        *,
        num_workers: int = 1,
        num_encoders: int = 0,
        encoder_jobs: int = 8,
        num_prefills: int = 0,
        prefill_tokens: int = 4,
        max_queue: int = 64,
        supervised: bool = False,
        **options: Any,
    ) -> None:
        """With encoders or prefill workers the others have the role decode."""
        self.clock = VirtualClock()
        self.clock.advance(1.0)
        self.loop = VirtualLoop.on(self.clock)
        endpoints = [f"ipc:///worker-{number}" for number in range(num_workers)]
        encoders = [f"ipc:///encoder-{number}" for number in range(num_encoders)]
        prefills = [f"ipc:///prefill-{number}" for number in range(num_prefills)]
        self._encoder_jobs = encoder_jobs
        self.wires = {endpoint: Wire() for endpoint in [*endpoints, *encoders, *prefills]}
        # From each worker to each prefill worker.
        self.page_wires = [
            {endpoint: Wire(b"%d" % (number + 1)) for endpoint in prefills} for number in range(num_workers)
        ]
        config = GatewayConfig(
            workers=(*endpoints, *encoders, *prefills),
            prefill_tokens=prefill_tokens,
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
        self.encoders: list[EncoderNode] = []
        self._takes_features = num_encoders > 0
        self.prefills: list[PrefillNode] = []
        self.nodes: list[Node] = [self._new_node(number) for number in range(num_workers)]
        self.encoders = [self._new_encoder(self.wires[endpoint]) for endpoint in encoders]
        self.prefills = [self._new_prefill(number) for number in range(num_prefills)]
        self.loop.run(self.service.start())
        for between in self.wires.values():
            between.tap = self._count_submit
        self.baseline = (self.loop.num_timers, self.loop.num_readers)
        for _ in range(4):  # a hello that comes before the worker serves is asked again
            self.flow(2)
            self.clock.advance(0.25)
        assert self.all_ready()

    def _new_node(self, number: int) -> Node:
        return Node(
            self.wires[f"ipc:///worker-{number}"],
            self.clock,
            next(self._epochs),
            self._options,
            takes_features=self._takes_features,
            to_prefills=self.page_wires[number],
        )

    def _new_prefill(self, number: int) -> PrefillNode:
        endpoint = f"ipc:///prefill-{number}"
        workers = [wires[endpoint] for wires in self.page_wires]
        return PrefillNode(self.wires[endpoint], self.clock, next(self._epochs), self._options, workers)

    def _new_encoder(self, between: Wire) -> EncoderNode:
        return EncoderNode(between, self.clock, next(self._epochs), self._encoder_jobs)

    def _count_submit(self, frames: Frames) -> None:
        message = wire.decode_from_gateway(frames[0])
        if isinstance(message, wire.Submit):
            self.submits[message.request_id] += 1
            self.epochs[message.sequence_id] = message.epoch

    @property
    def workers(self) -> list[Worker]:
        """The gateway's view of the nodes."""
        return self.service.workers[: len(self.nodes)]

    @property
    def links(self) -> list[WorkerLink]:
        """The gateway's side of the wire to each node."""
        return [worker.link for worker in self.workers]

    @property
    def everybody(self) -> list[Node | EncoderNode]:
        """All processes, in the order of the gateway's workers."""
        return [*self.nodes, *self.encoders, *self.prefills]

    def all_ready(self) -> bool:
        """Whether the gateway serves from every process's present epoch."""
        pairs = zip(self.service.workers, self.everybody, strict=True)
        return all(node.alive and worker.link.epoch == node.epoch for worker, node in pairs)

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
            for node in self.everybody:
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
        for wires in self.page_wires:
            for between in wires.values():
                between.deliver_to_gateway()
                between.deliver_to_worker()
        for node in self.everybody:
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
        for worker, node in zip(self.workers, self.nodes, strict=True):
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
        for worker, node in zip(self.service.workers, self.everybody, strict=True):
            link = worker.link
            was_down = not node.serves and node.down_s <= began_s  # all that time: it may also die on the way
            if was_down and seconds > NOTICED_S:
                assert link.ready is None, "a worker that does nothing is taken for ready"

    def restart(self, number: int) -> None:
        """A supervisor starts a worker that died."""
        node = self.nodes[number]
        if not node.alive:
            self.nodes[number] = self._new_node(number)

    def restart_encoder(self, number: int) -> None:
        """The same for an encoder."""
        node = self.encoders[number]
        if not node.alive:
            self.encoders[number] = self._new_encoder(node.between)

    def restart_prefill(self, number: int) -> None:
        """The same for a prefill worker."""
        if not self.prefills[number].alive:
            self.prefills[number] = self._new_prefill(number)

    def _supervise(self) -> None:
        for nodes, restart in (
            (self.nodes, self.restart),
            (self.encoders, self.restart_encoder),
            (self.prefills, self.restart_prefill),
        ):
            for number, node in enumerate(nodes):
                down_s = self.clock.now() - node.down_s
                if node.frozen and down_s > FREEZE_S:
                    node.die(0)
                if not node.alive and down_s > RESTART_S:
                    restart(number)

    # ------------------------------------------------------------ what must hold

    def check(self) -> None:
        """What must hold after every step."""
        assert not self.faults, self.faults
        assert not self.loop.faults, self.loop.faults
        by_request = {flight.request_id: flight for flight in self.service.unlanded}
        for worker in self.service.workers:
            link = worker.link
            assert not link.anomalies["failed_message"] and not link.anomalies["failed_tick"]
            flights = worker.flights.by_id
            assert worker.occupancy.num_active == len(flights) == sum(worker.occupancy.tenants.values())
            assert link.ready is not None or not flights, "a flight on a worker that was lost"
            for number, flight in flights.items():
                if flight.staged is None:
                    assert self.epochs[number] == link.epoch, "a flight on a worker of another epoch"
                else:
                    assert flight.staged.missing and number not in self.epochs, "it waits for nothing"
                assert flight.sequence_id == number and flight.worker_key == worker.key and not flight.landed
                assert flight.request_id in by_request, "a flight on a worker that nobody waits for"
        self._check_encoders()
        self._check_prefills()
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

    def _check_encoders(self) -> None:
        """Whoever waits for a picture waits for one that an encoder was asked for, and nobody else is asked."""
        encoders = self.service._dispatch.encoders
        jobs = list(encoders._by_id.values())
        assert len(jobs) == len(encoders), "a picture that nobody encodes"
        assert all(job.flights for job in jobs), "a picture that nobody waits for"
        for worker in self.service.workers:
            assert worker.num_pictures == sum(job.encoder is worker for job in jobs)
            assert not worker.num_pictures or worker.link.ready is not None, "a picture at a lost encoder"
        waiting = {(flight, key) for f in self.service.unlanded for flight, key in _missing(f)}
        assert waiting == {(flight, job.key) for job in jobs for flight in job.flights}

    def _check_prefills(self) -> None:
        """What a prefill worker is believed to have is a request on some worker that has not begun."""
        asked = self.service._dispatch.prefills._asked
        for flight in asked:
            assert flight.worker_key is not None and not flight.landed and not flight.state.next_index
        for worker in self.service.workers:
            assert worker.num_prompts == sum(other is worker for other in asked.values())

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
            assert all(image.spec.digest != KILL_DIGEST for image in client.request.images)
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
        for between in [*self.wires.values(), *(w for wires in self.page_wires for w in wires.values())]:
            between.hwm = 10_000
            between.late.clear()
            between.late_to_worker.clear()
        until_s = self.clock.now() + DEADLINE_S + RETRY_WAIT_S + 2 * GRACE_S
        while True:
            for process in self.everybody:
                process.frozen = process.device_lost = False
            for number in range(len(self.nodes)):
                self.restart(number)
            for number in range(len(self.encoders)):
                self.restart_encoder(number)
            for number in range(len(self.prefills)):
                self.restart_prefill(number)
            self.flow(2)
            engines = [*self.nodes, *self.prefills]
            busy = any(node.sim.scheduler.has_work for node in engines)
            if not busy:
                draining = any(node.sim.engine.is_draining for node in engines)
                draining |= any(node.loop.is_draining for node in self.encoders)
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
        assert not len(service._dispatch.encoders)
        for node in [*self.nodes, *self.prefills]:
            node.sim.check_at_rest()
        assert not len(service._dispatch.prefills)
        for encoder in self.encoders:
            assert not len(encoder.loop.queue)
        for worker, process in zip(service.workers, self.everybody, strict=True):
            assert not worker.flights.by_id and not worker.occupancy.num_active and not worker.orphans
            assert process.inbox.empty() and not len(process.outbox) and not process.router.received
            assert len(process.transport._leases) <= 1 + len(self.nodes) * isinstance(process, PrefillNode)
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
        for node in self.everybody:
            node.die(0)
        self.loop.settle()
        self.check()
        assert not self.loop.num_readers


def _missing(flight: Flight) -> list[tuple[Flight, bytes]]:
    return [] if flight.staged is None else [(flight, key) for key in flight.staged.missing]
