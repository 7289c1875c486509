"""Owns the pictures that are encoded by workers with the role `encode`: asked, waited for, tried again. Gateway's loop.

A request that has such pictures holds its place at its worker from the beginning, and is sent there when all of them are
encoded. Whatever goes wrong on that way costs time and nothing else: in the end the worker encodes a picture itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from gateway.core.flights import Flight, Staged
from gateway.core.metrics import Metrics
from gateway.core.placement import Placement, Worker
from gateway.decisions.affinity import content_key
from gateway.generation import PreparedImage, RequestError
from shared import protocol as wire
from shared.errors import ErrorCode

MAX_LOSSES: Final = 2  # encoders that fail a picture before its worker encodes it itself
UNANSWERED_S: Final = 2.0  # an idle encoder that was asked so long ago has lost the request, or its answer

log = structlog.get_logger(__name__)


class EncoderEvents(Protocol):
    """Hears what becomes of flights that wait for pictures."""

    def on_encoded(self, flight: Flight) -> None:
        """Nothing is missing any more: send it."""

    def on_deadly(self, flight: Flight) -> None:
        """One of its pictures crashed encoders, once with nothing else there."""


@dataclass(slots=True, eq=False)
class _Job:
    """One picture at one encoder."""

    key: bytes
    image: PreparedImage
    tenant: str
    format: wire.FeatureFormat
    flights: dict[Flight, None]
    job_id: int = 0
    encoder: Worker | None = None
    asked_s: float = 0.0
    num_losses: int = 0
    num_crashes: int = 0
    was_alone: bool = False  # in an encoder that crashed
    was_idle: bool = False  # its encoder's last heartbeat said that there is nothing to do
    failed: set[int] = field(default_factory=set)  # keys of encoders that failed it


class Encoders:
    """The jobs under way, for the flights of `gateway.core.dispatch`."""

    def __init__(
        self,
        placement: Placement,
        metrics: Metrics,
        events: EncoderEvents,
        now: Callable[[], float],
        next_id: Callable[[], int],
    ) -> None:
        self._placement = placement
        self._metrics = metrics
        self._events = events
        self._now = now
        self._next_id = next_id
        self._jobs: dict[tuple[bytes, wire.FeatureFormat], _Job] = {}
        self._by_id: dict[int, _Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    # ------------------------------------------------------------ flights

    def begin(self, flight: Flight, worker: Worker) -> bool:
        """Ask for the pictures that the worker should be given encoded. False: there is nothing to wait for."""
        format = worker.takes_features
        if format is None or not flight.request.images:
            return False
        wanted = {
            key: image
            for key, image in self._keyed(flight)
            if key not in worker.held and _num_bytes(image, format) <= wire.MAX_PAYLOAD_BYTES
        }
        if not wanted or not self._placement.encoders(format):
            return False
        staged = flight.staged = Staged(self._now(), set(wanted))
        for key, image in wanted.items():
            job = self._jobs.get((key, format))
            if job is not None:
                job.flights[flight] = None
                self._metrics.pictures["shared"] += 1
                continue
            job = _Job(key, image, flight.tenant, format, {flight: None})
            self._jobs[key, format] = job
            if not self._ask(job):
                del self._jobs[key, format]
                staged.missing.discard(key)
                self._metrics.pictures["unplaced"] += 1
        if not staged.missing:
            flight.staged = None
        return bool(staged.missing)

    def take(self, flight: Flight) -> tuple[list[int], list[bytes]]:
        """What to send of the flight's pictures: those that are encoded, by their places, and all frames in order."""
        staged, flight.staged = flight.staged, None
        encoded: list[int] = []
        frames: list[bytes] = []
        for number, (key, image) in enumerate(self._keyed(flight)):
            features = staged.features.get(key) if staged is not None else None
            if features is None:
                frames += image.frames
            else:
                encoded.append(number)
                frames.append(features)
                self._metrics.feature_bytes += len(features)
        if staged is not None:
            self._metrics.on_staged(self._now() - staged.began_s)
        return encoded, frames

    def on_sent(self, flight: Flight, worker: Worker) -> None:
        """The worker was given the flight's pictures, in whichever form: it keeps their features."""
        format = worker.takes_features
        if format is not None:
            for key, image in self._keyed(flight):
                worker.held.add(key, _num_bytes(image, format))

    def forget(self, flight: Flight) -> None:
        """The flight is on its worker no more: what only it waited for is stopped."""
        staged, flight.staged = flight.staged, None
        if staged is None:
            return
        for job in [job for job in self._jobs.values() if flight in job.flights]:
            del job.flights[flight]
            if not job.flights:
                self._drop(job)
                if job.encoder is not None:
                    job.encoder.link.cancel([job.job_id])

    def _keyed(self, flight: Flight) -> Iterator[tuple[bytes, PreparedImage]]:
        for image in flight.request.images:
            key = content_key(flight.tenant, [image.spec.digest], ())
            assert key is not None
            yield key, image

    # ------------------------------------------------------------ told by encoders

    def on_features(self, worker: Worker, message: wire.Features, payloads: Sequence[bytes]) -> None:
        """An encoder's answer. Raises ValueError for one whose frames do not fit."""
        job = self._by_id.get(message.job_id)
        if job is None or job.encoder is not worker:
            return  # nobody waits any more, and the cancel crossed this on the wire
        if message.code is not None:
            log.info("picture_not_encoded", code=message.code.value, reason=message.message[:200])
            self._metrics.pictures["refused"] += 1
            self._fail(job)
            return
        if message.format != job.format or len(payloads) != 1:
            self._fail(job)
            raise ValueError("features of another format")
        if len(payloads[0]) != _num_bytes(job.image, job.format):
            self._fail(job)
            raise ValueError("features of another size")
        self._metrics.pictures["encoded"] += 1
        self._settle(job, payloads[0])

    def on_beat(self, worker: Worker, beat: wire.Beat) -> None:
        """An idle encoder will not answer what it was asked a while ago: a frame was lost. Two heartbeats must say so: one that
        was held still (stopped, starved) sends the first before it has read what came meanwhile."""
        if not self._by_id:
            return
        is_idle = not (beat.num_running or beat.num_waiting)
        late_s = self._now() - UNANSWERED_S
        for job in [job for job in self._by_id.values() if job.encoder is worker and job.asked_s < late_s]:
            if is_idle and job.was_idle:
                self._metrics.pictures["unanswered"] += 1
                self._fail(job)
            else:
                job.was_idle = is_idle

    def on_lost(self, worker: Worker, *, crashed: bool) -> None:
        """An encoder is gone: its pictures are encoded elsewhere."""
        lost = [job for job in self._by_id.values() if job.encoder is worker]
        for job in lost:
            self._metrics.pictures["lost"] += 1
            job.num_crashes += crashed
            job.was_alone |= crashed and len(lost) == 1
            self._fail(job)

    # ------------------------------------------------------------ jobs

    def _ask(self, job: _Job) -> bool:
        """Send a picture to an encoder; False where none takes it."""
        while (encoder := self._placement.place_picture(job.format, job.key, job.failed)) is not None:
            job.job_id = self._next_id()
            message = wire.Encode(encoder.link.epoch, job.job_id, job.image.spec, job.tenant)
            try:
                encoder.link.encode(message, list(job.image.frames))
            except RequestError:
                job.failed.add(encoder.key)
                continue
            job.encoder, job.asked_s, job.was_idle = encoder, self._now(), False
            encoder.num_pictures += 1
            self._by_id[job.job_id] = job
            self._metrics.pictures["asked"] += 1
            return True
        return False

    def _fail(self, job: _Job) -> None:
        """The encoder will not answer: another one is asked, once; then its worker encodes the picture itself."""
        encoder = job.encoder
        if encoder is None or self._by_id.get(job.job_id) is not job:
            return  # what became of another picture has ended its flights
        self._leave(job)
        job.failed.add(encoder.key)
        job.num_losses += 1
        if job.num_crashes >= MAX_LOSSES and job.was_alone:
            self._metrics.pictures["quarantined"] += 1
            flights = list(job.flights)
            self._drop(job)
            for flight in flights:
                self._events.on_deadly(flight)
            return
        if job.num_losses < MAX_LOSSES and self._ask(job):
            return
        self._metrics.pictures["given_up"] += 1
        self._settle(job, None)

    def _settle(self, job: _Job, features: bytes | None) -> None:
        self._drop(job)
        for flight in list(job.flights):
            staged = flight.staged
            if staged is None:
                continue
            staged.missing.discard(job.key)
            if features is not None:
                staged.features[job.key] = features
            if not staged.missing:
                self._events.on_encoded(flight)

    def _drop(self, job: _Job) -> None:
        self._leave(job)
        self._jobs.pop((job.key, job.format), None)

    def _leave(self, job: _Job) -> None:
        """The job is at no encoder any more."""
        if self._by_id.pop(job.job_id, None) is not None and job.encoder is not None:
            job.encoder.num_pictures -= 1


def _num_bytes(image: PreparedImage, format: wire.FeatureFormat) -> int:
    return image.num_tokens * format.columns * wire.ELEMENT_BYTES.get(format.dtype, 8)


def deadly() -> RequestError:
    """The end of a request whose picture kills encoders."""
    message = "its picture crashed each process that was to encode it; it will not be tried again"
    return RequestError(ErrorCode.QUARANTINED, message)
