"""Owns turning `data:` URLs into prepared pictures, in a few limited processes. Runs on the gateway's loop.

Each process takes one job at a time from one bounded queue and is replaced when it dies or exceeds its time.
Nothing is ever fetched: a remote URL is refused.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from gateway.config import GatewayConfig
from gateway.confined import data_urls
from gateway.confined.children import ask, end_child, start_child
from gateway.confined.image_process import Answer, Job
from gateway.generation import PreparedImage, RequestError
from shared.errors import ErrorCode
from shared.pictures import num_bytes, num_tokens
from shared.protocol import ImageInput, ImageSpec

_MAX_PENDING: Final = 256
_MAX_PENDING_BYTES: Final = 256 << 20

log = structlog.get_logger(__name__)
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


@dataclass(slots=True)
class _Pending:
    job: Job
    data: bytes
    future: asyncio.Future[tuple[Answer, bytes]]


class ImageDecoder:
    """The picture processes and the queue in front of them."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue(_MAX_PENDING)
        self._tasks: list[asyncio.Task[None]] = []
        self.processes: set[asyncio.subprocess.Process] = set()
        self.num_pending = 0
        self.pending_bytes = 0  # of files as they are sent

    async def start(self) -> None:
        """Start the processes; they are ready when the first job comes, or a moment later."""
        self._tasks = [
            asyncio.create_task(self._keep_process(), name=f"images-{number}")
            for number in range(self._config.image_processes)
        ]

    async def stop(self) -> None:
        """Kill the processes and fail what waits. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait().future.cancel()

    async def prepare(self, data_url: str, spec: ImageSpec, *, param: str) -> PreparedImage:
        """Decode and resize. Raises `RequestError` INVALID_REQUEST, PAYLOAD_TOO_LARGE or QUEUE_FULL."""
        job, data = self._read_url(data_url, spec, param)
        pending = _Pending(job, data, asyncio.get_running_loop().create_future())
        if self._queue.full() or (self.num_pending and self.pending_bytes + len(data) > _MAX_PENDING_BYTES):
            message = f"{self.num_pending} pictures are waiting to be decoded"
            raise RequestError(ErrorCode.QUEUE_FULL, message, retry_after_s=1.0)
        self._queue.put_nowait(pending)
        self.num_pending += 1
        self.pending_bytes += len(data)
        try:
            answer, pixels = await pending.future
        finally:
            self.num_pending -= 1
            self.pending_bytes -= len(data)
        if answer.error:
            code = ErrorCode.PAYLOAD_TOO_LARGE if answer.too_large else ErrorCode.INVALID_REQUEST
            raise RequestError(code, answer.error, param=param)
        frames, at = [], 0
        for sheet in answer.sheets:
            size = num_bytes([sheet])
            frames.append(pixels[at : at + size])
            at += size
        # The picture follows the prompt's first id, unless the chat template has a place for it.
        runs = [(1, num_tokens(spec, answer.sheets))]
        return PreparedImage(ImageInput(answer.sheets, runs, answer.digest), frames)

    def _read_url(self, url: str, spec: ImageSpec, param: str) -> tuple[Job, bytes]:
        """The job for a data URL and its body, still encoded."""
        limit = int(self._config.max_image_bytes)
        try:
            parts = data_urls.split(url)
        except data_urls.NotADataUrl as error:
            raise RequestError(ErrorCode.INVALID_REQUEST, str(error), param=param) from None
        if len(url) > limit and data_urls.decoded_bytes(url, parts) > limit:
            message = f"a picture's file may have at most {limit} bytes"
            raise RequestError(ErrorCode.PAYLOAD_TOO_LARGE, message, param=param)
        # Decoding megabytes of base64 would stop every stream for tens of milliseconds, so the process decodes.
        body = url[parts.begin :].encode("utf-8", "replace")
        if not body:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the picture is empty", param=param)
        job = Job(spec, self._config.max_image_pixels, self._config.min_image_side, limit, parts.is_base64)
        return job, body

    # ------------------------------------------------------------ processes

    async def _keep_process(self) -> None:
        """One process at a time, replaced when it died or did not answer; runs until cancelled."""
        process: asyncio.subprocess.Process | None = None
        failures = 0
        try:
            while True:
                if process is None:
                    process = await self._start_process()
                pending = await self._queue.get()
                if process.returncode is not None:  # died while idle: that costs this job nothing
                    self.processes.discard(process)
                    process = await self._start_process()
                if pending.future.done() or await self._work(process, pending):
                    failures = 0
                    continue
                await self._end_process(process)
                process, failures = None, failures + 1
                await asyncio.sleep(min(2.0, 0.02 * 2**failures))
        finally:
            if process is not None:
                await self._end_process(process)

    async def _end_process(self, process: asyncio.subprocess.Process) -> None:
        self.processes.discard(process)
        await end_child(process)

    async def _start_process(self) -> asyncio.subprocess.Process:
        process = await start_child("gateway.confined.image_process", self._config.image_memory_bytes)
        self.processes.add(process)
        return process

    async def _work(self, process: asyncio.subprocess.Process, pending: _Pending) -> bool:
        """Do one job and answer its caller, whatever happens. False when the process is no longer good."""
        timeout_s = self._config.image_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                header, pixels = await ask(process, msgspec.msgpack.encode(pending.job), pending.data)
                answer = _decode_answer(header)
        except TimeoutError:
            _fail(pending, f"the picture was not decoded within {timeout_s:g} s")
            log.warning("image_process_stuck", timeout_s=timeout_s)
            return False
        except asyncio.CancelledError:
            pending.future.cancel()
            raise
        except Exception as error:  # a dead process shows itself as one of several errors
            _fail(pending, "the picture could not be decoded: its decoder died")
            log.warning("image_process_died", reason=type(error).__name__)
            return False
        if not pending.future.done():
            pending.future.set_result((answer, pixels))
        return True


def _fail(pending: _Pending, message: str) -> None:
    if not pending.future.done():
        pending.future.set_result((Answer(message), b""))
