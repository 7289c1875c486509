"""Owns turning `data:` URLs into prepared pictures, in a few limited processes. Runs on the gateway's loop.

Each process takes one job at a time from one bounded queue and is replaced when it dies or exceeds its time.
Nothing is ever fetched: a remote URL is refused.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Final

import msgspec
import structlog

from gateway.config import GatewayConfig
from gateway.confined.children import ask, end_child, start_child
from gateway.confined.image_process import Answer, Job
from gateway.generation import PreparedImage, RequestError
from shared.errors import ErrorCode
from shared.protocol import ImageInput, ImageSpec

_DATA_URL = re.compile(r"data:([a-zA-Z0-9.+/-]{0,100})(;[a-zA-Z0-9=.+_-]{1,100})*;base64,", re.ASCII)
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
        self.pending_bytes = 0  # of files in base64

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
        data = self._file(data_url, param)
        job = Job(spec, self._config.max_image_pixels, self._config.min_image_side)
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
        wire = ImageInput(
            position=0,
            tiles_h=answer.tiles_h,
            tiles_w=answer.tiles_w,
            canvas_height=answer.canvas_height,
            canvas_width=answer.canvas_width,
            digest=answer.digest,
        )
        return PreparedImage(wire, pixels[: answer.global_bytes], pixels[answer.global_bytes :])

    def _file(self, data_url: str, param: str) -> bytes:
        """The file inside a data URL, still in base64."""
        match = _DATA_URL.match(data_url)
        if match is None:
            if data_url[:6].lower().startswith(("http:", "https:", "file:", "ftp:")):
                message = (
                    "pictures are not fetched from URLs; send the file itself as data:image/png;base64,…"
                )
            else:
                message = "expected a base64 data URL: data:image/png;base64,…"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param=param)
        if match[1] and not match[1].startswith("image/") and match[1] != "application/octet-stream":
            message = f"expected a picture, got {match[1][:100]}"
            raise RequestError(ErrorCode.INVALID_REQUEST, message, param=param)
        limit = self._config.max_image_bytes
        if (len(data_url) - match.end()) * 3 // 4 > limit + 2:
            raise RequestError(
                ErrorCode.PAYLOAD_TOO_LARGE, f"a picture's file may have at most {limit} bytes", param=param
            )
        # Decoding megabytes of base64 would stop every stream for tens of milliseconds, so the process decodes.
        try:
            data = data_url[match.end() :].encode("ascii")
        except UnicodeEncodeError:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the data URL is not base64", param=param) from None
        if not data:
            raise RequestError(ErrorCode.INVALID_REQUEST, "the picture is empty", param=param)
        return data

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
