"""Owns the streaming core: from a checked request to its one end, with retries and deadlines. Gateway's loop.

Implements `gateway.generation.Core`. Interfaces hand in a validated `GenerateRequest` and a `Listener`; from
then on the request has exactly one `Flight`, on one worker or waiting for one, until its one end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Final

import msgspec
import structlog
import zmq

from gateway.config import GatewayConfig
from gateway.confined.grammars import GrammarChecker
from gateway.confined.images import ImageDecoder
from gateway.core.catalog import Catalog
from gateway.core.flights import Flight, Flights
from gateway.core.metrics import Metrics
from gateway.core.placement import Placement, Worker
from gateway.core.recordings import Recordings
from gateway.core.tokens import ModelTokens, TokenizerError
from gateway.core.tracing import Tracing
from gateway.core.worker_link import WorkerLink
from gateway.decisions.admission import Admission
from gateway.decisions.recovery import Recovery
from gateway.faults import fault_fields
from gateway.generation import GenerateRequest, Listener, PreparedImage, RequestError, RunningStream
from shared import protocol as wire
from shared.errors import ErrorCode

_TICK_S: Final = 0.25
_DEADLINE_GRACE_S: Final = 2.0  # the worker ends a late sequence itself, with its own finish reason

log = structlog.get_logger(__name__)


class Service:
    """See `gateway.generation.Core` for the part interfaces use."""

    def __init__(
        self, config: GatewayConfig, metrics: Metrics | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.images = ImageDecoder(config)
        self.grammars = GrammarChecker()
        self.gateway_id = f"gw-{secrets.token_hex(6)}"
        self._now = now
        self._admission = Admission(config.max_queue, config.max_wait_s)
        self._placement = Placement(self._admission, self.metrics.on_refused)
        self._recovery: Recovery[Flight] = Recovery(config.retry_wait_s)
        self._catalog = Catalog(config)
        self._workers = self._placement.workers
        self._by_link: dict[WorkerLink, Worker] = {}
        self._flights: dict[Flight, None] = {}  # every unlanded flight, oldest first
        self._sequence_ids = count(secrets.randbits(30) << 20)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._timer: asyncio.TimerHandle | None = None
        self._recordings = Recordings()
        self._tracing = Tracing(config.otlp_endpoint, self.gateway_id) if config.otlp_endpoint else None
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Connect to every worker of the configuration. Raises `gateway.config.ConfigError` for bad keys."""
        await self.images.start()
        for key, endpoint in enumerate(self.config.workers):
            link = WorkerLink(
                endpoint,
                self,
                self._context,
                gateway_id=self.gateway_id,
                progress_timeout_s=self.config.progress_timeout_s,
                curve_key_dir=self.config.curve_key_dir,
                now=self._now,
            )
            worker = Worker(key, link, Flights(self, link.note, self._now), self._admission.lane(0, 0))
            self._workers.append(worker)
            self._by_link[link] = worker
        for worker in self._workers:
            worker.link.open()
        self._tick()

    @property
    def draining(self) -> bool:
        """Whether new work is refused, for good."""
        return self._placement.draining

    def begin_drain(self) -> None:
        """Refuse new work from now on; what is in flight goes on."""
        self._placement.draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when it takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def end_all(self, error: RequestError) -> int:
        """End every flight with this error; returns how many there were."""
        flights = list(self._flights)
        for flight in flights:
            self.stop_sequence(flight)
            flight.fail(error)
        return len(flights)

    async def stop(self) -> None:
        """End what is left, close the sockets and the picture processes. Idempotent."""
        self.begin_drain()
        self.end_all(RequestError(ErrorCode.SHUTTING_DOWN, "the server is shutting down"))
        if self._timer is not None:
            self._timer.cancel()
        for worker in self._workers:
            worker.link.close()
        await self.images.stop()
        await self.grammars.stop()
        self._context.destroy(linger=0)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.stop)

    # ------------------------------------------------------------ what interfaces see

    def card(self, model_id: str | None) -> wire.ModelCard:
        """See `Core.card`."""
        return self._catalog.find(model_id).card

    def cards(self) -> list[wire.ModelCard]:
        """See `Core.cards`."""
        served = [worker.model for worker in self._workers]
        return [model.card for model in self._catalog.models() if any(model is other for other in served)]

    def tokens(self, model_id: str | None) -> ModelTokens:
        """The model's tokenizer. Raises as `card`."""
        return self._catalog.find(model_id).tokens

    def has_template(self, model_id: str) -> bool:
        """Whether the model brought a chat template."""
        return self._catalog.find(model_id).template is not None

    def room(self, model_id: str | None, num_prompt_ids: int, num_images: int = 0) -> int:
        """How many tokens may be generated after such a prompt; at least 1, so that `submit` explains."""
        model = self._catalog.find(model_id)
        return max(1, model.longest - model.num_prompt(num_prompt_ids, num_images))

    async def encode_async(self, model_id: str, text: str, *, markup: bool = False) -> list[int]:
        """See `Core.encode_async`."""
        return await self._catalog.find(model_id).encode(text, markup=markup)

    def decode(self, model_id: str, token_ids: list[int]) -> str:
        """See `Core.decode`."""
        return self._catalog.find(model_id).tokens.decode(token_ids)

    async def render_chat_async(
        self, model_id: str, messages: list[dict[str, object]], tools: list[object] | None
    ) -> str:
        """See `Core.render_chat_async`."""
        return await self._catalog.template(model_id).render_async(messages, tools)

    async def prepare_image(self, model_id: str, data_url: str, *, param: str) -> PreparedImage:
        """See `Core.prepare_image`. Refuses before decoding when the answer would be QUEUE_FULL anyway."""
        card = self.card(model_id)
        if card.image is None:
            raise RequestError(ErrorCode.UNSUPPORTED, f"model {card.model_id} takes no pictures", param=param)
        self.check_capacity(model_id, num_new=1 + self.images.num_pending)
        image = await self.images.prepare(data_url, card.image, param=param)
        # The picture follows BOS, as `gateway.api.prompts` composes every prompt that has one.
        position = 0 if card.bos_id is None else 1
        return replace(image, spec=msgspec.structs.replace(image.spec, position=position))

    def check_capacity(self, model_id: str | None, tenant: str = "", num_new: int = 1) -> None:
        """Raises what `submit` would for lack of a place: call it before expensive preparation."""
        self._placement.check(self._catalog.find(model_id), tenant, num_new)

    def check_any_capacity(self, tenant: str) -> None:
        """Raises what every `submit` would just now, whichever model it named: call it before reading a body."""
        self._placement.check_any(tenant)

    def submit(self, request: GenerateRequest, listener: Listener) -> RunningStream:
        """See `Core.submit`."""
        model = self._catalog.find(request.model_id)
        model.check(request)
        worker = self._placement.place(model, request.tenant, 1)
        now_s = self._now()
        deadline_s = min(request.deadline_s or self.config.request_deadline_s, self.config.request_deadline_s)
        flight = Flight(
            request,
            listener,
            model.stream(request, now_s),
            self,
            started_s=now_s,
            deadline_s=now_s + deadline_s,
        )
        self._send(flight, worker)
        self._flights[flight] = None
        self._idle.clear()
        self.metrics.on_accepted(model.card.model_id)
        if self._tracing is not None:
            self._tracing.begin(flight)
        return flight

    def readiness(self) -> tuple[bool, str]:
        """Whether new work would be served, and why not."""
        return self._placement.readiness()

    @property
    def workers(self) -> list[Worker]:
        """Every configured worker, for metrics and the admin page."""
        return self._workers

    @property
    def num_in_flight(self) -> int:
        """Requests accepted and not ended."""
        return len(self._flights)

    @property
    def num_recovering(self) -> int:
        """Requests waiting for a worker after theirs died."""
        return len(self._recovery)

    async def trace(self, num_steps: int, timeout_s: float = 60.0) -> bytes:
        """Record steps of the first ready worker; Chrome-trace JSON. Raises `RequestError`."""
        worker = next((worker for worker in self._workers if worker.link.ready is not None), None)
        if worker is None:
            raise RequestError(ErrorCode.LOADING, "no worker is ready")
        return await self._recordings.record(worker.link, num_steps, timeout_s)

    # ------------------------------------------------------------ sending

    def _send(self, flight: Flight, worker: Worker) -> None:
        """Put a flight on a worker. Raises `RequestError`, and then it is nowhere."""
        worker.take(flight, next(self._sequence_ids), max(0.001, flight.deadline_s - self._now()))

    # ------------------------------------------------------------ told by flights

    def on_started(self, flight: Flight) -> None:
        """See `FlightEvents`."""
        self.metrics.on_first_token(self._now() - flight.started_s)
        if flight.request.images:  # pixels were kept for a retry only, and are megabytes
            flight.request = replace(flight.request, images=[])
        if self._recovery.on_settled(flight):
            self._resume()

    def on_token_gap(self, gap_s: float) -> None:
        """See `FlightEvents`."""
        self.metrics.on_token_gap(gap_s)

    def on_landed(self, flight: Flight) -> None:
        """See `FlightEvents`."""
        self._take_off(flight)
        self._flights.pop(flight, None)
        if not self._flights:
            self._idle.set()
        assert flight.state.end is not None
        elapsed_s = self._now() - flight.started_s
        self.metrics.on_end(flight.state.end, elapsed_s)
        if self._tracing is not None:
            self._tracing.end(flight, flight.state.end, elapsed_s)
        if self._recovery.on_settled(flight):
            self._resume()

    def stop_sequence(self, flight: Flight) -> None:
        """See `FlightEvents`."""
        if flight.lane_key is not None:
            self._workers[flight.lane_key].link.cancel([flight.sequence_id])

    def _take_off(self, flight: Flight) -> None:
        if flight.lane_key is None:
            return
        worker = self._workers[flight.lane_key]
        if worker.flights.by_id.pop(flight.sequence_id, None) is not None:
            worker.lane.leave(flight.request.tenant, self._now())
        flight.lane_key = None

    # ------------------------------------------------------------ told by links

    def on_ready(self, link: WorkerLink, tokenizer_json: bytes, chat_template: bytes) -> None:
        """See `WorkerEvents`."""
        worker = self._by_link[link]
        assert link.ready is not None
        before = worker.model
        try:
            model = self._catalog.announce(link.ready, tokenizer_json, chat_template)
        except (TokenizerError, UnicodeDecodeError, RequestError) as error:
            link.disown(f"model {link.ready.model.model_id}: {error}")
            return
        for other in self._workers:  # all workers of one name serve the newest announcement of it
            if other.model is not None and other.model.card.model_id == model.card.model_id:
                other.model = model
        worker.model = model
        if before is not model:
            log.info("model_served", model=model.card.model_id, family=model.card.family)
        orphans, worker.orphans = worker.orphans, []
        if link.epoch == link.lost_epoch:  # it was silent, not dead
            link.cancel(orphans)
        worker.lane = self._admission.lane(model.limits.max_rows, model.limits.max_waiting)
        self._resume()

    def on_outputs(self, link: WorkerLink, outputs: wire.StepOutputs) -> None:
        """See `WorkerEvents`."""
        try:
            self._by_link[link].flights.on_outputs(outputs)
        except ValueError:
            link.note("malformed")

    def on_rejected(self, link: WorkerLink, rejected: wire.Rejected) -> None:
        """See `WorkerEvents`."""
        self.metrics.on_refused(rejected.code)
        self._by_link[link].flights.on_rejected(rejected)

    def on_beat(self, link: WorkerLink, beat: wire.Beat) -> None:
        """See `WorkerEvents`."""
        self._by_link[link].lane.on_beat(beat.drain_rate, beat.num_waiting)

    def on_trace(self, link: WorkerLink, trace: bytes) -> None:
        """See `WorkerEvents`."""
        self._recordings.on_trace(link, trace)

    def on_lost(self, link: WorkerLink, error: RequestError) -> None:
        """See `WorkerEvents`: streams that began end here, the others are retried once (see `Recovery`)."""
        worker = self._by_link[link]
        lost = list(worker.flights.by_id.values())
        worker.orphans = list(worker.flights.by_id)
        now_s = self._now()
        num_retried = 0
        for flight in lost:
            self._take_off(flight)
            if flight.state.next_index == 0 and not self.draining and self._recovery.take(flight, now_s):
                num_retried += 1
            elif flight.state.next_index == 0 and flight.attempts > 1:
                message = (
                    "this request was being started when its worker died, twice; it will not be tried again"
                )
                flight.fail(RequestError(ErrorCode.QUARANTINED, message))
            else:
                flight.fail(error)
        if lost:
            log.warning("flights_lost", num_ended=len(lost) - num_retried, num_retried=num_retried)
        self.metrics.on_worker_lost()
        self._resume()

    # ------------------------------------------------------------ retries and deadlines

    def _resume(self) -> None:
        """Send the next suspect, if a worker has room for it."""
        while (flight := self._recovery.next()) is not None:
            if flight.landed:
                self._recovery.on_settled(flight)
                continue
            try:
                model = self._catalog.find(flight.request.model_id)
                worker = self._placement.place(model, flight.request.tenant, 1)
                self._send(flight, worker)
            except RequestError as error:
                if error.code in (ErrorCode.LOADING, ErrorCode.QUEUE_FULL, ErrorCode.WORKER_LOST):
                    self._recovery.put_back(flight)
                    return
                self._recovery.on_settled(flight)
                flight.fail(error)
                continue
            flight.state = model.stream(flight.request, flight.started_s)
            return

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        try:
            now_s = self._now()
            for flight in self._recovery.expired(now_s):
                flight.fail(RequestError(ErrorCode.WORKER_LOST, "the worker died and none took its place"))
            late = [f for f in self._flights if now_s > f.deadline_s + _DEADLINE_GRACE_S]
            for flight in late:
                self.stop_sequence(flight)
                allowed_s = flight.deadline_s - flight.started_s
                message = f"the request was not finished after {allowed_s:g} s"
                flight.fail(RequestError(ErrorCode.DEADLINE_EXCEEDED, message))
            if len(self._recovery):
                self._resume()
        except Exception as fault:  # the timer must go on whatever one tick met
            log.error("service_tick_failed", **fault_fields(fault))
