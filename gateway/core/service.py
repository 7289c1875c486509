"""Owns the streaming core's life, and what it knows of its workers and their models. Gateway's loop.

Implements `gateway.generation.ServingCore` for interfaces and `WorkerEvents` for the links; `gateway.core.dispatch`
follows accepted requests to their end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec
import structlog
import zmq

from gateway.access import Access
from gateway.caller import CALLER
from gateway.config import GatewayConfig
from gateway.confined.grammars import GrammarChecker
from gateway.confined.images import ImageDecoder
from gateway.core.catalog import AnnouncedModel, Catalog
from gateway.core.dispatch import Dispatch
from gateway.core.flights import Flights
from gateway.core.key_file import KeyFile
from gateway.core.metrics import Metrics
from gateway.core.placement import Placement, Worker
from gateway.core.recordings import Recordings
from gateway.core.tokens import TokenizerError
from gateway.core.tracing import Tracing
from gateway.core.worker_link import WorkerLink
from gateway.core.worker_pool import WorkerPool
from gateway.decisions.admission import Admission
from gateway.decisions.held import Held
from gateway.decisions.limits import Meter, Meters
from gateway.generation import (
    GenerateRequest,
    Listener,
    PreparedImage,
    RequestError,
    RunningStream,
    ServedModel,
    no_pictures,
)
from gateway.native import library
from shared import protocol as wire
from shared.clips import frame_spec
from shared.errors import ErrorCode

log = structlog.get_logger(__name__)


class Service:
    """See `gateway.generation.ServingCore` for the part interfaces use."""

    def __init__(
        self, config: GatewayConfig, metrics: Metrics | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.access = Access(config)
        self.meters = Meters()
        self._key_file = KeyFile(self.access, self.meters, now)
        self.images = ImageDecoder(config)
        self.grammars = GrammarChecker()
        self.gateway_id = f"gw-{secrets.token_hex(6)}"
        self._now = now
        self._is_ending = False
        self._admission = Admission(
            config.max_queue, config.max_wait_s, config.gateways, lambda: self.access.num_tenants
        )
        self._placement = Placement(self._admission, self.metrics.on_refused)
        self._catalog = Catalog(config)
        self._workers = self._placement.workers
        self._pool = WorkerPool(self._placement, self._make_worker, interval_s=config.worker_lookup_s)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._recordings = Recordings()
        self._tracing = Tracing(config.otlp_endpoint, self.gateway_id) if config.otlp_endpoint else None
        self._dispatch = Dispatch(
            config, self._catalog, self._placement, self.metrics, self._tracing, self._now
        )

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Reach for every worker of the configuration. Raises `shared.settings.ConfigError` for bad keys."""
        await self.images.start()
        if self.config.native:
            self._compiling = asyncio.create_task(asyncio.to_thread(library.load))
        self._pool.start(self.config.workers)
        self._dispatch.start()
        self._key_file.start()

    def _make_worker(self, key: int, endpoint: str) -> Worker:
        link = WorkerLink(
            endpoint,
            self,
            self._context,
            gateway_id=self.gateway_id,
            curve_key_dir=self.config.curve_key_dir,
            now=self._now,
        )
        flights = Flights(self._dispatch, link.note, self._now, is_compiled=self.config.native)
        return Worker(key, link, flights, self._admission.occupancy(0, 0))

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._placement.draining

    def give_notice(self) -> None:
        """Not ready from now on, while new work is still taken."""
        self._placement.is_leaving = True

    def begin_drain(self) -> None:
        """Refuse new work from now on, for good; what is in flight goes on."""
        self._is_ending = True
        self._placement.draining = True

    def pause(self) -> None:
        """Refuse new work until `resume`; what is in flight goes on."""
        self._placement.draining = True

    def resume(self) -> None:
        """Take new work again. Raises `RequestError` SHUTTING_DOWN when the end has begun."""
        if self._is_ending:
            raise RequestError(ErrorCode.SHUTTING_DOWN, "the server is shutting down; start it again")
        self._placement.draining = False
        self._dispatch.resume()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False when it takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._dispatch.idle.wait()
        except TimeoutError:
            return False
        return True

    def end_all(self, error: RequestError) -> int:
        """End every request in flight with this error; returns how many there were."""
        return self._dispatch.end_all(error)

    async def stop(self) -> None:
        """End what is left, close the sockets and the picture processes. Idempotent."""
        self.begin_drain()
        self.end_all(RequestError(ErrorCode.SHUTTING_DOWN, "the server is shutting down"))
        self._dispatch.stop()
        await self._key_file.stop()
        self._pool.stop()
        await self.images.stop()
        await self.grammars.stop()
        self._context.destroy(linger=0)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.stop)

    # ------------------------------------------------------------ what interfaces see

    def model(self, model_id: str | None) -> AnnouncedModel:
        """See `Core.model`."""
        try:
            found = self._catalog.find(model_id)
        except RequestError as error:
            raise (
                self._placement.nobody(error.message) if error.code is ErrorCode.LOADING else error
            ) from None
        meter = self.meters.of(CALLER.get().key)
        if meter is not None and not meter.entry.may_use(found.card.model_id):
            allowed = ", ".join(meter.entry.models or ()) or "none"
            message = f"this key may not use model {found.card.model_id}; it may use: {allowed}"
            raise RequestError(ErrorCode.MODEL_NOT_FOUND, message, param="model")
        return found

    def models(self) -> list[AnnouncedModel]:
        """See `Core.models`."""
        served = [worker.model for worker in self._workers]
        meter = self.meters.of(CALLER.get().key)
        return [
            model
            for model in self._catalog.models()
            if any(model is other for other in served)
            and (meter is None or meter.entry.may_use(model.card.model_id))
        ]

    async def check_grammar(self, grammar: wire.Grammar, *, param: str, tenant: str = "") -> wire.Grammar:
        """See `Core.check_grammar`."""
        return await self.grammars.check(grammar, param=param, tenant=tenant)

    async def prepare_image(
        self, model: ServedModel, data_url: str, *, param: str, num_frames: int = 0
    ) -> PreparedImage:
        """See `Core.prepare_image`. Refuses before decoding when the answer would be QUEUE_FULL anyway."""
        card = model.card
        if card.image is None:
            raise no_pictures(card, param)
        # A video's frames are many pictures of one request.
        self.check_capacity(model, num_new=1 if num_frames else 1 + self.images.num_pending)
        spec = frame_spec(card.image, num_frames) if num_frames else card.image
        image = await self.images.prepare(data_url, spec, param=param)
        if card.bos_id is not None:
            return image
        # There is no first id for the picture to follow.
        runs = [(0, num) for _, num in image.spec.runs]
        return replace(image, spec=msgspec.structs.replace(image.spec, runs=runs))

    def check_capacity(self, model: ServedModel, tenant: str = "", num_new: int = 1) -> None:
        """See `Core.check_capacity`."""
        self._placement.check(self._catalog.current(model), tenant, num_new)

    def check_any_capacity(self, tenant: str) -> None:
        """See `ServingCore.check_any_capacity`."""
        self._placement.check_any(tenant)

    def submit(self, request: GenerateRequest, listener: Listener) -> RunningStream:
        """See `Core.submit`."""
        try:
            return self._dispatch.submit(request, listener, self._meter())
        except RequestError as error:
            if error.code is ErrorCode.RATE_LIMITED:
                self.metrics.on_refused(error.code)
            raise

    def begin_request(self) -> None:
        """See `ServingCore.begin_request`."""
        meter = self._meter()
        if meter is not None:
            try:
                meter.on_request(self._now())
            except RequestError as error:
                self.metrics.on_refused(error.code)
                raise

    def _meter(self) -> Meter | None:
        """The meter of the key that the running task acts for; None for a key without one.

        Raises `RequestError` UNAUTHORIZED for a key that was revoked or has expired since, as an open WebSocket's may.
        """
        key = CALLER.get().key
        if not self.access.needs_key or key.startswith("api_keys["):
            return None
        meter = self.meters.of(key)
        if meter is None or meter.entry.is_over(time.time()):
            raise RequestError(ErrorCode.UNAUTHORIZED, "the API key was revoked, or has expired")
        return meter

    def readiness(self) -> tuple[bool, str]:
        """See `ServingCore.readiness`."""
        is_ready, reason = self._placement.readiness()
        is_ending = self.draining or self._placement.is_leaving
        return is_ready, reason if is_ready or is_ending else self._pool.problem or reason

    @property
    def workers(self) -> list[Worker]:
        """Every worker that is known, for metrics and the admin page."""
        return self._workers

    @property
    def num_in_flight(self) -> int:
        """Requests accepted and not ended."""
        return len(self._dispatch.flights)

    @property
    def num_recovering(self) -> int:
        """Requests waiting for a worker after theirs died."""
        return len(self._dispatch.recovery)

    async def record(self, num_steps: int, timeout_s: float = 60.0) -> bytes:
        """Record steps of the first ready worker; Chrome-trace JSON. Raises `RequestError`."""
        worker = next(
            (
                worker
                for worker in self._workers
                if worker.model is not None and worker.link.ready is not None
            ),
            None,
        )
        if worker is None:
            raise RequestError(ErrorCode.LOADING, "no worker is ready")
        return await self._recordings.record(worker.link, num_steps, timeout_s)

    # ------------------------------------------------------------ told by links

    def on_ready(self, link: WorkerLink, tokenizer_json: bytes, chat_template: bytes) -> None:
        """See `WorkerEvents`."""
        worker = self._pool.of(link)
        assert link.ready is not None
        self._warn_mismatched(link)
        worker.held = Held(link.ready.limits.feature_bytes)
        if worker.is_helper:
            self._on_helper(worker, link.ready)
            return
        before = worker.model
        try:
            model = self._catalog.announce(link.ready, tokenizer_json, chat_template)
        except (TokenizerError, UnicodeDecodeError, RequestError) as error:
            link.disown(f"model {link.ready.model.model_id}: {error}")
            return
        for other in self._workers:  # every worker of this model now serves the newest announcement
            if other.model is not None and other.model.card.model_id == model.card.model_id:
                other.model = model
        worker.model, worker.is_leaving = model, False
        if before is not model:
            log.info("model_served", model=model.card.model_id, family=model.card.family)
        orphans, worker.orphans = worker.orphans, []
        if link.epoch == link.lost_epoch:  # the same process again: it was silent, not dead
            link.cancel(orphans)
        worker.occupancy = self._admission.occupancy(model.limits.max_rows, model.limits.max_waiting)
        self._dispatch.resume()

    def _on_helper(self, worker: Worker, ready: wire.Ready) -> None:
        """It announces no model: requests are for the workers that it encodes pictures, or computes prompts, for."""
        worker.model, worker.is_leaving, worker.orphans = None, False, []
        worker.occupancy = self._admission.occupancy(ready.limits.max_rows, ready.limits.max_waiting)

    def _warn_mismatched(self, link: WorkerLink) -> None:
        """Encoders and prefill workers of a model that a worker cannot use are there for nothing: say so."""
        mine = link.ready
        if mine is None or mine.role == "all":
            return
        for other in self._workers:
            theirs = other.link.ready
            if theirs is None or mine.model.model_id != theirs.model.model_id:
                continue
            roles, event, needs = {mine.role, theirs.role}, "", ""
            if roles == {"encode", "decode"} and mine.features != theirs.features:
                event, needs = "encoder_mismatched", "the same model files, dtype and quantize at both"
            elif roles == {"prefill", "decode"} and mine.pages != theirs.pages:
                event = "prefill_mismatched"
                needs = "the same model files, dtype, kv_dtype, quantize, context, activations and page_tokens at both"
                needs += "; and the prefix cache on at the one that decodes"
            if event:
                is_encoder = event == "encoder_mismatched"
                log.warning(
                    event,
                    endpoint=link.endpoint,
                    other=other.link.endpoint,
                    ours=str(mine.features if is_encoder else mine.pages),
                    theirs=str(theirs.features if is_encoder else theirs.pages),
                    needs=needs,
                )

    def on_features(self, link: WorkerLink, features: wire.Features, payloads: list[bytes]) -> None:
        """See `WorkerEvents`."""
        try:
            self._dispatch.encoders.on_features(self._pool.of(link), features, payloads)
        except ValueError:
            link.note("malformed")

    def on_outputs(self, link: WorkerLink, outputs: wire.StepOutputs) -> None:
        """See `WorkerEvents`."""
        try:
            self._pool.of(link).flights.on_outputs(outputs)
        except ValueError:
            link.note("malformed")

    def on_rejected(self, link: WorkerLink, rejected: wire.Rejected) -> None:
        """See `WorkerEvents`."""
        self.metrics.on_refused(rejected.code)
        self._dispatch.on_rejected(self._pool.of(link), rejected)

    def on_beat(self, link: WorkerLink, beat: wire.Beat) -> None:
        """See `WorkerEvents`."""
        occupancy = self._pool.of(link).occupancy
        occupancy.on_beat(beat.drain_rate, beat.num_waiting)
        occupancy.share(beat.num_gateways, beat.num_running + beat.num_waiting)
        self._dispatch.encoders.on_beat(self._pool.of(link), beat)

    def on_recording(self, link: WorkerLink, recording: bytes) -> None:
        """See `WorkerEvents`."""
        self._recordings.on_recording(link, recording)

    def on_lost(self, link: WorkerLink, error: RequestError) -> None:
        """See `WorkerEvents`."""
        self._dispatch.on_lost(self._pool.of(link), error)
