"""Owns the loop of a worker that only encodes pictures for others: requests in, features out, one at a time. Decode thread.

Nothing is in flight between two turns: a picture is encoded, copied to the host and sent before the next is begun. Such a
worker has no streams that could wait for that.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty
from typing import Protocol

import structlog

from shared.errors import ErrorCode
from shared.protocol import (
    Beat,
    Cancel,
    Drain,
    Encode,
    Fatal,
    FeatureFormat,
    Features,
    ModelCard,
    Rejected,
    Submit,
)
from worker.loop.costs import Costs
from worker.loop.heartbeat import BEAT_INTERVAL_S, LONG_S, SLACK
from worker.loop.inbox import Command, CompiledSubmit, Inbox, LeaseEnded, Outbox, Received
from worker.schedule.encode_queue import EncodeJob, EncodeQueue
from worker.schedule.picture_intake import build_picture
from worker.schedule.refusal import Refusal
from worker.schedule.sequence import Picture
from worker.step.contract import OutOfDeviceMemory, Progress

log = structlog.get_logger()

GUESSED_CROP_S = 1.0  # until one was measured
NEW_SHARE = 0.3  # of the last picture's time in what the next is expected to take


class PictureEncoder(Protocol):
    """What encodes: `worker.step.picture_encoder.TorchEncoder` or `worker.sim.encoder.SimEncoder`."""

    @property
    def format(self) -> FeatureFormat:
        """What the features are."""

    @property
    def num_hits(self) -> int:
        """Pictures, or parts of them, that were known and not encoded again."""

    def encode(self, tenant: str, picture: Picture, progress: Progress) -> bytes:
        """The picture's features; blocks, and calls `progress` meanwhile. Raises `OutOfDeviceMemory`; anything else means
        that the device is lost."""


class EncodeLoop:
    """The counterpart of `loop.engine.Engine` for the role `encode`. `max_jobs` pictures may wait."""

    def __init__(
        self,
        encoder: PictureEncoder,
        card: ModelCard,
        *,
        inbox: Inbox,
        outbox: Outbox,
        clock: Callable[[], float],
        epoch: int,
        max_jobs: int,
        on_beat: Callable[[int, float], None] | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.queue = EncodeQueue(max_jobs)
        self.is_draining = False
        self.stopping = False
        self._encoder = encoder
        self._card = card
        self._inbox = inbox
        self._outbox = outbox
        self._clock = clock
        self._epoch = epoch
        self._on_beat = on_beat
        self._costs = costs or Costs()
        self._started_s = self._next_beat_s = clock()
        self._drain_until_s = float("inf")
        self._crop_s = GUESSED_CROP_S
        self._until_s = 0.0  # when the picture under way should be done at the latest; 0: none is
        self._counts = {
            "encoded_pictures_total": 0.0,
            "encoded_crops_total": 0.0,
            "feature_bytes_sent_total": 0.0,
            "encode_seconds_total": 0.0,
        }

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Tick until stopped or drained. A device fault tells every gateway, then raises."""
        try:
            while not self.stopping:
                if not self.tick():
                    if self.is_done:
                        self._beat()  # the last word: it left, and was not lost
                        break
                    self._wait()
        except Exception as error:
            self.give_up(error)
            raise

    @property
    def is_done(self) -> bool:
        """Whether it drains and nothing is left."""
        return self.is_draining and not len(self.queue)

    def tick(self) -> bool:
        """Take commands, give a sign of life if one is due, encode one picture; returns whether there was one."""
        while not self._inbox.empty():
            self._handle(self._inbox.get())
        now_s = self._clock()
        if now_s > self._drain_until_s:
            while (late := self.queue.take()) is not None:
                self._refuse(late, ErrorCode.SHUTTING_DOWN, "the worker's drain deadline has passed")
        if now_s >= self._next_beat_s:
            self._beat()
        job = self.queue.take()
        if job is not None:
            self._encode(job)
        return job is not None

    def give_up(self, error: Exception) -> None:
        """The device is lost; whoever asked tries elsewhere."""
        log.error("encode_loop_failed", error=type(error).__name__, detail=str(error)[:500])
        self._outbox.broadcast(Fatal(self._epoch, ErrorCode.DEVICE_ERROR, type(error).__name__))

    def stop(self) -> None:
        """End the loop after the current tick. Called from another thread."""
        self.stopping = True

    def _wait(self) -> None:
        try:
            self._handle(self._inbox.get(timeout=max(0.001, self._next_beat_s - self._clock())))
        except Empty:
            pass

    # ------------------------------------------------------------------ commands

    def _handle(self, command: Command) -> None:
        if isinstance(command, LeaseEnded):
            self.queue.drop_gateway(command.gateway)
        elif isinstance(command, Received):
            message = command.message
            if isinstance(message, Encode):
                self._take_in(command.gateway, message, command.frames)
            elif isinstance(message, Submit):
                self._reject(command.gateway, message)
            elif isinstance(message, Cancel):
                for job_id in message.sequence_ids:
                    self.queue.drop((command.gateway, job_id))
            elif isinstance(message, Drain):
                self.is_draining = True
                self._drain_until_s = min(self._drain_until_s, self._clock() + message.deadline_s)
        elif isinstance(command, CompiledSubmit):
            self._reject(command.gateway, command.message)

    def _take_in(self, gateway: bytes, message: Encode, frames: list[bytes]) -> None:
        if (gateway, message.job_id) in self.queue:
            return  # a frame delivered twice
        try:
            if message.epoch != self._epoch:
                raise Refusal(
                    ErrorCode.WORKER_LOST, f"this worker's epoch is {self._epoch}, not {message.epoch}"
                )
            if self.is_draining:
                raise Refusal(ErrorCode.SHUTTING_DOWN, "the worker is draining")
            if self.queue.is_full:
                raise Refusal(ErrorCode.QUEUE_FULL, f"{len(self.queue)} pictures are waiting already")
            picture = build_picture(message, frames, self._card)
        except Refusal as refusal:
            answer = Features(self._epoch, message.job_id, None, refusal.code, refusal.message)
            self._outbox.send(gateway, answer)
            return
        self.queue.put(EncodeJob(gateway, message.job_id, message.tenant, picture))

    def _reject(self, gateway: bytes, message: Submit) -> None:
        text = "this worker only encodes pictures (role encode)"
        refusal = Rejected(self._epoch, message.sequence_id, ErrorCode.UNSUPPORTED, text)
        self._outbox.send(gateway, refusal)

    # ------------------------------------------------------------------ pictures

    def _encode(self, job: EncodeJob) -> None:
        num_crops = max(1, job.picture.num_crops)
        began_s = self._clock()
        expected_s = SLACK * num_crops * self._crop_s
        self._until_s = began_s + expected_s
        if expected_s > LONG_S:
            self._beat()  # slow is not hung: it is announced
        num_hits = self._encoder.num_hits
        try:
            data = self._encoder.encode(job.tenant, job.picture, self._on_progress)
        except OutOfDeviceMemory:
            self._refuse(job, ErrorCode.OUT_OF_MEMORY, "the device has no memory for this picture now")
            return
        finally:
            self._until_s = 0.0
        took_s = self._clock() - began_s
        counts = self._counts
        counts["encoded_pictures_total"] += 1
        counts["feature_bytes_sent_total"] += len(data)
        counts["encode_seconds_total"] += took_s
        if self._encoder.num_hits == num_hits:  # all of it was new
            counts["encoded_crops_total"] += num_crops
            self._crop_s += NEW_SHARE * (took_s / num_crops - self._crop_s)
        self._outbox.send(job.gateway, Features(self._epoch, job.job_id, self._encoder.format), [data])

    def _refuse(self, job: EncodeJob, code: ErrorCode, message: str) -> None:
        self._outbox.send(job.gateway, Features(self._epoch, job.job_id, None, code, message))

    # ------------------------------------------------------------------ signs of life

    def _on_progress(self) -> None:
        if self._clock() >= self._next_beat_s:
            self._beat()

    def _beat(self) -> None:
        now_s = self._clock()
        self._next_beat_s = now_s + BEAT_INTERVAL_S
        expected_s = max(0.0, self._until_s - now_s)
        figures = {**self._counts, "feature_hits_total": float(self._encoder.num_hits)}
        figures |= self._costs.figures(now_s - self._started_s)
        self._outbox.broadcast(
            Beat(
                self._epoch,
                int(self._counts["encoded_pictures_total"]),
                int(self._until_s > 0),
                len(self.queue),
                0,
                0,
                self.is_draining,
                figures,
                expected_s=expected_s,
            )
        )
        if self._on_beat is not None:
            self._on_beat(int(self._counts["encoded_pictures_total"]), expected_s)
